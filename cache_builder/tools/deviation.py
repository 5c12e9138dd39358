"""How far two captures of the same positions lie apart, in nats.

P: positions, E: entries that both heads hold, S: draws that both tails hold, K: tail nodes.
"""

from dataclasses import dataclass

import numpy as np

from formats.logprobs.ragged import rank_in_segment, segment_of, segment_sum
from formats.logprobs.tail_draws import TailDraws
from formats.logprobs.tail_function import TAIL_BETAS
from formats.logprobs.topk import TopKLogprobs


@dataclass(frozen=True, eq=False)
class Deviation:
    """Differences between two captures."""

    logprobs: np.ndarray
    """float64 [E]: |difference| of the logprobs of tokens in both heads."""
    tails: np.ndarray
    """float64 [P', K]: |difference| of the tail function at the nodes, where the heads hold the same
    tokens."""
    labels: np.ndarray
    """float64 [P'']: |difference| of the labels' logprobs, where both are known."""
    draws: np.ndarray
    """float64 [S]: |difference| of the logprobs of draws that both hold at a position; a token drawn twice
    counts twice where it was drawn twice on both sides."""
    num_draws: int
    """Draws of the side that has more."""
    kl: np.ndarray
    """float64 [P]: KL(one || other) at T = 1 over the shared tokens and one bucket for all others."""
    num_only_one: int
    """Entries that only one of the two heads holds: they lie at the threshold, or something is wrong."""
    largest_only_one: float
    """The largest probability among them."""


def compare(one: TopKLogprobs, other: TopKLogprobs) -> Deviation:
    """Match the entries of two captures by position and token id.

    Raises:
        ValueError: another number of positions, another rate of draws, or another vocabulary.
    """
    if len(one) != len(other) or one.vocab_size != other.vocab_size:
        raise ValueError(
            f"captures must cover the same positions and vocabulary, got {len(one)} of {one.vocab_size} "
            f"and {len(other)} of {other.vocab_size}"
        )
    if one.draws.rate != other.draws.rate:
        raise ValueError(
            f"captures must have equal rates of draws, got {one.draws.rate} and {other.draws.rate}"
        )
    keys = [segment_of(side.offsets) * one.vocab_size + side.token_ids for side in (one, other)]
    _, at_one, at_other = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
    log_p, log_q = one.logprobs[at_one].astype(np.float64), other.logprobs[at_other].astype(np.float64)
    position = segment_of(one.offsets)[at_one]
    num_shared = np.bincount(position, minlength=len(one))

    left = np.ones(one.num_entries, np.bool_)
    right = np.ones(other.num_entries, np.bool_)
    left[at_one], right[at_other] = False, False
    alone = np.concatenate([one.logprobs[left], other.logprobs[right]])

    same = (num_shared == one.counts) & (num_shared == other.counts)
    with np.errstate(invalid="ignore"):
        tails = np.abs(
            one.log_tail_nodes[same].astype(np.float64) - other.log_tail_nodes[same].astype(np.float64)
        )
    tails = np.where(np.isnan(tails), 0.0, tails)  # both are -inf: the head is the whole vocabulary

    with np.errstate(invalid="ignore"):
        labels = np.abs(one.label_logprobs.astype(np.float64) - other.label_logprobs)
    labels = np.where(one.label_logprobs == other.label_logprobs, 0.0, labels)  # both may be -inf

    # Stored distributions sum to one only up to the codec's rounding; without this the KL could be negative.
    log_z_one, log_z_other = (side.log_partition(1.0).astype(np.float64) for side in (one, other))
    shares = log_p - log_z_one[position], log_q - log_z_other[position]
    inside = np.bincount(position, np.exp(shares[0]) * (shares[0] - shares[1]), minlength=len(one))
    rest_p, rest_q = _log_rest(one, left) - log_z_one, _log_rest(other, right) - log_z_other
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        outside = np.exp(rest_p) * (rest_p - rest_q)
    outside = np.where(np.exp(rest_p) > 0, outside, 0.0)
    return Deviation(
        logprobs=np.abs(log_p - log_q),
        tails=tails,
        labels=labels[~np.isnan(labels)],
        draws=_draw_deviations(one.draws, other.draws, one.vocab_size),
        num_draws=max(len(one.draws.token_ids), len(other.draws.token_ids)),
        kl=inside + outside,
        num_only_one=int(left.sum() + right.sum()),
        largest_only_one=float(np.exp(alone.max())) if len(alone) else 0.0,
    )


def _draw_deviations(one: TailDraws, other: TailDraws, vocab_size: int) -> np.ndarray:
    """`Deviation.draws`: the n-th draw of a token on one side is matched with the n-th on the other."""
    keys, logprobs = [], []
    for side in (one, other):
        drawn = segment_of(side.offsets) * vocab_size + side.token_ids
        order = np.argsort(drawn, kind="stable")
        drawn = drawn[order]
        first = np.flatnonzero(np.diff(drawn, prepend=-1))
        nth = rank_in_segment(np.append(first, len(drawn)))
        keys.append(np.stack([drawn, nth], 1).view([("drawn", "<i8"), ("nth", "<i8")]).ravel())
        logprobs.append(side.logprobs[order].astype(np.float64))
    _, at_one, at_other = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
    return np.abs(logprobs[0][at_one] - logprobs[1][at_other])


def _log_rest(side: TopKLogprobs, alone: np.ndarray) -> np.ndarray:
    """float64 [P]: log of the mass of the tail and of the head entries that the other side lacks."""
    tail = side.log_tail_nodes[:, TAIL_BETAS.index(1.0)].astype(np.float64)
    mass = segment_sum(np.where(alone, np.exp(side.logprobs.astype(np.float64)), 0.0), side.offsets)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(tail) + mass)
