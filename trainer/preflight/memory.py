"""What a step of training will hold on each process, before it is taken.

Weights, gradients and the optimiser's state are counted, the latter by taking one step of the very optimiser on a
parameter that nobody trains. Activations are counted by a forward pass without numbers (fake tensors) over a batch of
the longest rows: every tensor that autograd keeps for the backward pass, each storage once. The loss's own buffers
follow from its chunks.

With gradient checkpointing a layer keeps its input alone, and one layer at a time all that it needs.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers.modeling_layers import GradientCheckpointingLayer

from formats.errors import ConfigError, one_line
from trainer.loading import unwrapped
from trainer.loss.chunks import logits_type, rows_per_chunk
from trainer.loss.logits import Projection
from trainer.loss.token_weights import CrossEntropy
from trainer.objective import Objective
from trainer.preflight.combinations import word

if TYPE_CHECKING:
    from trainer.loop.label_annealing_trainer import LabelAnnealingTrainer

GIB = 2**30
PROBE_SHAPE = (64, 128)
"""Of the parameter on which the optimiser is tried; some compress the state of 4,096 elements and more."""


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes on each process."""

    weights: int
    """All weights and buffers of the model."""
    optimiser: int
    """The optimiser's state of the trained weights."""
    initial: int
    """What retention methods keep: initial weights, and how much they matter."""
    gradients: int
    """Of the trained weights."""
    activations: int
    """What the forward pass keeps for the backward pass of a micro-batch."""
    loss: int
    """A chunk of logits, the output head in the compute dtype, its gradient, and that of the hidden states."""
    carries_gradients: bool
    """Whether gradients of earlier micro-batches are there while the loss is computed."""

    @property
    def lasting(self) -> int:
        """What a step cannot do without."""
        return self.weights + self.optimiser + self.initial + self.gradients

    @property
    def peak(self) -> int:
        """The larger of two moments: when the loss is known, and when all gradients are."""
        forward = self.weights + self.optimiser + self.initial + self.activations + self.loss
        return max(self.lasting, forward + (self.gradients if self.carries_gradients else 0))

    def __str__(self) -> str:
        sizes = {name: value for name, value in asdict(self).items() if value and name != "carries_gradients"}
        return ", ".join(f"{name} {value / GIB:.2f}" for name, value in sizes.items())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"peak": self.peak}


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Each storage once."""
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def lasting_memory(trainer: "LabelAnnealingTrainer") -> StepMemory:
    """What a step of this trainer holds whatever its batches are: no activations, no loss."""
    args, model = trainer.args, trainer.model
    assert model is not None
    shards = args.world_size if trainer.is_fsdp_enabled else 1
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = num_bytes(trained) // shards
    everything = StepMemory(
        weights=num_bytes([*model.parameters(), *model.buffers()]) // shards,
        optimiser=int(optimiser_bytes(args, model, trained[0]) * sum(p.numel() for p in trained)) // shards,
        initial=num_copies(trainer.retained.methods) * gradients,
        gradients=gradients,
        activations=0,
        loss=0,
        carries_gradients=args.gradient_accumulation_steps > 1,
    )
    if args.device.type != "cuda":
        return everything
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return on_the_gpu(everything, offloaded=offloads(plugin), paged=word(args.optim).startswith("paged_"))


def offloads(fsdp_plugin: Any) -> bool:
    """Whether FSDP, of either version, keeps what it shards in the machine's memory."""
    policy = getattr(fsdp_plugin, "cpu_offload", None)
    return isinstance(policy, CPUOffloadPolicy) or bool(getattr(policy, "offload_params", False))


def on_the_gpu(memory: StepMemory, *, offloaded: bool, paged: bool) -> StepMemory:
    """What of it must be there for as long as the run lasts: offloaded weights come a layer at a time, and the state of
    a paged optimiser gives way."""
    if offloaded:
        return replace(memory, weights=0, optimiser=0, initial=0, gradients=0)
    return replace(memory, optimiser=0) if paged else memory


def step_memory(trainer: "LabelAnnealingTrainer", *, activations: bool = True) -> StepMemory:
    """What a step holds at micro-batches of the longest rows; `activations=False` leaves those out."""
    batch, length = batch_shape(trainer)
    return replace(
        lasting_memory(trainer),
        activations=activation_bytes(trainer, batch, length) if activations else 0,
        loss=loss_bytes(trainer, batch * length),
    )


def batch_shape(trainer: "LabelAnnealingTrainer") -> tuple[int, int]:
    """(sequences, tokens of each) of the largest micro-batch."""
    datasets: list[Any] = [trainer.train_dataset, *(dataset for dataset, _ in trainer.mixed)]
    lengths_of = [dataset.lengths() for dataset in datasets]
    length = max(int(lengths.max()) for lengths in lengths_of)
    if trainer.packing and trainer.pack_length:  # a pack has no more than all rows of its text
        length = min(trainer.pack_length, max(int(lengths.sum()) for lengths in lengths_of))
    return trainer.args.train_batch_size, length


def num_copies(methods: Sequence[Any]) -> int:
    """How many numbers per trained weight the retention methods keep."""
    if not methods:
        return 0
    tasks = [method for method in methods if method.name == "ewc"]
    return 1 + sum(1 + (task.theta_k is not None) for task in tasks)


