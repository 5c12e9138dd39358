"""Teacher targets for a student whose output head is padded less than the teacher's.

Heads are often padded to a round number of rows beyond the tokenizer. The padding's logits were never trained towards
anything, so a teacher gives them a probability near 0, but a lossless cache keeps them and a draw may hit one. Here
they are taken out and the rest is made to sum to 1 again: the teacher's distribution given that the token is one.
"""

from dataclasses import replace

import numpy as np

from formats.errors import FormatError
from formats.logprobs.ragged import offsets_of, segment_of, segment_sum
from formats.logprobs.tail_draws import TailDraws
from formats.logprobs.tail_function import TAIL_BETAS
from formats.logprobs.topk import TopKLogprobs

LARGEST_PADDING = 1e-3
"""Probability of all padding of a position together, above which the teacher is not taken for one that is padded."""


def without_padding(topk: TopKLogprobs, vocab_size: int | None, where: str = "the cache") -> TopKLogprobs:
    """The same positions over the first `vocab_size` tokens; None, or a cache of so many, changes nothing.

    What the tail holds of the padding, known as a mass only, stays in the tail.

    Raises:
        FormatError: padding has a probability that no padding has.
    """
    if vocab_size is None or vocab_size >= topk.vocab_size:
        return topk
    kept_N = topk.token_ids < vocab_size
    draws = _real_draws(topk.draws, vocab_size)
    if kept_N.all():
        return replace(topk, vocab_size=vocab_size, draws=draws)
    lost_P = segment_sum(np.where(kept_N, 0.0, np.exp(topk.logprobs.astype(np.float64))), topk.offsets)
    if lost_P.max() > LARGEST_PADDING:
        raise FormatError(
            f"tokens beyond the student's {vocab_size} must be padding, got probability {lost_P.max():.3g} for them in "
            f"{where}: the cache was built by a teacher of another vocabulary"
        )
    row_N = segment_of(topk.offsets)
    more_P = -np.log1p(-lost_P)  # what the logprobs of the others gain
    counts_P = np.bincount(row_N[kept_N], minlength=len(topk))
    return replace(
        topk,
        offsets=offsets_of(counts_P),
        token_ids=topk.token_ids[kept_N],
        logprobs=topk.logprobs[kept_N] + more_P[row_N[kept_N]].astype(np.float32),
        log_tail_nodes=topk.log_tail_nodes + more_P[:, None] * np.asarray(TAIL_BETAS),
        label_logprobs=topk.label_logprobs + more_P.astype(np.float32),
        vocab_size=vocab_size,
        draws=draws,
    )


def _real_draws(draws: TailDraws, vocab_size: int) -> TailDraws:
    """The draws that hit a token; their sum estimates the tail without padding."""
    kept_S = draws.token_ids < vocab_size
    if kept_S.all():
        return draws
    counts_P = np.bincount(segment_of(draws.offsets)[kept_S], minlength=len(draws))
    return TailDraws(offsets_of(counts_P), draws.token_ids[kept_S], draws.logprobs[kept_S], draws.rate)
