"""The work on whole rows of logits, and PyTorch's way of doing it.

trainer/loss/kl.py knows what a row's gradient is made of; everything of size [C, V] that it takes happens
behind three steps, in this order:

    read             logits from the projection; sums of their exponentials, values of single tokens
    tail_statistics  mean and covariance of the token features under the tail, where moments are matched
    write            the exponentials become the gradient

`TorchPasses` does them with some ten elementwise operations on fp32 (fp64) buffers, on any device;
trainer/loss/triton_passes.py with two kernels on the projection itself.

C: rows of the chunk, V: vocabulary without padding, E: head entries, S: tail draws, F: token features.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from formats.errors import ConfigError
from trainer.loss.loss_tail import FeatureTables
from trainer.loss.targets import TeacherTargets

KERNELS = ("torch", "triton")


@dataclass(frozen=True)
class Head:
    """The map from hidden state to logits: z = softcap(logit_scale * (W h + b))."""

    weight_VD: torch.Tensor
    """Compute dtype, padding cut off."""
    bias_V: torch.Tensor | None
    """The arithmetic's dtype."""
    logit_scale: float
    logit_softcap: float | None


@dataclass(frozen=True)
class Work:
    """What the chunks of a call have in common; decides which buffers there are."""

    beta: float
    """1 / T of the teacher's targets, 1 without any."""
    moments: bool
    """The shape of the tail is matched."""


@dataclass(frozen=True)
class Readings:
    """What is taken from a chunk before it becomes its gradient. All z are less their row's maximum."""

    label_C: torch.Tensor
    """z of the label (of any token where there is none)."""
    sum_C: torch.Tensor | None
    """Sum of exp(z); None at T = 1 with targets, where the other sums tell it."""
    tail_sum_C: torch.Tensor
    """Sum of exp(beta z) over all but the head entries, a sum of positive terms."""
    head_E: torch.Tensor | None = None
    """beta z."""
    draw_S: torch.Tensor | None = None
    """beta z."""


@dataclass(frozen=True)
class RowGradient:
    """The gradient with respect to the logits: numbers per row, and what single tokens have instead."""

    ce_C: torch.Tensor
    """Times exp(z) on every token,"""
    ce_weight_C: torch.Tensor
    """less this at the label."""
    tail_C: torch.Tensor | None = None
    """Times exp(beta z) on the tail."""
    slope_CF: torch.Tensor | None = None
    """slope . u_j is added to `tail_C`."""
    probs_E: torch.Tensor | None = None
    """q_j of the head entries,"""
    head_E: torch.Tensor | None = None
    """and what the KL adds there."""
    draw_S: torch.Tensor | None = None
    """What the tail draws add at their tokens."""


