"""The logits of one chunk: projected, read, and turned into their own gradient in the same buffer.

trainer/loss/kl.py knows what a row's gradient is made of; everything of size [C, V] that it takes happens
behind two steps of `ChunkLogits`, in this order:

    softmax_terms   logits from the projection; sums of their exponentials, values of single tokens
    gradient        the exponentials become the gradient

`TorchLogits` does them with some ten elementwise operations on fp32 (fp64) buffers, on any device;
trainer/loss/triton_passes.py with two kernels on the projection itself.

C: rows of the chunk, V: vocabulary without padding, D: hidden size, P: positions with teacher targets,
E: their kept entries, S: their tail draws.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from trainer.loss.targets import TeacherTargets


@dataclass(frozen=True)
class Projection:
    """The output head as a map from hidden state to logits: z = softcap(logit_scale * (W h + b))."""

    weight_VD: torch.Tensor
    """Compute dtype, padding cut off."""
    bias_V: torch.Tensor | None
    """The arithmetic's dtype."""
    logit_scale: float
    logit_softcap: float | None


@dataclass(frozen=True)
class SoftmaxTerms:
    """What cross-entropy and KL are made of, taken from a chunk. All z are less their row's maximum."""

    label_C: torch.Tensor
    """z of the label (of any token where there is none)."""
    sum_C: torch.Tensor | None
    """Sum of exp(z); None at T = 1 with targets, where the other sums tell it."""
    tail_sum_C: torch.Tensor
    """Sum of exp(beta z) over all but the kept tokens, a sum of positive terms."""
    kept_E: torch.Tensor | None = None
    """beta z of the kept tokens."""
    drawn_S: torch.Tensor | None = None
    """beta z of the drawn tokens."""


@dataclass(frozen=True)
class LogitGradient:
    """The gradient with respect to the logits: numbers per row, and what single tokens have instead."""

    ce_C: torch.Tensor
    """Times exp(z) on every token,"""
    ce_weight_C: torch.Tensor
    """less this at the label."""
    tail_C: torch.Tensor | None = None
    """Times exp(beta z) on the tail."""
    probs_E: torch.Tensor | None = None
    """q of the kept tokens,"""
    kept_E: torch.Tensor | None = None
    """and what the KL adds there."""
    drawn_S: torch.Tensor | None = None
    """What the tail draws add at their tokens."""


class ChunkLogits(Protocol):
    """Buffers for the logits of one chunk at a time, and the two steps."""

    read: Callable[[int, Callable[[slice], torch.Tensor]], None] | None = None
    """Called by `softmax_terms` with the number of rows and with what gives the logits [R, V] of a slice of
    them (up to a constant per row), while they exist."""

    def __init__(self, projection: Projection, num_rows: int, beta: float) -> None:
        """Buffers for chunks of up to `num_rows` rows; `beta` is 1 / T of the targets, 1 without any."""

    @staticmethod
    def num_buffers(projection: Projection, beta: float) -> float:
        """What all buffers together take, in buffers of four bytes per logit."""

    def softmax_terms(
        self, hidden_CD: torch.Tensor, labels_C: torch.Tensor, targets: TeacherTargets | None
    ) -> SoftmaxTerms:
        """Project a chunk. `labels_C` are tokens throughout; without `targets` the tail is all tokens."""

    def gradient(self, gradient: LogitGradient) -> torch.Tensor:
        """[C, V] in the compute dtype: the gradient with respect to W h + b, before the logit scale."""

    def bias_gradient(self) -> torch.Tensor:
        """[V]: its sum over the rows."""


def arithmetic_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """fp32 for everything but fp64."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def flat_indices(
    labels_C: torch.Tensor, targets: TeacherTargets | None, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Indices into the flattened logits, int64: of labels [C], kept entries [E] and draws [S]."""
    label_C = torch.arange(len(labels_C), device=labels_C.device) * vocab_size + labels_C
    if targets is None:
        return label_C, None, None
    kept_E = targets.place_P[targets.position_E] * vocab_size + targets.token_ids_E
    if targets.draws is None:
        return label_C, kept_E, None
    draws = targets.draws
    return label_C, kept_E, targets.place_P[draws.position_S] * vocab_size + draws.token_ids_S


