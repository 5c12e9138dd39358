"""The arithmetic of one chunk: logits in; cross-entropy, KL and the gradient with respect to the logits out.

With z the logits, beta = 1/T, H the kept tokens of a row, R all others (the tail), p the teacher, q the student
at temperature T, P and Q the masses of H, every objective has a gradient that is one number per row times q_j
on R, and something particular on the few entries of H:

    cross-entropy   softmax(z)_j - [j = label]
    forward KL      R: beta q_j (1 - r), r = (1 - P)/(1 - Q)        H: beta (q_j - p_j)
    reverse KL      R: beta q_j (f_R - KL)                          H: beta q_j (f_j - KL)
                    f = log q - log p, per entry of H, and once for the whole tail

So the chunk is exponentiated once (twice when T != 1), its kept entries are set to zero, and the row sum of
what is left *is* the student's tail mass: a sum of positive terms, never 1 - Q. Then one multiplication per
row turns the exponentials into the gradient, and the kept entries are written over.

**Draws.** The bucket of a forward KL leaves out (1 - P) KL(p~ || q~), the divergence of the two tail shapes.
Written as a sum over the tail of terms that are zero where both agree,

    (1 - P) KL(p~ || q~) = sum_R p_j (r_j - 1 - log r_j),    r_j = (1 - P) q~_j / p_j

it has an unbiased estimate from drawn tokens: each draw's term over its expected number of draws (Horvitz
and Thompson, 1952; formats/logprobs/tail_draws.py). So has its gradient, which is one number at each drawn
token and one per row; and at the initial weights every single term of both is zero: no draw pulls the model
anywhere. docs/derivations.md derives all this.

C: rows of the chunk, V: vocabulary, D: hidden size, P: positions of the chunk with teacher targets, E: their
kept entries, S: their tail draws.
"""

from dataclasses import dataclass, replace

import torch

from formats.disk.token_row import IGNORED
from trainer.loss.logits import ChunkLogits, LogitGradient, SoftmaxTerms
from trainer.loss.targets import LOG_FLOOR, TeacherTargets, segment_sum
from trainer.loss.token_weights import CrossEntropy, LabelTerms

LARGEST_SHARE = 1.0
"""One draw of a rare token that the student has made likely would outweigh all others. Its share of the
student, r p/pi, stands for a probability, so it counts as at most one in the gradient (its value continues
with the logarithm, so it stays an integral)."""
LARGEST_RATIO = 10.0
"""Up to here r counts in full whatever its share: the initial weights, r = 1, stay out of the limit's reach."""


@dataclass(frozen=True)
class RowWeights:
    """What one row's cross-entropy and one position's KL weigh, before weights of their own; 0-d tensors."""

    ce: torch.Tensor
    kl: torch.Tensor


@dataclass(frozen=True)
class ChunkSums:
    """Sums over the chunk's rows, and the gradient with respect to W h + b before the logit scale."""

    ce: torch.Tensor
    kl: torch.Tensor
    student_kept_mass: torch.Tensor
    gradient_CV: torch.Tensor | None
    """In the compute dtype; None unless asked for. A buffer that the next chunk overwrites."""


@dataclass(frozen=True)
class BucketedKL:
    """KL of every position and the two parts of its gradient."""

    kl_P: torch.Tensor
    tail_coefficient_P: torch.Tensor
    """On R the gradient is this times q_j."""
    kept_gradient_E: torch.Tensor
    probs_E: torch.Tensor
    """q_j of the kept tokens, 0 where masked."""
    tail_P: torch.Tensor
    """1 - Q."""


