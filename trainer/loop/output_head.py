"""The output head, reached inside the model's own forward pass.

`install` replaces the `forward` of the output embedding (`lm_head`). During a training step it receives the
final hidden states where the model would have projected them, computes the label annealing loss from them
and its own weight, and returns the scalar in place of [B, S, V] logits; a hook on the model hands the loss
out. So the loss runs where DDP watches, where FSDP has gathered the weight, inside autocast and behind
adapters, for any architecture, and the logits of a batch are never built. Outside of a training step the
head behaves as before.

What a model does to its logits afterwards (softcap, scale) is read from its configuration and verified by
numbers before training: an unknown post-processing is refused by the model's name, never ignored.

B: sequences, S: positions, D: hidden width, V: vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers.utils.generic import is_flash_attention_requested

from formats.errors import ConfigError
from trainer.data.collator import row_boundaries, shifted_terms, split_batch
from trainer.data.teacher_batch import TeacherBatch
from trainer.loading import unwrapped
from trainer.loss.label_annealing_loss import LabelAnnealingOutput, label_annealing_loss
from trainer.loss.token_weights import LabelTerms
from trainer.multimodal import packed_positions
from trainer.objective import Objective

SCALES = (("logit_scale", False), ("logits_scaling", True), ("lm_head_multiplier", False))
"""Names of a factor on the logits in transformers' configurations, and whether it divides (Granite) or
multiplies (Cohere; Falcon-H1)."""
SOFTCAP = "final_logit_softcapping"
"""cap * tanh(logits / cap), Gemma 2 and later."""
VERIFY_TOLERANCE = 2e-2
"""Largest deviation allowed between the model's logits and ours, relative to their spread (bf16: 4e-3)."""


@dataclass
class HeadRequest:
    """What the next forward pass shall compute at the head, and where it leaves the result."""

    labels_N: torch.Tensor
    """int64 [B * S], shifted."""
    teacher: TeacherBatch | None
    """Teacher targets of these rows."""
    kl_coef: float | torch.Tensor = 1.0
    """Weight of the KL term."""
    kl_direction: str = "forward"
    """`forward` or `reverse`."""
    num_ce: float | torch.Tensor | None = None
    """Denominator of the CE term; by default the rows of this batch."""
    num_kl: float | torch.Tensor | None = None
    """Denominator of the KL term; by default the rows of this batch."""
    measure_tokens: bool = False
    """Also fill `output.tokens`."""
    objective: Objective | None = None
    """What single tokens count; None for a plain mean."""
    label_terms: LabelTerms | None = None
    """What the batch says of the labels."""
    output: LabelAnnealingOutput | None = None
    """Filled by the forward pass."""
    loss: torch.Tensor | None = None
    """[1, 1, 1], the very tensor that left the head."""


