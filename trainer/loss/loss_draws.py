"""Tail draws: a few tokens of the teacher's tail with their probabilities, which make the KL unbiased.

The bucket of a forward KL leaves out (1 - P) KL(p~ || q~), the divergence of the two tail shapes. Written as
a sum over the tail of terms that are zero where both agree,

    (1 - P) KL(p~ || q~) = sum_R p_j (r_j - 1 - log r_j),    r_j = (1 - P) q~_j / p_j

it has an unbiased estimate from drawn tokens: each draw's term over its expected number of draws (Horvitz
and Thompson; formats/logprobs/tail_draws.py). So has its gradient, and at the initial weights every single term
of both is zero: no draw pulls the model anywhere.

With tail moments the reweighted tail q~_j (1 + x_j) of loss_tail.py stands in for p~ and takes part of the
gradient without noise. The draws then carry the rest, with (1 + x_j) r_j in place of the first r_j and x held
fixed: a control variate, whose sum over the tail has the mean of what was there before.

One draw whose token the student has made many times likelier would outweigh all others; (1 + x) r counts as
at most `LARGEST_RATIO` in the gradient (its value continues with the logarithm, so it stays an integral).

K: rows with teacher targets, S: draws, F: token features.
"""

from dataclasses import dataclass

import torch

from trainer.loss.targets import TeacherTargets, segment_sum

LARGEST_RATIO = 10.0


@dataclass(frozen=True)
class DrawnTail:
    """What the draws of a chunk add to its KL."""

    kl_K: torch.Tensor
    """The estimated divergence inside the tail."""
    gradient_S: torch.Tensor
    """With respect to the logit of each drawn token, before what `tail_K` spreads over the tail."""
    tail_K: torch.Tensor
    """On the whole tail the gradient is this times the student's tail of mass one; all of it sums to zero."""


def drawn_tail(
    shifted_S: torch.Tensor,
    tail_sum_K: torch.Tensor,
    targets: TeacherTargets,
    tilt_S: torch.Tensor | None,
    beta: float,
) -> DrawnTail:
    """The estimate and its gradient.

    Args:
        shifted_S: beta (z_j - max z) of the drawn tokens.
        tail_sum_K: sum over the tail of exp(beta (z_j - max z)).
        tilt_S: x_j of the drawn tokens; None without tail moments.
    """
    draws = targets.draws
    assert draws is not None
    log_tail_sum_K = tail_sum_K.clamp_min(torch.finfo(tail_sum_K.dtype).tiny).log()
    log_share_K = targets.log_tail_K - log_tail_sum_K
    log_ratio_S = shifted_S + log_share_K[draws.row_S] - draws.log_probs_S
    ratio_S = log_ratio_S.clamp_max(50.0).exp()
    if tilt_S is not None:
        ratio_S = (1.0 + tilt_S) * ratio_S
    limited_S = ratio_S.clamp(-LARGEST_RATIO, LARGEST_RATIO)
    beyond_S = limited_S * (ratio_S.abs() / LARGEST_RATIO).clamp_min(1.0).log()
    gradient_S = beta * draws.scale_S * (limited_S - 1.0)
    return DrawnTail(
        kl_K=segment_sum(draws.scale_S * (limited_S + beyond_S - 1.0 - log_ratio_S), draws.offsets_K1),
        gradient_S=gradient_S,
        tail_K=-segment_sum(gradient_S, draws.offsets_K1),
    )