def optimiser_bytes(args: Any, model: nn.Module, like: torch.Tensor) -> float:
    """Bytes of state per trained weight: that of a step on a parameter that nobody trains; two numbers, as Adam keeps,
    for an optimiser that cannot be tried so.
    """
    from transformers import Trainer

    name = word(args.optim)
    if "layerwise" in name or "lomo" in name:  # they hang hooks on the model, and keep next to nothing
        return 0.0
    probe = nn.Parameter(torch.zeros(PROBE_SHAPE, dtype=like.dtype, device=args.device))
    probe.grad = torch.ones_like(probe)
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
        optimizer = kind([probe], **settings)  # type: ignore[call-arg]
        optimizer.step()
    except Exception:  # one that takes whole models, or has to be told that training begins
        return 2.0 * like.element_size()
    state = [value for value in optimizer.state[probe].values() if isinstance(value, torch.Tensor)]
    return num_bytes(value for value in state if value.numel() > 1) / probe.numel()


def compute_dtype(args: Any, weight: torch.Tensor) -> torch.dtype:
    """In which the model multiplies."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else weight.dtype


def loss_bytes(trainer: "LabelAnnealingTrainer", num_tokens: int) -> int:
    """What the loss holds beside what it is given, if every token counts."""
    head, args = trainer.head, trainer.args
    weight_VD = head.module.weight
    num_outputs, width = weight_VD.shape
    vocab_size = head.vocab_size or num_outputs
    compute = compute_dtype(args, weight_VD)
    like = torch.empty(vocab_size, 1, dtype=compute, device="meta")
    projection = Projection(like, None, head.scale, head.softcap)
    objective = trainer.objective or Objective()
    kind = logits_type(head.kernel, compute, args.device, CrossEntropy.extras_of(objective))
    datasets: list[Any] = [trainer.train_dataset]
    num_buffers = kind.num_buffers(projection, 1.0 / datasets[0].temperature)
    memory, trained = device_bytes(args.device), weight_VD.requires_grad
    rows = rows_per_chunk(vocab_size, num_buffers, args.device.type, memory, trained=trained)
    chunk = int(min(rows, num_tokens) * vocab_size * num_buffers * 4)
    copy = vocab_size * width * compute.itemsize if weight_VD.dtype != compute else 0
    gradient = num_outputs * width * 4 if trained else 0
    return chunk + copy + gradient + 2 * num_tokens * width * compute.itemsize


def device_bytes(device: torch.device) -> int | None:
    """The whole memory of a GPU; None for anything else."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def activation_bytes(trainer: "LabelAnnealingTrainer", batch: int, length: int) -> int:
    """What autograd keeps of a forward pass over [batch, length] tokens, up to the output head.

    Raises:
        ConfigError: the model cannot be run without numbers, as where a choice depends on them.
    """
    model, args = trainer.model, trainer.args
    assert model is not None
    device, weight = args.device, trainer.head.module.weight
    was_training = model.training
    model.train()
    kept: dict[int, torch.UntypedStorage] = {}
    try:
        with FakeTensorMode(), trainer.head.left_out():

            def stand_in(tensor: torch.Tensor) -> torch.Tensor:
                wanted = tensor.requires_grad
                return torch.empty(tensor.shape, dtype=tensor.dtype, device=device, requires_grad=wanted)

            state = {name: stand_in(p) for name, p in (*model.named_parameters(), *model.named_buffers())}
            held = {tensor.untyped_storage()._cdata for tensor in state.values()}

            def keep(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in held:
                    kept[storage._cdata] = storage
                return tensor

            inputs: dict[str, Any] = {
                "input_ids": torch.zeros(batch, length, dtype=torch.int64, device=device)
            }
            if trainer.packing:
                inputs["position_ids"] = torch.zeros(batch, length, dtype=torch.int32, device=device)
            else:
                inputs["attention_mask"] = torch.ones(batch, length, dtype=torch.bool, device=device)
            compute = compute_dtype(args, weight)
            autocast = torch.autocast(device.type, compute, enabled=compute != weight.dtype or args.bf16)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
                torch.func.functional_call(model, state, kwargs={**inputs, "use_cache": False})
            total = sum(storage.nbytes() for storage in kept.values())
    except Exception as error:  # whatever a model of someone else's does with a tensor that has no numbers
        raise ConfigError(
            f"activations must be countable without numbers, got {type(error).__name__} from "
            f"{type(unwrapped(model)).__name__}: {one_line(error)}; training does not need the count"
        ) from None
    finally:
        model.train(was_training)
    if not args.gradient_checkpointing:
        return total
    num_layers = sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules())
    if not num_layers:
        return total
    inputs_of_layers = num_layers * batch * length * weight.shape[1] * weight.dtype.itemsize
    return inputs_of_layers + total // num_layers


def capacity_bytes(device: torch.device) -> int:
    """The memory that a process can have: the GPU's, or the machine's."""
    return device_bytes(device) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_room(memory: StepMemory, device: torch.device) -> None:
    """Refuse a step that cannot fit.

    Raises:
        ConfigError: the sizes, and what would make it smaller.
    """
    there = capacity_bytes(device)
    if memory.peak > there:
        raise ConfigError(
            f"a step must fit into the {there / GIB:.1f} GiB of {device}, got {memory.peak / GIB:.1f} GiB ({memory}); "
            "use training.gradient_checkpointing: true, a smaller training.per_device_train_batch_size, lora, or FSDP "
            "on several GPUs"
        )