def bucketed_kl(
    shifted_E: torch.Tensor,
    sum_P: torch.Tensor,
    tail_sum_P: torch.Tensor,
    targets: TeacherTargets,
    *,
    beta: float,
    reverse: bool,
) -> BucketedKL:
    """KL between teacher and student over the kept tokens and one tail bucket.

    Args:
        shifted_E: beta (z_j - max z) of the kept tokens.
        sum_P: sum over the vocabulary, without masked entries, of exp(beta (z_j - max z)).
        tail_sum_P: the same over R only, summed directly.
    """
    log_sum_P = sum_P.log()
    log_q_E = shifted_E - log_sum_P[targets.position_E]
    q_E = log_q_E.exp()
    tail_q_P = tail_sum_P / sum_P
    log_tail_q_P = (tail_sum_P.log() - log_sum_P).clamp_min(LOG_FLOOR[sum_P.dtype])
    log_ratio_E = log_q_E - targets.log_probs_E
    if targets.masked_E is not None:
        q_E, log_ratio_E = (part.masked_fill(targets.masked_E, 0.0) for part in (q_E, log_ratio_E))
    log_tail_ratio_P = log_tail_q_P - targets.log_tail_P
    if reverse:
        kl_P = segment_sum(q_E * log_ratio_E, targets.offsets_P1) + tail_q_P * log_tail_ratio_P
        tail_coefficient_P = beta * (log_tail_ratio_P - kl_P)
        kept_gradient_E = beta * q_E * (log_ratio_E - kl_P[targets.position_E])
    else:
        kept_P = segment_sum(targets.probs_E * log_ratio_E, targets.offsets_P1)
        kl_P = -kept_P - targets.tail_P * log_tail_ratio_P
        tail_coefficient_P = -beta * torch.expm1(-log_tail_ratio_P)
        kept_gradient_E = beta * (q_E - targets.probs_E)
    return BucketedKL(kl_P, tail_coefficient_P, kept_gradient_E, q_E, tail_q_P)


@dataclass(frozen=True)
class DrawnTail:
    """What the draws of a chunk add to its KL."""

    kl_P: torch.Tensor
    """The estimated divergence inside the tail."""
    gradient_S: torch.Tensor
    """With respect to the logit of each drawn token, before what `tail_P` spreads over the tail."""
    tail_P: torch.Tensor
    """On the whole tail the gradient is this times the student's tail of mass one; all of it sums to zero."""


def drawn_tail(
    shifted_S: torch.Tensor, tail_sum_P: torch.Tensor, targets: TeacherTargets, beta: float
) -> DrawnTail:
    """The estimate of the divergence inside the tail, and its gradient.

    Args:
        shifted_S: beta (z_j - max z) of the drawn tokens.
        tail_sum_P: sum over the tail of exp(beta (z_j - max z)).
    """
    draws = targets.draws
    assert draws is not None
    log_tail_sum_P = tail_sum_P.clamp_min(torch.finfo(tail_sum_P.dtype).tiny).log()
    log_share_P = targets.log_tail_P - log_tail_sum_P
    log_ratio_S = shifted_S + log_share_P[draws.position_S] - draws.log_probs_S
    ratio_S = log_ratio_S.clamp_max(50.0).exp()
    limit_S = (LARGEST_SHARE / draws.scale_S).clamp_min(LARGEST_RATIO)
    limited_S = torch.minimum(ratio_S, limit_S)
    beyond_S = limited_S * (ratio_S / limit_S).clamp_min(1.0).log()
    gradient_S = beta * draws.scale_S * (limited_S - 1.0)
    return DrawnTail(
        kl_P=segment_sum(draws.scale_S * (limited_S + beyond_S - 1.0 - log_ratio_S), draws.offsets_P1),
        gradient_S=gradient_S,
        tail_P=-segment_sum(gradient_S, draws.offsets_P1),
    )


