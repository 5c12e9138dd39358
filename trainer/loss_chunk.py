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
row turns the exponentials into the gradient, and the head entries are written over. Five passes over [C, V]
at T = 1, as many as the cross-entropy alone needs. docs/method.md derives all this.

C: rows of the chunk, V: vocabulary, K: rows of the chunk with teacher targets, E: their head entries.
"""

from dataclasses import dataclass

import torch

from trainer.loss_draws import drawn_tail
from trainer.loss_rows import IGNORE_INDEX, LOG_FLOOR, TeacherTargets, segment_sum
from trainer.loss_tail import FeatureTables, damping, tilt


@dataclass(frozen=True)
class RowWeights:
    """What one row's cross-entropy and KL weigh in the loss: the reciprocal denominators, times `kl_coef`."""

    ce: torch.Tensor
    kl: torch.Tensor


@dataclass(frozen=True)
class ChunkSums:
    """Sums over the chunk's rows; the logits tensor holds the gradient afterwards, if it was asked for."""

    ce: torch.Tensor
    kl: torch.Tensor
    student_head_mass: torch.Tensor


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


def _tail_shape(
    shifted_CV: torch.Tensor,
    tempered_CV: torch.Tensor,
    tail_sum_C: torch.Tensor,
    flat_E: torch.Tensor,
    targets: TeacherTargets,
    tables: FeatureTables,
    weights_CV: torch.Tensor | None,
    beta: float,
) -> TailShape:
    """What reweighting the student's tail adds, from its exponentials at T = 1 and at the temperature."""
    assert targets.tail_mean_KF is not None and targets.tail_noise_K is not None
    rows_K = targets.position_K
    mean_CF, covariance_CFF = tables.statistics(tempered_CV, tail_sum_C, weights_CV)
    mean_KF, covariance_KFF = mean_CF[rows_K], covariance_CFF[rows_K]
    mean_one_KF, covariance_one_KFF = mean_KF, covariance_KFF
    if beta != 1.0:
        flat = shifted_CV.view(-1)
        heads_E = flat[flat_E]
        flat.index_fill_(0, flat_E, 0.0)  # for the tail alone; put back below
        mean_CF, covariance_CFF = tables.statistics(shifted_CV, shifted_CV.sum(dim=1), weights_CV)
        flat.index_copy_(0, flat_E, heads_E)
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
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    targets: TeacherTargets | None,
    *,
    weights: RowWeights,
    beta: float,
    reverse: bool,
    scratch_CV: torch.Tensor | None,
    want_gradient: bool,
    tables: FeatureTables | None = None,
    weights_CV: torch.Tensor | None = None,
) -> ChunkSums:
    """Overwrite `logits_CV` (contiguous, the arithmetic's dtype) with the gradient; return the chunk's sums.

    `scratch_CV` is a second tensor of the same shape, needed only for teacher targets at T != 1. With
    `tables` (forward KL only) the tail's shape is matched as well; `weights_CV` is then a buffer of the
    compute dtype, needed only where that is not the arithmetic's.
    """
    labelled_C = labels_C != IGNORE_INDEX
    safe_labels_C1 = labels_C.clamp_min(0)[:, None]
    shifted_CV = logits_CV.sub_(logits_CV.amax(dim=1, keepdim=True))
    shifted_label_C = shifted_CV.gather(1, safe_labels_C1).squeeze(1)
    ce_weight_C = labelled_C * weights.ce

    if targets is None:
        sum_C = shifted_CV.exp_().sum(dim=1)
        zero = sum_C.new_zeros(())
        sums = ChunkSums(((sum_C.log() - shifted_label_C) * labelled_C).sum(), zero, zero)
        if want_gradient:
            logits_CV.mul_((ce_weight_C / sum_C)[:, None])
            logits_CV.scatter_add_(1, safe_labels_C1, -ce_weight_C[:, None])
        return sums

    flat_E = targets.position_K[targets.row_E] * logits_CV.shape[1] + targets.token_ids_E
    share = beta == 1.0
    if share:
        tempered_CV = shifted_CV
    else:
        assert scratch_CV is not None
        tempered_CV = torch.mul(shifted_CV, beta, out=scratch_CV)
    tempered = tempered_CV.view(-1)
    shifted_E = tempered[flat_E]
    if targets.draws is not None:
        flat_S = targets.position_K[targets.draws.row_S] * logits_CV.shape[1] + targets.draws.token_ids_S
        shifted_S = tempered[flat_S]
    tempered_CV.exp_()
    tempered.index_fill_(0, flat_E, 0.0)
    tail_sum_C = tempered_CV.sum(dim=1)
    tail_sum_K = tail_sum_C[targets.position_K]
    sum_K = tail_sum_K + segment_sum(shifted_E.exp(), targets.offsets_K1)
    kl = bucketed_kl(shifted_E, sum_K, tail_sum_K, targets, beta=beta, reverse=reverse)

    # The softmax at T = 1, for the cross-entropy: the one just computed, or a second one.
    sum_C = tail_sum_C.index_copy(0, targets.position_K, sum_K) if share else shifted_CV.exp_().sum(dim=1)
    shape = None
    if tables is not None:
        shape = _tail_shape(shifted_CV, tempered_CV, tail_sum_C, flat_E, targets, tables, weights_CV, beta)
    inside_K = None if shape is None else shape.kl_K
    drawn = None
    if targets.draws is not None:
        tilt_S = None
        if shape is not None and tables is not None:
            features_SF = tables.values_FV[:, targets.draws.token_ids_S].t()
            tilt_S = shape.tilt_of(targets.draws.row_S, features_SF)
        drawn = drawn_tail(shifted_S, tail_sum_K, targets, tilt_S, beta)
        inside_K = drawn.kl_K  # an estimate of all of it: the moments are its control variate
    sums = ChunkSums(
        ce=((sum_C.log() - shifted_label_C) * labelled_C).sum(),
        kl=kl.kl_K.sum() if inside_K is None else (kl.kl_K + inside_K).sum(),
        student_head_mass=(1.0 - kl.tail_K).sum(),
    )
    if not want_gradient:
        return sums

    tail_coefficient_C = torch.zeros_like(sum_C).index_copy_(
        0, targets.position_K, weights.kl * kl.tail_coefficient_K / sum_K
    )
    ce_coefficient_C = ce_weight_C / sum_C
    scale_K = weights.kl / tail_sum_K.clamp_min(torch.finfo(tail_sum_K.dtype).tiny)
    if drawn is not None:
        tail_coefficient_C.index_add_(0, targets.position_K, scale_K * drawn.tail_K)
    if shape is not None and tables is not None:
        slope_CF = shape.slope_KF.new_zeros(len(sum_C), shape.slope_KF.shape[1])
        slope_CF.index_copy_(0, targets.position_K, scale_K[:, None] * shape.slope_KF)
        tail_coefficient_C.index_add_(0, targets.position_K, scale_K * shape.offset_K)
        if share:
            tables.reweight(tempered_CV, slope_CF, ce_coefficient_C + tail_coefficient_C)
        else:
            tables.reweight(tempered_CV, slope_CF, tail_coefficient_C)
            logits_CV.mul_(ce_coefficient_C[:, None]).add_(tempered_CV)
    elif share:
        logits_CV.mul_((ce_coefficient_C + tail_coefficient_C)[:, None])
    else:
        logits_CV.mul_(ce_coefficient_C[:, None])
        logits_CV.addcmul_(tempered_CV, tail_coefficient_C[:, None])
    if share:
        ce_weight_E = ce_weight_C[targets.position_K][targets.row_E]
        head_E = ce_weight_E * kl.probs_E + weights.kl * kl.head_gradient_E
        logits_CV.view(-1).index_copy_(0, flat_E, head_E)
    else:
        logits_CV.view(-1).index_add_(0, flat_E, weights.kl * kl.head_gradient_E)
    if drawn is not None:
        logits_CV.view(-1).index_add_(0, flat_S, weights.kl * drawn.gradient_S)
    logits_CV.scatter_add_(1, safe_labels_C1, -ce_weight_C[:, None])
    return sums
