"""The arithmetic of one chunk: logits in; cross-entropy, KL and the gradient with respect to the logits out.

With z the logits, beta = 1/T, H the teacher's head of a row, R all other tokens, p the teacher, q the
student at temperature T, P and Q their head masses, every objective has a gradient that is one number per row
times q_j on R, and something particular on the few entries of H:

    cross-entropy   softmax(z)_j - [j = label]
    forward KL      R: beta q_j (1 - r), r = (1 - P)/(1 - Q)        H: beta (q_j - p_j)
    reverse KL      R: beta q_j (f_R - KL)                          H: beta q_j (f_j - KL)
                    f = log q - log p, per entry of H, and once for the whole tail

With tail moments a forward KL has one more term on R, whose multiplier differs from token to token
(loss_tail.py); with tail draws it has terms at the drawn tokens, and one more number per row (loss_draws.py).

So the chunk is exponentiated once (twice when T != 1), its head entries are set to zero, and the row sum of
what is left *is* the student's tail mass: a sum of positive terms, never 1 - Q. Then one multiplication per
row turns the exponentials into the gradient, and the head entries are written over. docs/method.md derives
all this. Here it is bookkeeping of rows and single tokens; what touches all of [C, V] is in loss_passes.py.

C: rows of the chunk, V: vocabulary, K: rows of the chunk with teacher targets, E: their head entries.
"""

from dataclasses import dataclass

import torch

from trainer.loss.logits import Passes, RowGradient
from trainer.loss.loss_draws import drawn_tail
from trainer.loss.loss_tail import FeatureTables, damping, tilt
from trainer.loss.targets import IGNORE_INDEX, LOG_FLOOR, TeacherTargets, segment_sum


@dataclass(frozen=True)
class RowWeights:
    """What one row's cross-entropy and KL weigh in the loss: the reciprocal denominators, times `kl_coef`."""

    ce: torch.Tensor
    kl: torch.Tensor


@dataclass(frozen=True)
class ChunkSums:
    """Sums over the chunk's rows, and the gradient with respect to W h + b before the logit scale."""

    ce: torch.Tensor
    kl: torch.Tensor
    student_head_mass: torch.Tensor
    gradient_CV: torch.Tensor | None
    """In the compute dtype; None unless asked for. A buffer that the next chunk overwrites."""


@dataclass(frozen=True)
class BucketedKL:
    """KL of every row and the two parts of its gradient."""

    kl_K: torch.Tensor
    tail_coefficient_K: torch.Tensor
    """On R the gradient is this times q_j."""
    head_gradient_E: torch.Tensor
    probs_E: torch.Tensor
    """q_j of the head entries."""
    tail_K: torch.Tensor
    """1 - Q."""


def bucketed_kl(
    shifted_E: torch.Tensor,
    sum_K: torch.Tensor,
    tail_sum_K: torch.Tensor,
    targets: TeacherTargets,
    *,
    beta: float,
    reverse: bool,
) -> BucketedKL:
    """KL between teacher and student over the head entries and one tail bucket.

    Args:
        shifted_E: beta (z_j - max z) of the head entries.
        sum_K: sum over the vocabulary of exp(beta (z_j - max z)).
        tail_sum_K: the same over R only, summed directly.
    """
    log_sum_K = sum_K.log()
    log_q_E = shifted_E - log_sum_K[targets.row_E]
    q_E = log_q_E.exp()
    tail_q_K = tail_sum_K / sum_K
    log_tail_q_K = (tail_sum_K.log() - log_sum_K).clamp_min(LOG_FLOOR[sum_K.dtype])
    log_ratio_E = log_q_E - targets.log_probs_E
    log_tail_ratio_K = log_tail_q_K - targets.log_tail_K
    if reverse:
        kl_K = segment_sum(q_E * log_ratio_E, targets.offsets_K1) + tail_q_K * log_tail_ratio_K
        tail_coefficient_K = beta * (log_tail_ratio_K - kl_K)
        head_gradient_E = beta * q_E * (log_ratio_E - kl_K[targets.row_E])
    else:
        head_K = segment_sum(targets.probs_E * log_ratio_E, targets.offsets_K1)
        kl_K = -head_K - targets.tail_K * log_tail_ratio_K
        tail_coefficient_K = -beta * torch.expm1(-log_tail_ratio_K)
        head_gradient_E = beta * (q_E - targets.probs_E)
    return BucketedKL(kl_K, tail_coefficient_K, head_gradient_E, q_E, tail_q_K)


@dataclass(frozen=True)
class TailShape:
    """The part of a forward KL that lies inside the tail."""

    kl_K: torch.Tensor
    """Its value: half the squared distance of the means, in the metric of the student's tail, times 1 - P."""
    slope_KF: torch.Tensor
    """On R its gradient is (offset + slope . u_j) times the student's tail of mass one."""
    offset_K: torch.Tensor
    """- slope . m."""
    tilt_KF: torch.Tensor
    """The student's tail is reweighted by 1 + x_j, x_j = tilt . (u_j - m)."""
    mean_KF: torch.Tensor
    """m."""

    def tilt_of(self, row_S: torch.Tensor, features_SF: torch.Tensor) -> torch.Tensor:
        """x [S] of single tokens, given by row and features."""
        return ((features_SF - self.mean_KF[row_S]) * self.tilt_KF[row_S]).sum(1)


