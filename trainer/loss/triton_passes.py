"""The work on whole rows of logits by two Triton kernels, for CUDA: `TorchPasses` with less memory traffic.

The kernels (loss_triton_kernels.py) read the projection in its own dtype and write the gradient over it,

    g_j = (ce exp(z_j) + exp(beta z_j) (tail + slope . u_j)) dz/dx,

so no fp32 tensor of size [C, V] exists. With tail moments they also write the normalised exponentials of the
tail, the operand of a matrix product, into a second buffer.

The head's tokens are set to -inf in the projection before the first kernel, and remembered: the tail's sum is
then a sum of positive terms over exactly the tail, and the row's maximum starts at the largest head entry.
What single tokens have (label, head, draws) is computed in fp32 by PyTorch and written over the result, so
that a bf16 gradient is rounded once, also where it is 0.999 - 1.

Cost per logit of two bytes: 6 bytes of traffic, with moments 4 and the product's 2 more, twice those at
T != 1. Threads move 16 bytes at a time where 16 divides V, 2 elsewhere. No atomics and no tuning at run time:
the same inputs give the same bits.

C: rows of the chunk, V: vocabulary, E: head entries, S: tail draws, F: token features, X: any single tokens.
"""

from typing import Any

import torch
import triton
from triton import knobs

from trainer.loss.logits import Head, Passes, Readings, RowGradient, Work, flat_entries
from trainer.loss.loss_tail import FeatureTables
from trainer.loss.loss_triton_kernels import row_map, row_sums
from trainer.loss.targets import TeacherTargets, segment_sum

INTERPRETED: bool = knobs.runtime.interpret
"""TRITON_INTERPRET=1: the kernels run on a CPU, for tests."""
SUM_BLOCK = 4096
"""Tokens a row-sum program holds at a time; one program per row."""
MAP_BLOCK = (1, 2048)
"""Rows and tokens of a row-map program."""
SLOPE_BLOCK = (16, 128)
"""The same with moments: several rows share the features they read; 16 is the least a product takes."""
NUM_WARPS = 8


