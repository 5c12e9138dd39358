"""The work on whole rows of logits by two Triton kernels, for CUDA: `TorchLogits` with less memory traffic.

    row_sums       reads a row once: its maximum, and the sums of exp(z) and exp(beta z), online
    row_gradient   reads it again and writes the gradient over it: (one exp(z) + tempered exp(beta z)) dz/dx

Both compute in fp32, whatever the dtype in memory, and apply bias, scale and softcap on the way in, so no
fp32 tensor of size [C, V] exists. A logit of -inf is hidden: it counts in no sum and gets a zero. The kept
tokens are set to -inf before the first kernel, and remembered: the tail's sum is then a sum of positive terms
over exactly the tail, and the row's maximum starts at the largest kept entry. What single tokens have (label,
kept entries, draws) is computed in fp32 by PyTorch and written over the result, so that a bf16 gradient is
rounded once, also where it is 0.999 - 1.

Cost per logit of two bytes: 6 bytes of traffic. Threads move 16 bytes at a time where 16 divides V, 2
elsewhere. No atomics and no tuning at run time: the same inputs give the same bits.

C: rows of the chunk, V: vocabulary, E: kept entries, S: tail draws, X: any single tokens, J: tokens of a
block.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs

from trainer.loss.logits import ChunkLogits, LogitGradient, Projection, SoftmaxTerms, flat_indices
from trainer.loss.targets import TeacherTargets, segment_sum
from trainer.loss.token_weights import NO_EXTRAS, RowExtras

INTERPRETED: bool = knobs.runtime.interpret
"""TRITON_INTERPRET=1: the kernels run on a CPU, for tests."""
SUM_BLOCK = 4096
"""Tokens that a row_sums program holds at a time; one program per row."""
GRADIENT_BLOCK = 2048
"""Tokens of a row_gradient program."""
NUM_WARPS = 8


@triton.jit
def _logits(raw, bias_ptr, columns_J, inside_J, scale, cap, BIAS: tl.constexpr, CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """(z, dz/dx) of a block; x is the projection plus bias, times scale. -inf stays -inf."""
    x = raw.to(tl.float32)
    hidden = x == -float("inf")
    if BIAS:
        x += tl.load(bias_ptr + columns_J, mask=inside_J, other=0.0)
    x *= scale
    slope = tl.full(x.shape, 1.0, tl.float32)
    if CAP:
        decay = tl.exp(-2.0 * tl.abs(x / cap))  # at most 1: tanh without overflow
        tanh = (1.0 - decay) / (1.0 + decay)
        slope = 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
        x = tl.where(x < 0, -tanh, tanh) * cap
    return tl.where(hidden, -float("inf"), x), slope


@triton.jit
def row_sums(  # type: ignore[no-untyped-def]
    raw_ptr, bias_ptr, max_ptr, one_ptr, tempered_ptr, num_tokens, stride, scale, cap, beta,
    BIAS: tl.constexpr, CAP: tl.constexpr, TEMPERED: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Maximum of a row (from what `max_ptr` holds on), sums of exp(z - max) and of exp(beta (z - max))."""
    row = tl.program_id(0)
    row_ptr = raw_ptr + row.to(tl.int64) * stride  # C V may exceed 32 bits
    largest = tl.load(max_ptr + row)
    one = 0.0
    tempered = 0.0
    for start in range(0, num_tokens, J):
        columns_J = start + tl.arange(0, J)
        inside_J = columns_J < num_tokens
        raw = tl.load(row_ptr + columns_J, mask=inside_J, other=-float("inf"))
        z, _ = _logits(raw, bias_ptr, columns_J, inside_J, scale, cap, BIAS, CAP)
        new = tl.maximum(largest, tl.max(z))
        one = one * tl.exp(largest - new) + tl.sum(tl.exp(z - new))
        if TEMPERED:
            tempered = tempered * tl.exp(beta * (largest - new)) + tl.sum(tl.exp(beta * (z - new)))
        largest = new
    tl.store(max_ptr + row, largest)
    tl.store(one_ptr + row, one)
    if TEMPERED:
        tl.store(tempered_ptr + row, tempered)