class Passes(Protocol):
    """Buffers for one chunk at a time, and the three steps."""

    def __init__(self, head: Head, num_rows: int, work: Work) -> None:
        """Buffers for chunks of up to `num_rows` rows."""

    @staticmethod
    def num_buffers(head: Head, work: Work) -> float:
        """What all buffers together take, in buffers of four bytes per logit."""

    def read(
        self, hidden_CD: torch.Tensor, labels_C: torch.Tensor, targets: TeacherTargets | None
    ) -> Readings:
        """Project a chunk. `labels_C` are tokens throughout; without `targets` the tail is all tokens."""

    def tail_statistics(self, tables: FeatureTables, at_one: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean [C, F], covariance [C, F, F]) under the tail at the temperature, or at T = 1."""

    def write(self, gradient: RowGradient, tables: FeatureTables | None) -> torch.Tensor:
        """[C, V] in the compute dtype: the gradient with respect to W h + b, before the logit scale."""

    def bias_gradient(self) -> torch.Tensor:
        """[V]: its sum over the rows."""


def passes_of(kernel: str, compute: torch.dtype, device: torch.device | str) -> type[Passes]:
    """The passes of that name. fp64 is always PyTorch's.

    Raises:
        ConfigError: there is no such kernel, or it cannot run here.
    """
    if kernel not in KERNELS:
        raise ConfigError(f"the loss kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    if kernel == "torch":
        return TorchPasses
    try:
        from trainer.loss.triton_passes import INTERPRETED, TritonPasses
    except ImportError as error:
        raise ConfigError(
            f"the loss kernel triton needs the package triton, got: {error}; "
            "install it or use the loss kernel torch"
        ) from error
    device = torch.device(device)
    if device.type != "cuda" and not INTERPRETED:
        raise ConfigError(
            f"the loss kernel triton needs a CUDA device, got {device.type}; use the loss kernel torch"
        )
    return TorchPasses if compute == torch.float64 else TritonPasses


def arithmetic_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """fp32 for everything but fp64."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def flat_entries(
    labels_C: torch.Tensor, targets: TeacherTargets | None, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Indices into the flattened logits, int64: of labels [C], head entries [E] and draws [S]."""
    label_C = torch.arange(len(labels_C), device=labels_C.device) * vocab_size + labels_C
    if targets is None:
        return label_C, None, None
    head_E = targets.position_K[targets.row_E] * vocab_size + targets.token_ids_E
    if targets.draws is None:
        return label_C, head_E, None
    draws = targets.draws
    return label_C, head_E, targets.position_K[draws.row_S] * vocab_size + draws.token_ids_S


class TorchPasses(Passes):
    """PyTorch operations in place on one fp32 (fp64) buffer, a second one when T != 1.

    Five passes over [C, V] at T = 1 after the projection, as many as the cross-entropy alone needs, and two
    copies where the compute dtype is a half.
    """

    def __init__(self, head: Head, num_rows: int, work: Work) -> None:
        self.head, self.beta = head, work.beta
        weight_VD = head.weight_VD
        arithmetic = arithmetic_dtype(weight_VD.dtype)

        def buffer(dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(num_rows, len(weight_VD), dtype=dtype, device=weight_VD.device)

        self._logits = buffer(arithmetic)
        self._projection = self._logits if weight_VD.dtype == arithmetic else buffer(weight_VD.dtype)
        self._tanh = buffer(arithmetic) if head.logit_softcap is not None else None
        self._scratch = buffer(arithmetic) if work.beta != 1.0 else None

    @staticmethod
    def num_buffers(head: Head, work: Work) -> float:
        """A half-precision projection is counted as a whole one."""
        half = head.weight_VD.dtype.itemsize < 4
        return 1 + half + (work.beta != 1.0) + (head.logit_softcap is not None)

    def read(
        self, hidden_CD: torch.Tensor, labels_C: torch.Tensor, targets: TeacherTargets | None
    ) -> Readings:
        """Subtract the maximum, exponentiate in place, set the head to zero, sum."""
        num_rows, vocab_size = len(labels_C), self._logits.shape[1]
        self.logits_CV, self.projection_CV = self._logits[:num_rows], self._projection[:num_rows]
        torch.mm(hidden_CD, self.head.weight_VD.t(), out=self.projection_CV)
        if self._projection is not self._logits:
            self.logits_CV.copy_(self.projection_CV)
        self._transform()

        logits_CV = self.logits_CV
        self.label_C, self.head_E, self.draw_S = flat_entries(labels_C, targets, vocab_size)
        shifted_CV = logits_CV.sub_(logits_CV.amax(dim=1, keepdim=True))
        label_C = shifted_CV.view(-1)[self.label_C]
        self.tempered_CV = shifted_CV
        if self.head_E is None:
            sum_C = shifted_CV.exp_().sum(dim=1)
            return Readings(label_C, sum_C, sum_C)
        if self._scratch is not None:
            self.tempered_CV = torch.mul(shifted_CV, self.beta, out=self._scratch[:num_rows])
        tempered = self.tempered_CV.view(-1)
        head_E = tempered[self.head_E]
        draw_S = None if self.draw_S is None else tempered[self.draw_S]
        self.tempered_CV.exp_()
        tempered.index_fill_(0, self.head_E, 0.0)
        self.tail_sum_C = self.tempered_CV.sum(dim=1)
        # The softmax at T = 1, for the cross-entropy: the one just computed, or a second one.
        sum_one_C = None if self._scratch is None else shifted_CV.exp_().sum(dim=1)
        return Readings(label_C, sum_one_C, self.tail_sum_C, head_E, draw_S)

    def _transform(self) -> None:
        """Bias, scale and softcap in place; keeps tanh(scale x / cap) for the chain rule."""
        head, logits_CV = self.head, self.logits_CV
        if head.bias_V is not None:
            logits_CV.add_(head.bias_V)
        if self._tanh is None:
            if head.logit_scale != 1.0:
                logits_CV.mul_(head.logit_scale)
            return
        assert head.logit_softcap is not None
        tanh_CV = self._tanh[: len(logits_CV)]
        torch.mul(logits_CV, head.logit_scale / head.logit_softcap, out=tanh_CV).tanh_()
        torch.mul(tanh_CV, head.logit_softcap, out=logits_CV)

    def tail_statistics(self, tables: FeatureTables, at_one: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """One matrix product; the projection's buffer takes a half-precision operand."""
        if not at_one or self.beta == 1.0:
            return tables.statistics(self.tempered_CV, self.tail_sum_C, self.projection_CV)
        assert self.head_E is not None
        flat = self.logits_CV.view(-1)
        heads_E = flat[self.head_E]
        flat.index_fill_(0, self.head_E, 0.0)  # for the tail alone; put back below
        found = tables.statistics(self.logits_CV, self.logits_CV.sum(dim=1), self.projection_CV)
        flat.index_copy_(0, self.head_E, heads_E)
        return found

    def write(self, gradient: RowGradient, tables: FeatureTables | None) -> torch.Tensor:
        """Multiply each row by its number, then write and add what single tokens have."""
        logits_CV, tempered_CV = self.logits_CV, self.tempered_CV
        flat = logits_CV.view(-1)
        tail_C, share = gradient.tail_C, tempered_CV is logits_CV
        factor_C = gradient.ce_C
        if tail_C is not None and share:
            factor_C = factor_C + tail_C
        if gradient.slope_CF is not None and tables is not None:
            assert tail_C is not None
            tables.reweight(tempered_CV, gradient.slope_CF, factor_C if share else tail_C)
            if not share:
                logits_CV.mul_(factor_C[:, None]).add_(tempered_CV)
        else:
            logits_CV.mul_(factor_C[:, None])
            if tail_C is not None and not share:
                logits_CV.addcmul_(tempered_CV, tail_C[:, None])
        if self.head_E is not None:
            assert gradient.head_E is not None and gradient.probs_E is not None
            if share:
                ce_weight_E = gradient.ce_weight_C[self.head_E // logits_CV.shape[1]]
                flat.index_copy_(0, self.head_E, ce_weight_E * gradient.probs_E + gradient.head_E)
            else:
                flat.index_add_(0, self.head_E, gradient.head_E)
        if self.draw_S is not None:
            assert gradient.draw_S is not None
            flat.index_add_(0, self.draw_S, gradient.draw_S)
        flat.index_add_(0, self.label_C, -gradient.ce_weight_C)
        if self._tanh is not None:  # d cap tanh(x / cap) / dx = 1 - tanh^2
            logits_CV.addcmul_(logits_CV, self._tanh[: len(logits_CV)].square_(), value=-1.0)
        if self._projection is not self._logits:
            self.projection_CV.copy_(logits_CV)
        return self.projection_CV

    def bias_gradient(self) -> torch.Tensor:
        """From the gradient before it was rounded to the compute dtype."""
        return self.logits_CV.sum(dim=0)
