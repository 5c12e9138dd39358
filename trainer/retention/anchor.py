"""theta0: the initial weights, held beside the parameters that move away from them.

Copied before anything is wrapped or a checkpoint is loaded, so a resumed run is held to the initial model
and not to its own checkpoint. Placed when everything has its device: whole on every rank under DDP, sharded
like the parameter itself under FSDP2. From then on all arithmetic is on this rank's shards, elementwise.

Memory: one more copy of the trained weights, sharded as they are; until it is placed, on the CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from formats.errors import ConfigError

WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def plain_name(name: str) -> str:
    """The name of a parameter in the model before anything wrapped it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "") if wrapper != "module." else name.removeprefix(wrapper)
    return name


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Plain name -> parameter, each tensor once: tied weights come under their first name."""
    return {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_like(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of `whole`, cut and placed as `parameter` is. Collective for a sharded parameter: the
    values are those of rank 0, whatever the others hold.
    """
    if not isinstance(parameter, DTensor):
        return whole.to(parameter.device)
    mesh = parameter.device_mesh
    if whole.is_meta:  # ranks other than 0, when the model was loaded on rank 0 only
        whole = torch.empty_like(whole, device=mesh.device_type)
    sharded = distribute_tensor(whole.to(mesh.device_type), mesh, parameter.placements)
    return sharded.to_local().to(local(parameter).device)


@dataclass(frozen=True)
class Held:
    """One parameter and its initial value."""

    name: str
    """In the plain model."""
    parameter: nn.Parameter
    """As the optimiser holds it."""
    initial: torch.Tensor
    """This rank's part of the initial value, in the parameter's dtype and on its device."""

    @property
    def value(self) -> torch.Tensor:
        """This rank's part of the parameter; writing to it changes the parameter."""
        return local(self.parameter.detach())

    @property
    def gradient(self) -> torch.Tensor | None:
        """This rank's part of the gradient, already averaged over ranks; None when the loss has none."""
        return None if self.parameter.grad is None else local(self.parameter.grad)

    @property
    def num_shards(self) -> int:
        """Into how many parts the parameter is cut. A sum over this rank's part, times this, averages over
        the ranks to the sum over the whole parameter.
        """
        if not isinstance(self.parameter, DTensor):
            return 1
        mesh, count = self.parameter.device_mesh, 1
        for dim, placement in enumerate(self.parameter.placements):
            count *= mesh.size(dim) if placement.is_shard() else 1
        return count


class Anchor:
    """The initial weights of a model's trained parameters.

    Args:
        model: not wrapped, with its initial weights.
        weights: plain name -> theta0 of every trained parameter, on the CPU, which is kept; None for a copy of the
            model's own.

    Raises:
        ConfigError: the model has adapters: how far they are from their start is not how far the merged
            weights are from the initial ones.
    """

    def __init__(self, model: nn.Module, weights: dict[str, torch.Tensor] | None = None) -> None:
        if hasattr(model, "peft_config"):
            raise ConfigError(
                "l2, ewc and sfa need full fine-tuning, got a model with adapters; train it without lora"
            )
        if weights is None:
            weights = {name: p.detach().clone() for name, p in trained_parameters(model).items()}
        self._whole = weights
        self._placed: dict[str, torch.Tensor] = {}
        self.held: list[Held] = []

    def place(self, model: nn.Module) -> None:
        """Cut and move the initial weights like the parameters of `model`, which is wrapped and ready to
        train. Collective.

        Raises:
            ConfigError: the parameters are not those of the initial model, as under FSDP 1.
        """
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # A forward pass leaves the output head gathered, and its parameters are not the optimiser's then.
                module.reshard()
        parameters = trained_parameters(model)
        known = self._placed or self._whole
        if parameters.keys() != known.keys() or (
            self._whole and any(p.shape != self._whole[name].shape for name, p in parameters.items())
        ):
            raise ConfigError(
                "l2, ewc and sfa need every parameter under its own name and shape, got flattened or renamed "
                "ones; use DDP, or FSDP of version 2"
            )
        for name, parameter in parameters.items():
            if name in self._whole:
                self._placed[name] = placed_like(self._whole.pop(name).to(parameter.dtype), parameter)
        self.held = [Held(name, parameter, self._placed[name]) for name, parameter in parameters.items()]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within this context the parameters have their initial values. Costs a third copy meanwhile."""
        current = [held.value.clone() for held in self.held]
        try:
            for held in self.held:
                held.value.copy_(held.initial)
            yield
        finally:
            for held, value in zip(self.held, current, strict=True):
                held.value.copy_(value)