class TritonPasses(Passes):
    """The projection's buffer becomes the gradient's; a second one of the same dtype for tail moments."""

    def __init__(self, head: Head, num_rows: int, work: Work) -> None:
        self.head, self.beta = head, work.beta
        weight_VD = head.weight_VD
        shape = num_rows, len(weight_VD)
        self._projection = torch.empty(shape, dtype=weight_VD.dtype, device=weight_VD.device)
        self._weights = torch.empty_like(self._projection) if work.moments else None

    @staticmethod
    def num_buffers(head: Head, work: Work) -> float:
        """One, or two with moments, of the compute dtype."""
        return (1 + work.moments) * head.weight_VD.dtype.itemsize / 4

    @property
    def _transform(self) -> dict[str, Any]:
        """Arguments of both kernels."""
        head = self.head
        cap = float(head.logit_softcap or 0.0)
        flags = {"BIAS": head.bias_V is not None, "CAP": head.logit_softcap is not None}
        return {"scale": float(head.logit_scale), "cap": cap, "num_warps": NUM_WARPS, **flags}

    def read(
        self, hidden_CD: torch.Tensor, labels_C: torch.Tensor, targets: TeacherTargets | None
    ) -> Readings:
        """Gather single tokens, hide the head, sum the rest in one kernel."""
        self.projection_CV = self._projection[: len(labels_C)]
        torch.mm(hidden_CD, self.head.weight_VD.t(), out=self.projection_CV)
        num_rows, num_tokens = self.projection_CV.shape
        self.label_C, self.head_E, self.draw_S = flat_entries(labels_C, targets, num_tokens)
        label_C = self._logits_at(self.label_C)
        self.max_C = label_C.new_full((num_rows,), -torch.inf)
        head_E = draw_S = None
        if self.head_E is not None:
            head_E = self._logits_at(self.head_E)
            draw_S = None if self.draw_S is None else self._logits_at(self.draw_S)
            self.max_C.scatter_reduce_(0, self.head_E // num_tokens, head_E, "amax")
            self.projection_CV.view(-1).index_fill_(0, self.head_E, -torch.inf)
        tempered = targets is not None and self.beta != 1.0
        self.one_C = torch.empty_like(self.max_C)
        self.tempered_C = torch.empty_like(self.max_C) if tempered else self.one_C
        with torch.cuda.device_of(self.projection_CV):
            row_sums[(num_rows,)](
                self.projection_CV, self.head.bias_V, self.max_C, self.one_C, self.tempered_C,
                num_tokens, num_tokens, beta=self.beta, TEMPERED=tempered, B=SUM_BLOCK, **self._transform,
            )  # fmt: skip
        # Unlike the readings, these stay at T = 1.
        self.shifted_label_C = label_C - self.max_C
        if targets is None or self.head_E is None or head_E is None:
            return Readings(self.shifted_label_C, self.one_C, self.one_C)
        self.shifted_E = head_E - self.max_C[self.head_E // num_tokens]
        if self.draw_S is not None and draw_S is not None:
            self.shifted_S = draw_S - self.max_C[self.draw_S // num_tokens]
            draw_S = self.beta * self.shifted_S
        sum_C = None
        if tempered:
            head_K = segment_sum(self.shifted_E.exp(), targets.offsets_K1)
            sum_C = self.one_C.index_add(0, targets.position_K, head_K)
        return Readings(self.shifted_label_C, sum_C, self.tempered_C, self.beta * self.shifted_E, draw_S)

    def _logits_at(self, flat: torch.Tensor) -> torch.Tensor:
        """z of single tokens, fp32."""
        head, x = self.head, self.projection_CV.view(-1)[flat].float()
        if head.bias_V is not None:
            x = x + head.bias_V[flat % self.projection_CV.shape[1]]
        x = x * head.logit_scale
        return x if head.logit_softcap is None else head.logit_softcap * torch.tanh(x / head.logit_softcap)

    def _map(
        self,
        out_CV: torch.Tensor,
        beta: float,
        tempered_C: torch.Tensor,
        one_C: torch.Tensor | None = None,
        slope_CF: torch.Tensor | None = None,
        tables: FeatureTables | None = None,
        *,
        derivative: bool,
    ) -> None:
        num_rows, num_tokens = out_CV.shape
        num_features = 0 if slope_CF is None else slope_CF.shape[1]
        block_R, block_B = SLOPE_BLOCK if num_features else MAP_BLOCK
        grid = (triton.cdiv(num_rows, block_R), triton.cdiv(num_tokens, block_B))
        derivative = derivative and self.head.logit_softcap is not None
        features_FV = None if tables is None else tables.values_FV
        with torch.cuda.device_of(out_CV):
            row_map[grid](
                self.projection_CV, self.head.bias_V, self.max_C, one_C, tempered_C, slope_CF, features_FV,
                out_CV, num_rows, num_tokens, num_features, num_tokens, beta=beta, DERIVATIVE=derivative,
                ONE=one_C is not None, SLOPES=num_features > 0, R=block_R, B=block_B, **self._transform,
            )  # fmt: skip

    def tail_statistics(self, tables: FeatureTables, at_one: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The tail's exponentials, normalised and in the compute dtype, times the features."""
        assert self._weights is not None
        weights_CV = self._weights[: len(self.max_C)]
        sum_C = self.one_C if at_one else self.tempered_C
        scale_C = 1.0 / sum_C.clamp_min(torch.finfo(sum_C.dtype).tiny)
        self._map(weights_CV, 1.0 if at_one else self.beta, scale_C, derivative=False)
        return tables.normalised_statistics(weights_CV)

    def write(self, gradient: RowGradient, tables: FeatureTables | None) -> torch.Tensor:
        """The whole chunk by the kernel, as if all were tail, then single tokens over it."""
        share = self.tempered_C is self.one_C  # at T = 1, or without targets: one exponential serves both
        one_C = None if share else gradient.ce_C
        tail_C = gradient.tail_C
        if tail_C is None or share:
            tail_C = gradient.ce_C if tail_C is None else gradient.ce_C + tail_C
        flat, beta = self.projection_CV.view(-1), 1.0 if share else self.beta
        self._map(self.projection_CV, beta, tail_C, one_C, gradient.slope_CF, tables, derivative=True)
        # Later ones win: a label may be drawn, or be in the head; a draw is never in the head.
        single_C = self._tail_at(self.label_C, self.shifted_label_C, tail_C, one_C, gradient, tables)
        self._put(flat, self.label_C, self.shifted_label_C, single_C, gradient)
        if self.draw_S is not None and gradient.draw_S is not None:
            single_S = self._tail_at(self.draw_S, self.shifted_S, tail_C, one_C, gradient, tables)
            single_S = single_S + summed_by_token(self.draw_S, gradient.draw_S)
            self._put(flat, self.draw_S, self.shifted_S, single_S, gradient)
        if self.head_E is not None and gradient.head_E is not None:
            ce_E = gradient.ce_C[self.head_E // self.projection_CV.shape[1]] * self.shifted_E.exp()
            self._put(flat, self.head_E, self.shifted_E, ce_E + gradient.head_E, gradient)
        return self.projection_CV

    def _tail_at(
        self,
        flat_X: torch.Tensor,
        shifted_X: torch.Tensor,
        tail_C: torch.Tensor,
        one_C: torch.Tensor | None,
        gradient: RowGradient,
        tables: FeatureTables | None,
    ) -> torch.Tensor:
        """What the kernel has computed for single tokens of the tail, before it was rounded."""
        num_tokens = self.projection_CV.shape[1]
        row_X = flat_X // num_tokens
        factor_X = tail_C[row_X]
        if gradient.slope_CF is not None and tables is not None:
            features_XF = tables.values_FV[:, flat_X % num_tokens].t()
            factor_X = factor_X + (gradient.slope_CF[row_X] * features_XF).sum(1)
        if one_C is None:
            return factor_X * shifted_X.exp()
        return factor_X * (self.beta * shifted_X).exp() + one_C[row_X] * shifted_X.exp()

    def _put(
        self,
        flat: torch.Tensor,
        flat_X: torch.Tensor,
        shifted_X: torch.Tensor,
        value_X: torch.Tensor,
        gradient: RowGradient,
    ) -> None:
        """Less the label's share, times the softcap's derivative, rounded once."""
        row_X = flat_X // self.projection_CV.shape[1]
        value_X = value_X - gradient.ce_weight_C[row_X] * (flat_X == self.label_C[row_X])
        if self.head.logit_softcap is not None:
            tanh_X = (shifted_X + self.max_C[row_X]) / self.head.logit_softcap
            value_X = value_X * (1.0 - tanh_X.square())
        flat.index_copy_(0, flat_X, value_X.to(flat.dtype))

    def bias_gradient(self) -> torch.Tensor:
        """From the rounded gradient, summed in fp32."""
        return self.projection_CV.sum(dim=0, dtype=torch.float32)


def summed_by_token(flat_S: torch.Tensor, value_S: torch.Tensor) -> torch.Tensor:
    """For each draw the sum over all draws of its token, in a fixed order, without waiting for the device."""
    flat, order = flat_S.sort(stable=True)
    first, last = torch.searchsorted(flat, flat), torch.searchsorted(flat, flat, right=True)
    # Segment i runs to where the next draw's token begins: all of a token's draws are in its last segment.
    total = segment_sum(value_S[order], torch.cat([first, first.new_full((1,), len(flat))]))[last - 1]
    return torch.empty_like(value_S).index_copy_(0, order, total)