class TorchLogits(ChunkLogits):
    """PyTorch operations in place on one fp32 (fp64) buffer, a second one when T != 1.

    Five passes over [C, V] at T = 1 after the projection, as many as the cross-entropy alone needs, and two
    copies where the compute dtype is a half.
    """

    def __init__(self, projection: Projection, num_rows: int, beta: float) -> None:
        self.projection, self.beta = projection, beta
        weight_VD = projection.weight_VD
        arithmetic = arithmetic_dtype(weight_VD.dtype)

        def buffer(dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(num_rows, len(weight_VD), dtype=dtype, device=weight_VD.device)

        self._logits = buffer(arithmetic)
        self._projected = self._logits if weight_VD.dtype == arithmetic else buffer(weight_VD.dtype)
        self._tanh = buffer(arithmetic) if projection.logit_softcap is not None else None
        self._scratch = buffer(arithmetic) if beta != 1.0 else None

    @staticmethod
    def num_buffers(projection: Projection, beta: float) -> float:
        """A half-precision projection is counted as a whole one."""
        half = projection.weight_VD.dtype.itemsize < 4
        return 1 + half + (beta != 1.0) + (projection.logit_softcap is not None)

    def softmax_terms(
        self, hidden_CD: torch.Tensor, labels_C: torch.Tensor, targets: TeacherTargets | None
    ) -> SoftmaxTerms:
        """Subtract the maximum, exponentiate in place, set the kept tokens to zero, sum."""
        num_rows, vocab_size = len(labels_C), self._logits.shape[1]
        self.logits_CV, self.projected_CV = self._logits[:num_rows], self._projected[:num_rows]
        torch.mm(hidden_CD, self.projection.weight_VD.t(), out=self.projected_CV)
        if self._projected is not self._logits:
            self.logits_CV.copy_(self.projected_CV)
        self._transform()

        logits_CV = self.logits_CV
        self.at_label_C, self.at_kept_E, self.at_drawn_S = flat_indices(labels_C, targets, vocab_size)
        shifted_CV = logits_CV.sub_(logits_CV.amax(dim=1, keepdim=True))
        if self.read is not None:
            self.read(num_rows, shifted_CV.__getitem__)
        label_C = shifted_CV.view(-1)[self.at_label_C]
        self.tempered_CV = shifted_CV
        if self.at_kept_E is None:
            sum_C = shifted_CV.exp_().sum(dim=1)
            return SoftmaxTerms(label_C, sum_C, sum_C)
        if self._scratch is not None:
            self.tempered_CV = torch.mul(shifted_CV, self.beta, out=self._scratch[:num_rows])
        tempered = self.tempered_CV.view(-1)
        kept_E = tempered[self.at_kept_E]
        drawn_S = None if self.at_drawn_S is None else tempered[self.at_drawn_S]
        self.tempered_CV.exp_()
        tempered.index_fill_(0, self.at_kept_E, 0.0)
        tail_sum_C = self.tempered_CV.sum(dim=1)
        # The softmax at T = 1, for the cross-entropy: the one just computed, or a second one.
        sum_one_C = None if self._scratch is None else shifted_CV.exp_().sum(dim=1)
        return SoftmaxTerms(label_C, sum_one_C, tail_sum_C, kept_E, drawn_S)

    def _transform(self) -> None:
        """Bias, scale and softcap in place; keeps tanh(scale x / cap) for the chain rule."""
        projection, logits_CV = self.projection, self.logits_CV
        if projection.bias_V is not None:
            logits_CV.add_(projection.bias_V)
        if self._tanh is None:
            if projection.logit_scale != 1.0:
                logits_CV.mul_(projection.logit_scale)
            return
        assert projection.logit_softcap is not None
        tanh_CV = self._tanh[: len(logits_CV)]
        torch.mul(logits_CV, projection.logit_scale / projection.logit_softcap, out=tanh_CV).tanh_()
        torch.mul(tanh_CV, projection.logit_softcap, out=logits_CV)

    def gradient(self, gradient: LogitGradient) -> torch.Tensor:
        """Multiply each row by its number, then write and add what single tokens have."""
        logits_CV, tempered_CV = self.logits_CV, self.tempered_CV
        flat = logits_CV.view(-1)
        tail_C, share = gradient.tail_C, tempered_CV is logits_CV
        factor_C = gradient.ce_C if tail_C is None or not share else gradient.ce_C + tail_C
        logits_CV.mul_(factor_C[:, None])
        if tail_C is not None and not share:
            logits_CV.addcmul_(tempered_CV, tail_C[:, None])
        if self.at_kept_E is not None:
            assert gradient.kept_E is not None and gradient.probs_E is not None
            if share:
                ce_weight_E = gradient.ce_weight_C[self.at_kept_E // logits_CV.shape[1]]
                flat.index_copy_(0, self.at_kept_E, ce_weight_E * gradient.probs_E + gradient.kept_E)
            else:
                flat.index_add_(0, self.at_kept_E, gradient.kept_E)
        if self.at_drawn_S is not None:
            assert gradient.drawn_S is not None
            flat.index_add_(0, self.at_drawn_S, gradient.drawn_S)
        flat.index_add_(0, self.at_label_C, -gradient.ce_weight_C)
        if self._tanh is not None:  # d cap tanh(x / cap) / dx = 1 - tanh^2
            logits_CV.addcmul_(logits_CV, self._tanh[: len(logits_CV)].square_(), value=-1.0)
        if self._projected is not self._logits:
            self.projected_CV.copy_(logits_CV)
        return self.projected_CV

    def bias_gradient(self) -> torch.Tensor:
        """From the gradient before it was rounded to the compute dtype."""
        return self.logits_CV.sum(dim=0)