def process_chunk(
    logits: ChunkLogits,
    hidden_CD: torch.Tensor,
    labels_C: torch.Tensor,
    targets: TeacherTargets | None,
    *,
    weights: RowWeights,
    cross_entropy: CrossEntropy,
    label_terms: LabelTerms,
    beta: float,
    reverse: bool,
    want_gradient: bool,
) -> ChunkSums:
    """Project a chunk; return its sums and gradient."""
    terms = logits.softmax_terms(hidden_CD, labels_C.clamp_min(0), targets)
    if targets is None:
        assert terms.sum_C is not None
        ce = weighted_ce(terms, terms.sum_C, labels_C, weights.ce, cross_entropy, label_terms)
        zero = terms.sum_C.new_zeros(())
        written = logits.gradient(ce.gradient) if want_gradient else None
        return ChunkSums(ce.total, zero, zero, written)

    assert terms.kept_E is not None
    tail_sum_P = terms.tail_sum_C[targets.place_P]
    exp_E = terms.kept_E.exp()
    sum_P = compared_P = tail_sum_P + segment_sum(exp_E, targets.offsets_P1)
    if targets.masked_E is not None:  # again, instead of less the masked one: a sum of positive terms
        others_E = exp_E.masked_fill(targets.masked_E, 0.0)
        compared_P = tail_sum_P + segment_sum(others_E, targets.offsets_P1)
        compared_P = compared_P.clamp_min(torch.finfo(compared_P.dtype).tiny)
    kl = bucketed_kl(terms.kept_E, compared_P, tail_sum_P, targets, beta=beta, reverse=reverse)
    sum_C = terms.sum_C
    if sum_C is None:
        sum_C = terms.tail_sum_C.index_copy(0, targets.place_P, sum_P)
    ce = weighted_ce(terms, sum_C, labels_C, weights.ce, cross_entropy, label_terms)
    drawn = None
    if targets.draws is not None:
        assert terms.drawn_S is not None
        drawn = drawn_tail(terms.drawn_S, tail_sum_P, targets, beta)
    kl_P = kl.kl_P if drawn is None else kl.kl_P + drawn.kl_P
    kl_weight = weights.kl
    if targets.weights_P is not None:
        kl_P, kl_weight = kl_P * targets.weights_P, kl_weight * targets.weights_P
    written = None
    if want_gradient:
        tail_P = kl_weight * kl.tail_coefficient_P / compared_P
        if drawn is not None:
            spread_P = kl_weight / tail_sum_P.clamp_min(torch.finfo(tail_sum_P.dtype).tiny)
            tail_P = tail_P + spread_P * drawn.tail_P
        if (
            targets.masked_E is not None
        ):  # beside a label of nearly 1 the rest may underflow: no infinity times zero
            tail_P = tail_P.clamp(torch.finfo(tail_P.dtype).min, torch.finfo(tail_P.dtype).max)
        gradient = replace(
            ce.gradient,
            tail_C=torch.zeros_like(sum_C).index_copy_(0, targets.place_P, tail_P),
            probs_E=kl.probs_E if targets.masked_E is None else exp_E / sum_P[targets.position_E],
            kept_E=_at(kl_weight, targets.position_E) * kl.kept_gradient_E,
            drawn_S=None
            if drawn is None or targets.draws is None
            else _at(kl_weight, targets.draws.position_S) * drawn.gradient_S,
        )
        written = logits.gradient(gradient)
    return ChunkSums(ce.total, kl_P.sum(), (1.0 - kl.tail_P).sum(), written)


@dataclass(frozen=True)
class WeightedCE:
    """The cross-entropy of a chunk."""

    total: torch.Tensor
    """Its sum, each row by its weight."""
    gradient: LogitGradient
    """Its part."""


def weighted_ce(
    terms: SoftmaxTerms,
    sum_C: torch.Tensor,
    labels_C: torch.Tensor,
    weight: torch.Tensor,
    cross_entropy: CrossEntropy,
    label_terms: LabelTerms,
) -> WeightedCE:
    """Cross-entropy with weights and smoothing (token_weights.py).

    Args:
        sum_C: sum of exp(z - max z) over the vocabulary.
        weight: of every row in the loss.
    """
    labelled_C = labels_C != IGNORED
    ce_C = log_q_C = sum_C.log() - terms.label_C
    counted_C = labelled_C
    own_C = cross_entropy.row_weights(log_q_C, terms.top_entropy_C, label_terms)
    if own_C is not None:
        counted_C = torch.where(labelled_C, own_C, torch.zeros_like(own_C))
    ce_weight_C = counted_C * weight
    label_C, uniform_C = ce_weight_C, None
    if cross_entropy.smoothing:
        assert terms.mean_C is not None
        uniform_C = cross_entropy.smoothing * ce_weight_C
        label_C = ce_weight_C - uniform_C
        ce_C = ce_C + cross_entropy.smoothing * (terms.label_C - terms.mean_C)
    gradient = LogitGradient(ce_weight_C / sum_C, ce_weight_C, label_C, uniform_C=uniform_C)
    # Not a product alone: where a row has no label, that of token 0 may be infinite, for a model that rules it out.
    return WeightedCE((ce_C.masked_fill(~labelled_C, 0.0) * counted_C).sum(), gradient)


def _at(weight: torch.Tensor, position_X: torch.Tensor) -> torch.Tensor:
    """The weight of each entry's position; itself where all positions have the same, 0-d."""
    return weight if weight.ndim == 0 else weight[position_X]
