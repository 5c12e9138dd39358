"""The label as a kept token of its own, for a KL that leaves it out (`kl_target: masked`).

Where the label is in the tail, it is taken out of it: out of the tail function, exp(A') = exp(A) - exp(beta l), and out
of the draws. Every other token keeps its place, its logprob and its expected number of draws, so the loss has to know
no more than which entry is left out. Stored logprobs of such labels are in 1/16 nats: A' is off by 3 % of the label's
probability, which is below `min_prob`. A' is never less than a drawn token of the rest, nor more than A.

P: positions, E: kept entries, S: draws.
"""

from dataclasses import replace

import numpy as np

from formats.logprobs import ragged
from formats.logprobs.tail_draws import TailDraws
from formats.logprobs.topk import TopKLogprobs

LOWEST = np.float32(-1e4)
"""Stands for the logprob of an impossible label, which is left out anyway."""


def with_labels_kept(
    topk: TopKLogprobs, temperature: float, label_ids_P: np.ndarray, wanted_P: np.ndarray
) -> tuple[TopKLogprobs, np.ndarray, np.ndarray]:
    """(the same with every wanted label kept, A(1/T) of its tails float32 [P], the labels' entries bool [E]).

    The nodes of the tail function stay as they were: only A at this temperature is made anew.
    """
    log_tail_P = np.asarray(topk.log_tail(temperature), dtype=np.float64)
    position_E = ragged.segment_of(topk.offsets)
    is_label_E = topk.token_ids == label_ids_P[position_E]
    missing_P = wanted_P.copy()
    missing_P[position_E[is_label_E]] = False
    is_label_E &= wanted_P[position_E]
    if not missing_P.any():
        return topk, log_tail_P.astype(np.float32), is_label_E
    ends = topk.offsets[1:][missing_P]
    logprobs = np.maximum(topk.label_logprobs[missing_P], LOWEST)
    draws = _without_labels(topk.draws, label_ids_P, missing_P)
    scaled = logprobs.astype(np.float64) / temperature
    before = log_tail_P[missing_P]
    with np.errstate(divide="ignore", invalid="ignore"):
        after = before + np.log1p(-np.exp(np.minimum(scaled - before, 0.0)))
    least = _largest(draws, len(topk))[missing_P] / temperature
    after = np.where(np.isfinite(before), np.minimum(np.maximum(after, least), before), -np.inf)
    after[(topk.vocab_size - topk.counts)[missing_P] <= 1] = -np.inf
    log_tail_P[missing_P] = after
    kept = replace(
        topk,
        offsets=topk.offsets + np.concatenate([[0], np.cumsum(missing_P)]),
        token_ids=np.insert(topk.token_ids, ends, label_ids_P[missing_P]),
        logprobs=np.insert(topk.logprobs, ends, logprobs),
        draws=draws,
    )
    return kept, log_tail_P.astype(np.float32), np.insert(is_label_E, ends, True)


def _without_labels(draws: TailDraws, label_ids_P: np.ndarray, missing_P: np.ndarray) -> TailDraws:
    position_S = ragged.segment_of(draws.offsets)
    stays_S = (draws.token_ids != label_ids_P[position_S]) | ~missing_P[position_S]
    if stays_S.all():
        return draws
    counts_P = np.bincount(position_S[stays_S], minlength=len(draws))
    return TailDraws(
        ragged.offsets_of(counts_P), draws.token_ids[stays_S], draws.logprobs[stays_S], draws.rate
    )


def _largest(draws: TailDraws, num_positions: int) -> np.ndarray:
    """float64 [P]: the largest logprob of a draw, -inf without any."""
    largest = np.full(num_positions, -np.inf)
    np.maximum.at(largest, ragged.segment_of(draws.offsets), draws.logprobs.astype(np.float64))
    return largest