@triton.jit
def row_gradient(  # type: ignore[no-untyped-def]
    raw_ptr, bias_ptr, max_ptr, one_ptr, tempered_ptr, num_tokens, stride, scale, cap, beta,
    BIAS: tl.constexpr, CAP: tl.constexpr, ONE: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """In place: (one exp(z - max) + tempered exp(beta (z - max))) dz/dx, the first part where ONE says so."""
    row = tl.program_id(0)
    columns_J = tl.program_id(1) * J + tl.arange(0, J)
    inside_J = columns_J < num_tokens
    row_ptr = raw_ptr + row.to(tl.int64) * stride
    raw = tl.load(row_ptr + columns_J, mask=inside_J, other=-float("inf"))
    z, slope = _logits(raw, bias_ptr, columns_J, inside_J, scale, cap, BIAS, CAP)
    z -= tl.load(max_ptr + row)
    out = tl.exp(beta * z) * tl.load(tempered_ptr + row)
    if ONE:
        out += tl.exp(z) * tl.load(one_ptr + row)
    if CAP:
        out *= slope
    tl.store(row_ptr + columns_J, out.to(raw_ptr.dtype.element_ty), mask=inside_J)


class TritonLogits(ChunkLogits):
    """One buffer, of the compute dtype: the projection becomes the gradient where it lies."""

    def __init__(
        self, projection: Projection, num_rows: int, beta: float, extras: RowExtras = NO_EXTRAS
    ) -> None:
        assert extras == NO_EXTRAS, "refused by CrossEntropy.of"
        self.projection, self.beta = projection, beta
        weight_VD = projection.weight_VD
        shape = num_rows, len(weight_VD)
        self._projected = torch.empty(shape, dtype=weight_VD.dtype, device=weight_VD.device)

    @staticmethod
    def num_buffers(projection: Projection, beta: float) -> float:
        """One of the compute dtype."""
        return projection.weight_VD.dtype.itemsize / 4

    @property
    def _transform(self) -> dict[str, Any]:
        """Arguments of both kernels."""
        projection = self.projection
        cap = float(projection.logit_softcap or 0.0)
        flags = {"BIAS": projection.bias_V is not None, "CAP": projection.logit_softcap is not None}
        return {"scale": float(projection.logit_scale), "cap": cap, "num_warps": NUM_WARPS, **flags}

    def softmax_terms(
        self, hidden_CD: torch.Tensor, labels_C: torch.Tensor, targets: TeacherTargets | None
    ) -> SoftmaxTerms:
        """Gather single tokens, hide the kept ones, sum the rest in one kernel."""
        self.projected_CV = self._projected[: len(labels_C)]
        torch.mm(hidden_CD, self.projection.weight_VD.t(), out=self.projected_CV)
        num_rows, num_tokens = self.projected_CV.shape
        if self.read is not None:
            self.read(num_rows, self._logits_of)
        self.at_label_C, self.at_kept_E, self.at_drawn_S = flat_indices(labels_C, targets, num_tokens)
        label_C = self._logits_at(self.at_label_C)
        self.max_C = label_C.new_full((num_rows,), -torch.inf)
        kept_E = drawn_S = None
        if self.at_kept_E is not None:
            kept_E = self._logits_at(self.at_kept_E)
            drawn_S = None if self.at_drawn_S is None else self._logits_at(self.at_drawn_S)
            self.max_C.scatter_reduce_(0, self.at_kept_E // num_tokens, kept_E, "amax")
            self.projected_CV.view(-1).index_fill_(0, self.at_kept_E, -torch.inf)
        tempered = targets is not None and self.beta != 1.0
        self.one_C = torch.empty_like(self.max_C)
        self.tempered_C = torch.empty_like(self.max_C) if tempered else self.one_C
        with torch.cuda.device_of(self.projected_CV):
            row_sums[(num_rows,)](
                self.projected_CV, self.projection.bias_V, self.max_C, self.one_C, self.tempered_C,
                num_tokens, num_tokens, beta=self.beta, TEMPERED=tempered, J=SUM_BLOCK, **self._transform,
            )  # fmt: skip
        # Unlike the terms that are returned, these stay at T = 1.
        self.label_C = label_C - self.max_C
        if targets is None or self.at_kept_E is None or kept_E is None:
            return SoftmaxTerms(self.label_C, self.one_C, self.one_C)
        self.kept_E = kept_E - self.max_C[self.at_kept_E // num_tokens]
        if self.at_drawn_S is not None and drawn_S is not None:
            self.drawn_S = drawn_S - self.max_C[self.at_drawn_S // num_tokens]
            drawn_S = self.beta * self.drawn_S
        sum_C = None
        if tempered:
            kept_P = segment_sum(self.kept_E.exp(), targets.offsets_P1)
            sum_C = self.one_C.index_add(0, targets.place_P, kept_P)
        return SoftmaxTerms(self.label_C, sum_C, self.tempered_C, self.beta * self.kept_E, drawn_S)

    def _logits_of(self, rows: slice) -> torch.Tensor:
        """z of a slice of rows, fp32."""
        x = self.projected_CV[rows].float()
        if self.projection.bias_V is not None:
            x = x + self.projection.bias_V
        return self._capped(x)

    def _logits_at(self, at_X: torch.Tensor) -> torch.Tensor:
        """z of single tokens, fp32."""
        x = self.projected_CV.view(-1)[at_X].float()
        if self.projection.bias_V is not None:
            x = x + self.projection.bias_V[at_X % self.projected_CV.shape[1]]
        return self._capped(x)

    def _capped(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.projection.logit_scale
        cap = self.projection.logit_softcap
        return x if cap is None else cap * torch.tanh(x / cap)

    def gradient(self, gradient: LogitGradient) -> torch.Tensor:
        """The whole chunk by the kernel, as if all were tail, then single tokens over it."""
        share = self.tempered_C is self.one_C  # at T = 1, or without targets: one exponential serves both
        one_C = None if share else gradient.ce_C
        tail_C = gradient.tail_C
        if tail_C is None or share:
            tail_C = gradient.ce_C if tail_C is None else gradient.ce_C + tail_C
        num_rows, num_tokens = self.projected_CV.shape
        grid = num_rows, triton.cdiv(num_tokens, GRADIENT_BLOCK)
        with torch.cuda.device_of(self.projected_CV):
            row_gradient[grid](
                self.projected_CV, self.projection.bias_V, self.max_C, one_C, tail_C,
                num_tokens, num_tokens, beta=1.0 if share else self.beta, ONE=one_C is not None,
                J=GRADIENT_BLOCK, **self._transform,
            )  # fmt: skip
        # Later ones win: a label may be drawn, or be kept; a draw is never kept.
        label_C = self._tail_at(self.at_label_C, self.label_C, tail_C, one_C)
        self._put(self.at_label_C, self.label_C, label_C, gradient)
        if self.at_drawn_S is not None and gradient.drawn_S is not None:
            drawn_S = self._tail_at(self.at_drawn_S, self.drawn_S, tail_C, one_C)
            drawn_S = drawn_S + summed_by_token(self.at_drawn_S, gradient.drawn_S)
            self._put(self.at_drawn_S, self.drawn_S, drawn_S, gradient)
        if self.at_kept_E is not None and gradient.kept_E is not None:
            ce_E = gradient.ce_C[self.at_kept_E // num_tokens] * self.kept_E.exp()
            self._put(self.at_kept_E, self.kept_E, ce_E + gradient.kept_E, gradient)
        return self.projected_CV

    def _tail_at(
        self, at_X: torch.Tensor, z_X: torch.Tensor, tail_C: torch.Tensor, one_C: torch.Tensor | None
    ) -> torch.Tensor:
        """What the kernel has computed for single tokens of the tail, before it was rounded."""
        row_X = at_X // self.projected_CV.shape[1]
        if one_C is None:
            return tail_C[row_X] * z_X.exp()
        return tail_C[row_X] * (self.beta * z_X).exp() + one_C[row_X] * z_X.exp()

    def _put(
        self, at_X: torch.Tensor, z_X: torch.Tensor, value_X: torch.Tensor, gradient: LogitGradient
    ) -> None:
        """Less the label's share, times the softcap's derivative, rounded once."""
        row_X = at_X // self.projected_CV.shape[1]
        value_X = value_X - gradient.label_C[row_X] * (at_X == self.at_label_C[row_X])
        if self.projection.logit_softcap is not None:
            tanh_X = (z_X + self.max_C[row_X]) / self.projection.logit_softcap
            value_X = value_X * (1.0 - tanh_X.square())
        flat = self.projected_CV.view(-1)
        flat.index_copy_(0, at_X, value_X.to(flat.dtype))

    def bias_gradient(self) -> torch.Tensor:
        """From the rounded gradient, summed in fp32."""
        return self.projected_CV.sum(dim=0, dtype=torch.float32)


def try_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """Compile and run both kernels on two rows; None if they compute what they should, else what they did."""
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, -1.0]], device=device)
    raw = logits.to(dtype, copy=True)
    maxima, sums = torch.full((2,), -torch.inf, device=device), torch.empty(2, device=device)
    fixed: dict[str, Any] = {"BIAS": False, "CAP": False, "scale": 1.0, "cap": 0.0, "beta": 1.0}
    with torch.cuda.device_of(raw):
        row_sums[(2,)](raw, None, maxima, sums, sums, 3, 3, TEMPERED=False, J=16, **fixed)
        row_gradient[(2, 1)](raw, None, maxima, None, 1.0 / sums, 3, 3, ONE=False, J=16, **fixed)
    error = float((raw.float() - logits.softmax(1)).abs().max())
    return None if error < 1e-2 else f"a softmax of three tokens is off by {error:.2g}"


def summed_by_token(at_S: torch.Tensor, value_S: torch.Tensor) -> torch.Tensor:
    """For each draw the sum over all draws of its token, in a fixed order, without waiting for the device."""
    sorted_S, order_S = at_S.sort(stable=True)
    first_S = torch.searchsorted(sorted_S, sorted_S)
    last_S = torch.searchsorted(sorted_S, sorted_S, right=True)
    # Segment i runs to where the next draw's token begins: all of a token's draws are in its last segment.
    offsets = torch.cat([first_S, first_S.new_full((1,), len(sorted_S))])
    total_S = segment_sum(value_S[order_S], offsets)[last_S - 1]
    return torch.empty_like(value_S).index_copy_(0, order_S, total_S)
