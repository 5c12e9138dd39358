"""The chunk loop: hidden states and output head in; loss sums and parameter gradients out.

For each chunk of the rows that count: project, turn the logits into their own gradient in place, multiply
back into the gradients of hidden states and head, reuse the buffer. Nothing of size [rows, V] exists; the
peak is one chunk, the gradient of the head, and the gradient of the hidden states that count.

Precision: the projection runs in the compute dtype (the autocast dtype, else the dtype of the inputs), the
softmax arithmetic in fp32 (fp64 for fp64 inputs). The head's gradient is accumulated over the chunks in fp32
whatever the compute dtype, because a bf16 sum of many chunks loses their last bits; it costs 4 bytes per head
parameter until the backward pass hands it over in the weight's dtype.

N: rows, M: rows that count, C: rows of a chunk, D: hidden size, V: vocabulary without padding.
"""

from dataclasses import dataclass

import torch

from trainer.loss.kl import RowWeights, process_chunk
from trainer.loss.logits import Head, Passes, TorchPasses, Work, arithmetic_dtype
from trainer.loss.loss_tail import FeatureTables
from trainer.loss.targets import RowPlan

# Bytes of vocabulary-sized buffers per chunk. The head's gradient is read and written once per chunk, which
# costs little next to the multiplications from about 256 rows on; a chunk never has fewer (docs/method.md).
CHUNK_BYTES = {"cpu": 64 << 20}
DEFAULT_CHUNK_BYTES = 256 << 20
MIN_CHUNK_ROWS = 256
# Rows of the head updated at once when a half-precision product is added to the fp32 accumulator.
ACCUMULATE_ROWS = 16_384


@dataclass(frozen=True)
class Wanted:
    """Which gradients to compute."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass
class FusedResult:
    """Sums over all rows, and gradients of `unit * loss` (None where not wanted)."""

    sum_ce: torch.Tensor
    sum_kl: torch.Tensor
    sum_student_head_mass: torch.Tensor
    grad_hidden_MD: torch.Tensor | None = None
    grad_weight_VD: torch.Tensor | None = None
    grad_bias_V: torch.Tensor | None = None


def default_chunk_size(vocab_size: int, num_buffers: float, device_type: str) -> int:
    """Rows per chunk: as many as a fixed number of bytes holds, and at least `MIN_CHUNK_ROWS`."""
    budget = CHUNK_BYTES.get(device_type, DEFAULT_CHUNK_BYTES)
    return max(MIN_CHUNK_ROWS, int(budget // (4 * vocab_size * num_buffers)))


def fused_loss(
    hidden_ND: torch.Tensor,
    head: Head,
    plan: RowPlan,
    *,
    weights: RowWeights,
    beta: float,
    reverse: bool,
    num_weight_rows: int,
    wanted: Wanted,
    tables: FeatureTables | None = None,
    passes_type: type[Passes] = TorchPasses,
) -> FusedResult:
    """Walk the chunks of `plan`. The head's gradient has `num_weight_rows` rows, zero in the padding."""
    weight_VD = head.weight_VD
    compute, device = weight_VD.dtype, weight_VD.device
    arithmetic = arithmetic_dtype(compute)
    vocab_size, hidden_size = weight_VD.shape
    result = FusedResult(*(torch.zeros((), dtype=arithmetic, device=device) for _ in range(3)))
    num_selected = plan.rows_M.numel()
    if wanted.hidden:
        result.grad_hidden_MD = torch.empty(num_selected, hidden_size, dtype=compute, device=device)
    if wanted.weight:
        result.grad_weight_VD = torch.zeros(num_weight_rows, hidden_size, dtype=arithmetic, device=device)
    if wanted.bias:
        result.grad_bias_V = torch.zeros(num_weight_rows, dtype=arithmetic, device=device)
    if not plan.chunks:
        return result

    longest = max(chunk.stop - chunk.start for chunk in plan.chunks)

    passes = passes_type(head, longest, Work(beta if plan.targets is not None else 1.0, tables is not None))
    for chunk in plan.chunks:
        hidden_CD = hidden_ND.index_select(0, plan.rows_M[chunk.start : chunk.stop]).to(compute)
        has_teacher = plan.targets is not None and chunk.teacher_rows[0] < chunk.teacher_rows[1]
        sums = process_chunk(
            passes,
            hidden_CD,
            plan.labels_M[chunk.start : chunk.stop],
            plan.targets.slice(chunk) if has_teacher and plan.targets is not None else None,
            weights=weights,
            beta=beta,
            reverse=reverse,
            want_gradient=wanted.any,
            tables=tables,
        )
        result.sum_ce += sums.ce
        result.sum_kl += sums.kl
        result.sum_student_head_mass += sums.student_head_mass
        gradient_CV = sums.gradient_CV
        if gradient_CV is None:
            continue
        if result.grad_hidden_MD is not None:
            out_CD = result.grad_hidden_MD[chunk.start : chunk.stop]
            torch.mm(gradient_CV, weight_VD, out=out_CD)
            if head.logit_scale != 1.0:
                out_CD.mul_(head.logit_scale)
        if result.grad_weight_VD is not None:
            _accumulate(result.grad_weight_VD[:vocab_size], gradient_CV, hidden_CD, head.logit_scale)
        if result.grad_bias_V is not None:
            result.grad_bias_V[:vocab_size].add_(passes.bias_gradient(), alpha=head.logit_scale)
    return result


def _accumulate(
    total_VD: torch.Tensor, gradient_CV: torch.Tensor, hidden_CD: torch.Tensor, scale: float
) -> None:
    """total += scale * gradient^T hidden; half-precision products are added slice by slice."""
    if total_VD.dtype == gradient_CV.dtype:
        total_VD.addmm_(gradient_CV.t(), hidden_CD, alpha=scale)
        return
    for start in range(0, total_VD.shape[0], ACCUMULATE_ROWS):
        columns = gradient_CV[:, start : start + ACCUMULATE_ROWS]
        total_VD[start : start + ACCUMULATE_ROWS].add_(columns.t() @ hidden_CD, alpha=scale)