def _tail_shape(passes: Passes, targets: TeacherTargets, tables: FeatureTables, beta: float) -> TailShape:
    """What reweighting the student's tail adds, from its exponentials at T = 1 and at the temperature."""
    assert targets.tail_mean_KF is not None and targets.tail_noise_K is not None
    rows_K = targets.position_K
    mean_CF, covariance_CFF = passes.tail_statistics(tables, at_one=False)
    mean_KF, covariance_KFF = mean_CF[rows_K], covariance_CFF[rows_K]
    mean_one_KF, covariance_one_KFF = mean_KF, covariance_KFF
    if beta != 1.0:
        mean_CF, covariance_CFF = passes.tail_statistics(tables, at_one=True)
        mean_one_KF, covariance_one_KFF = mean_CF[rows_K], covariance_CFF[rows_K]
    a_KF, distance_K = tilt(mean_one_KF, covariance_one_KFF, targets.tail_mean_KF, targets.tail_noise_K)
    damping_K = damping(a_KF, covariance_KFF, beta)
    tilt_KF = (beta * damping_K)[:, None] * a_KF
    weight_K = beta * targets.tail_K
    slope_KF = -weight_K[:, None] * tilt_KF
    return TailShape(
        kl_K=0.5 * beta * weight_K * damping_K * distance_K,
        slope_KF=slope_KF,
        offset_K=-(slope_KF * mean_KF).sum(1),
        tilt_KF=tilt_KF,
        mean_KF=mean_KF,
    )


def process_chunk(
    passes: Passes,
    hidden_CD: torch.Tensor,
    labels_C: torch.Tensor,
    targets: TeacherTargets | None,
    *,
    weights: RowWeights,
    beta: float,
    reverse: bool,
    want_gradient: bool,
    tables: FeatureTables | None = None,
) -> ChunkSums:
    """Project a chunk; return its sums and gradient. With `tables` the tail's shape is matched as well."""
    labelled_C = labels_C != IGNORE_INDEX
    ce_weight_C = labelled_C * weights.ce
    read = passes.read(hidden_CD, labels_C.clamp_min(0), targets)

    if targets is None:
        assert read.sum_C is not None
        zero = read.sum_C.new_zeros(())
        sum_ce = ((read.sum_C.log() - read.label_C) * labelled_C).sum()
        written = None
        if want_gradient:
            written = passes.write(RowGradient(ce_weight_C / read.sum_C, ce_weight_C), None)
        return ChunkSums(sum_ce, zero, zero, written)

    assert read.head_E is not None
    tail_sum_K = read.tail_sum_C[targets.position_K]
    sum_K = tail_sum_K + segment_sum(read.head_E.exp(), targets.offsets_K1)
    kl = bucketed_kl(read.head_E, sum_K, tail_sum_K, targets, beta=beta, reverse=reverse)
    sum_C = read.sum_C
    if sum_C is None:
        sum_C = read.tail_sum_C.index_copy(0, targets.position_K, sum_K)

    shape = None
    if tables is not None:
        shape = _tail_shape(passes, targets, tables, beta)
    inside_K = None if shape is None else shape.kl_K
    drawn = None
    if targets.draws is not None:
        assert read.draw_S is not None
        tilt_S = None
        if shape is not None and tables is not None:
            features_SF = tables.values_FV[:, targets.draws.token_ids_S].t()
            tilt_S = shape.tilt_of(targets.draws.row_S, features_SF)
        drawn = drawn_tail(read.draw_S, tail_sum_K, targets, tilt_S, beta)
        inside_K = drawn.kl_K  # an estimate of all of it: the moments are its control variate
    written = None
    if want_gradient:
        tail_C = torch.zeros_like(sum_C).index_copy_(
            0, targets.position_K, weights.kl * kl.tail_coefficient_K / sum_K
        )
        scale_K = weights.kl / tail_sum_K.clamp_min(torch.finfo(tail_sum_K.dtype).tiny)
        slope_CF = None
        if drawn is not None:
            tail_C.index_add_(0, targets.position_K, scale_K * drawn.tail_K)
        if shape is not None:
            slope_CF = shape.slope_KF.new_zeros(len(sum_C), shape.slope_KF.shape[1])
            slope_CF.index_copy_(0, targets.position_K, scale_K[:, None] * shape.slope_KF)
            tail_C.index_add_(0, targets.position_K, scale_K * shape.offset_K)
        gradient = RowGradient(
            ce_C=ce_weight_C / sum_C,
            ce_weight_C=ce_weight_C,
            tail_C=tail_C,
            slope_CF=slope_CF,
            probs_E=kl.probs_E,
            head_E=weights.kl * kl.head_gradient_E,
            draw_S=None if drawn is None else weights.kl * drawn.gradient_S,
        )
        written = passes.write(gradient, tables)
    return ChunkSums(
        ce=((sum_C.log() - read.label_C) * labelled_C).sum(),
        kl=kl.kl_K.sum() if inside_K is None else (kl.kl_K + inside_K).sum(),
        student_head_mass=(1.0 - kl.tail_K).sum(),
        gradient_CV=written,
    )