class OutputHead:
    """The output head of a causal language model: its weight, bias, softcap and scale.

    Use `OutputHead.of(model)`, then `install()`, then `with head.requested(request): model(**inputs)`.
    `kernel` may be set to what `label_annealing_loss` takes under that name.
    """

    def __init__(self, model: nn.Module, module: Any, softcap: float | None, scale: float) -> None:
        self.model, self.module = model, module
        self.softcap, self.scale = softcap, scale
        self.vocab_size: int | None = None
        self.kernel: Literal["auto", "torch", "triton"] = "auto"
        self._request: HeadRequest | None = None
        self._capture: list[torch.Tensor] | None = None
        self._original: Any = None
        self._hook: Any = None

    @classmethod
    def of(cls, model: nn.Module) -> "OutputHead":
        """Find the head of `model` (wrapped or not).

        Raises:
            ConfigError: there is none that this trainer can use; names the model class and the reason.
        """
        inner = unwrapped(model)
        name = type(inner).__name__
        module = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
        if module is None:
            raise ConfigError(
                f"label annealing needs a causal language model with an output head, got {name}"
            )
        if hasattr(module, "modules_to_save"):  # peft trains a full copy of the head
            module = module.modules_to_save[module.active_adapters[0]]
        if hasattr(module, "base_layer"):
            raise ConfigError(
                f"adapters on the output head are not supported, got one on {name}; "
                "take lm_head out of lora.target_modules"
            )
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim != 2 or not weight.is_floating_point():
            raise ConfigError(
                f"the output head must have a floating-point [vocabulary, hidden] weight, "
                f"got {type(module).__name__} in {name}"
            )
        config = inner.config.get_text_config()
        if getattr(config, "output_router_logits", False):
            raise ConfigError(
                f"the load-balancing loss of {name} is not part of label annealing, for its value depends on how a "
                "step is split; set output_router_logits to false in the model's config.json and build the cache "
                "from that"
            )
        scale = 1.0
        for attribute, divides in SCALES:
            factor = getattr(config, attribute, None)
            if factor is not None:
                scale *= 1.0 / float(factor) if divides else float(factor)
        cap = getattr(config, SOFTCAP, None)
        return cls(inner, module, float(cap) if cap else None, scale)

    @property
    def num_outputs(self) -> int:
        """V: rows of the head's weight."""
        return int(self.module.weight.shape[0])

    # --- living in the model ----------------------------------------------------------------------------

    def install(self) -> "OutputHead":
        """Take the head's place in the model; `remove` undoes it. Install before the model is wrapped."""
        if self._original is None:
            self._original = self.module.forward
            self.module.forward = self._forward
            self._hook = self.model.register_forward_hook(self._hand_out, prepend=True)
        return self

    def remove(self) -> None:
        """Give the model its own head back."""
        if self._original is not None:
            # The instance attribute shadows the class's forward; without it the module is as it was.
            del self.module.forward
            self._hook.remove()
            self._original = self._hook = None

    @contextmanager
    def requested(self, request: HeadRequest) -> Iterator[HeadRequest]:
        """Within this context the model returns {"loss": ...} for `request` instead of logits."""
        assert self._original is not None, "install the head first"
        self._request = request
        try:
            yield request
        finally:
            self._request = None

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Within this context the head gives the sum of its input, [1, 1, 1]: the model's own work alone."""
        assert self._original is not None, "install the head first"
        self.module.forward = lambda hidden_BSD, *args, **kwargs: hidden_BSD.sum().reshape(1, 1, 1)
        try:
            yield
        finally:
            self.module.forward = self._forward

    def loss(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        *,
        kl_coef: float | torch.Tensor = 1.0,
        kl_direction: str = "forward",
        num_ce: float | torch.Tensor | None = None,
        num_kl: float | torch.Tensor | None = None,
        measure_tokens: bool = False,
        objective: Objective | None = None,
    ) -> LabelAnnealingOutput:
        """The loss of a collated batch, for any training loop: `head.loss(model, batch).loss.backward()`.

        Args:
            model: the model as the loop holds it, wrapped (DDP, FSDP, compiled) or not.
            batch: from `LabelAnnealingCollator`, on the model's device.
            kl_coef, kl_direction: as in `label_annealing_loss`.
            objective: as in `label_annealing_loss`; the batch is of a `CachedDataset` of the same.
            num_ce, num_kl: denominators; pass the counts of the whole step (`count_targets`) when a step has
                several batches, divided by the number of ranks under DDP or FSDP, which average.
            measure_tokens: as in `label_annealing_loss`.

        Raises:
            ConfigError: the model does not call its output head.
        """
        inputs, labels_N, teacher = split_batch(batch)
        if "position_ids" in inputs:
            config: Any = self.model.config
            inputs["position_ids"] = packed_positions(config.model_type, inputs["position_ids"])
        request = HeadRequest(
            labels_N, teacher, kl_coef, kl_direction, num_ce, num_kl, measure_tokens, objective
        )
        if is_flash_attention_requested(self.model.config):
            inputs |= row_boundaries(batch)
        terms = shifted_terms(batch)
        request.label_terms = LabelTerms(terms.get("label_weights"), terms.get("label_logprobs"))
        with self.requested(request):
            outputs = model(**inputs)
        assert request.output is not None
        return replace(request.output, loss=outputs["loss"])

    def _forward(self, hidden_BSD: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._capture is not None:
            hidden_ND = hidden_BSD.detach().reshape(-1, hidden_BSD.shape[-1])
            self._capture.append(self.logits(hidden_ND))
        request = self._request
        if request is None:
            return self._original(hidden_BSD, *args, **kwargs)
        output = label_annealing_loss(
            hidden_BSD.reshape(-1, hidden_BSD.shape[-1]),
            self.module.weight,
            request.labels_N,
            request.teacher,
            kl_coef=request.kl_coef,
            kl_direction=request.kl_direction,
            num_ce=request.num_ce,
            num_kl=request.num_kl,
            bias_V=getattr(self.module, "bias", None),
            logit_softcap=self.softcap,
            logit_scale=self.scale,
            vocab_size=self.vocab_size,
            kernel=self.kernel,
            measure_tokens=request.measure_tokens,
            objective=request.objective,
            label_terms=request.label_terms,
        )
        request.output = output
        # Three dimensions, because the model goes on to treat this as logits. The same tensor is handed out
        # below: FSDP hangs its backward hooks on what a module returns, and warns of views.
        request.loss = output.loss.reshape(1, 1, 1).clone()
        return request.loss

    def _hand_out(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._request is None:
            return None
        if self._request.loss is None:
            raise ConfigError(
                f"{type(self.model).__name__} does not call its output head, so the loss cannot be "
                "taken there; this architecture is not supported"
            )
        return {"loss": self._request.loss.sum()}

    # --- the check --------------------------------------------------------------------------------------

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """[N, V]: the logits as the loss sees them; for the check only, and only inside the forward pass."""
        bias = getattr(self.module, "bias", None)
        logits_NV = nn.functional.linear(hidden_ND, self.module.weight, bias).float() * self.scale
        if self.softcap is not None:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV

    @torch.no_grad()
    def verify(self, model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> float:
        """Compare the model's own logits with ours on one short input; returns the relative deviation.

        Raises:
            ConfigError: they differ: the model does something to its logits that the loss does not know.
        """
        assert self._original is not None, "install the head first"
        self._capture = []
        try:
            logits = model(**inputs).logits
        finally:
            captured, self._capture = self._capture, None
        name = type(self.model).__name__
        if len(captured) != 1:
            raise ConfigError(
                f"{name} must call its output head once per forward pass, got {len(captured)} calls; "
                "this architecture is not supported"
            )
        logits_NV = logits.reshape(-1, logits.shape[-1]).float()
        if captured[0].shape != logits_NV.shape:
            raise ConfigError(
                f"{name} returns logits of shape {tuple(logits_NV.shape)} where its head gives "
                f"{tuple(captured[0].shape)}; this architecture is not supported"
            )
        deviation = float((captured[0] - logits_NV).abs().max() / logits_NV.std().clamp_min(1e-6))
        if not deviation <= VERIFY_TOLERANCE:
            raise ConfigError(
                f"{name} changes its logits behind the output head in a way this trainer does not know "
                f"(relative deviation {deviation:.2g}, at most {VERIFY_TOLERANCE:g}); not supported"
            )
        return deviation
