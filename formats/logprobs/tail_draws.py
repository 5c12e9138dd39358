"""Tail draws: a few tokens drawn from a position's tail, which make sums over the whole tail estimable.

Heads and tail masses leave most of the tail unknown. A draw is a token of the tail together
with its logprob. Tokens are drawn so that token j is expected

    rate * exp(l_j) ** (3 / 4)

times, whatever else is in the tail. Any sum over the tail then has an unbiased estimate (Horvitz and
Thompson, "A generalization of sampling without replacement from a finite universe", 1952): add up each
draw's term over its expected number. The exponent lies between that which suits T = 1 best, 1, and that for
T = 2, 1/2; it costs 2 % of noise at the first and saves a quarter at the second (docs/method.md).

Draws of a position are *systematic*: the expected numbers of its tail tokens are laid end to end, and the
points u, u + 1, u + 2, ... pick tokens. u is even in [0, 1) and comes from the row's content key and the
position (`starts`), so a build draws the same tokens again.

P: positions, S: draws of all positions, N: tokens considered.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from formats.capture_settings import MAX_RATE
from formats.logprobs import ragged

POWER = 0.75
_GOLDEN = (5**0.5 - 1) / 2


def starts(key: bytes, positions_P: np.ndarray) -> np.ndarray:
    """float64 [P] in [0, 1): where the points of each position begin.

    Steps of the golden ratio spread neighbouring positions evenly; the content key shifts the row.
    """
    first = int.from_bytes(key[:8], "little") / 2.0**64
    return (first + _GOLDEN * np.asarray(positions_P, np.float64)) % 1.0


def most_draws(vocab_size: int, rate: int) -> int:
    """The most draws a position can have: sum p^(3/4) over V tokens is at most V^(1/4)."""
    root = max(1, int(vocab_size**0.25))
    while root**4 < vocab_size:
        root += 1
    return rate * root + 1


@dataclass(frozen=True, eq=False)
class TailDraws:
    """Draws of P positions. A token that was drawn twice is there twice; the order carries no meaning.

    Raises:
        ValueError: the arrays do not fit together.
    """

    offsets: np.ndarray
    """int64 [P + 1]: draws of position p are `offsets[p]:offsets[p + 1]`; starts at 0."""
    token_ids: np.ndarray
    """int32 [S]: tokens outside the position's head."""
    logprobs: np.ndarray
    """float32 [S]: natural log, temperature 1, normalised over the whole vocabulary."""
    rate: int
    """Expected draws of a token over the power `POWER` of its probability; 0 where nothing is drawn."""

    def __post_init__(self) -> None:
        for name, dtype in (("offsets", np.int64), ("token_ids", np.int32), ("logprobs", np.float32)):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=dtype))
        ends = len(self.offsets) > 0 and self.offsets[0] == 0 and self.offsets[-1] == len(self.token_ids)
        if not ends or self.token_ids.shape != self.logprobs.shape or self.token_ids.ndim != 1:
            raise ValueError("draws need offsets from 0 to their number, and a logprob for every token")
        if not 0 <= self.rate <= MAX_RATE:
            raise ValueError(f"the rate of draws must be from 0 to {MAX_RATE}, got {self.rate}")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def counts(self) -> np.ndarray:
        """int64 [P]: draws of each position."""
        return np.diff(self.offsets)

    @property
    def weights(self) -> np.ndarray:
        """float32 [S]: the reciprocal of each drawn token's expected number of draws."""
        # No capture draws a token below e^-100, whose number would leave the range of float32.
        power = np.float32(-POWER) * np.maximum(self.logprobs, np.float32(-100))
        return np.exp(power) / np.float32(max(self.rate, 1))

    @staticmethod
    def none(num_positions: int, rate: int = 0) -> "TailDraws":
        """No draws for so many positions."""
        empty = np.zeros(0)
        return TailDraws(np.zeros(num_positions + 1, np.int64), empty, empty, rate)

    def slice(self, start: int, stop: int) -> "TailDraws":
        """Positions start to stop; views, nothing is copied."""
        a, b = int(self.offsets[start]), int(self.offsets[stop])
        offsets = self.offsets[start : stop + 1] - a
        return TailDraws(offsets, self.token_ids[a:b], self.logprobs[a:b], self.rate)

    def take(self, chosen_P: np.ndarray) -> "TailDraws":
        """The positions with these indices, in that order, copied."""
        offsets, source = ragged.taken(self.offsets, chosen_P)
        return TailDraws(offsets, self.token_ids[source], self.logprobs[source], self.rate)

    @staticmethod
    def concatenate(parts: Sequence["TailDraws"]) -> "TailDraws":
        """All positions of all parts, of which there is at least one.

        Raises:
            ValueError: parts of different rates.
        """
        rates = sorted({part.rate for part in parts})
        if len(rates) != 1:
            raise ValueError(f"all parts must share one rate of draws, got {rates}")
        return TailDraws(
            ragged.offsets_of(np.concatenate([part.counts for part in parts])),
            np.concatenate([part.token_ids for part in parts]),
            np.concatenate([part.logprobs for part in parts]),
            rates[0],
        )

    def joined(self, other: "TailDraws") -> "TailDraws":
        """The draws of both, position by position.

        Raises:
            ValueError: other positions, or another rate.
        """
        if len(self) != len(other):
            raise ValueError(f"draws must be of {len(self)} positions, got {len(other)}")
        both = TailDraws.concatenate([self, other])
        position = np.concatenate([ragged.segment_of(self.offsets), ragged.segment_of(other.offsets)])
        order = np.argsort(position, kind="stable")
        offsets = self.offsets + other.offsets
        return TailDraws(offsets, both.token_ids[order], both.logprobs[order], self.rate)


def draw(
    offsets: np.ndarray, token_ids: np.ndarray, logprobs: np.ndarray, rate: int, starts_P: np.ndarray
) -> TailDraws:
    """Systematic draws among the given tokens of each position: slow and plain, where tails are explicit.

    Args:
        offsets: int64 [P + 1]: the tokens of position p are `offsets[p]:offsets[p + 1]`.
        token_ids, logprobs: [N] each.
        rate: as in `TailDraws`.
        starts_P: float64 [P] in [0, 1), see `starts`.
    """
    expected = rate * np.exp(POWER * logprobs.astype(np.float64))
    running = np.concatenate([[0.0], np.cumsum(expected)])
    ends = running[1:] - np.repeat(running[offsets[:-1]], np.diff(offsets))
    ends -= np.repeat(starts_P, np.diff(offsets))  # above -1, whatever the rounding
    points = np.ceil(ends).astype(np.int64)  # so many points lie below the end of each token
    before = np.concatenate([[0], points[:-1]])[: len(points)]
    hits = np.where(ragged.rank_in_segment(offsets) == 0, points, points - before)
    counts = ragged.segment_sum(hits, offsets)
    return TailDraws(ragged.offsets_of(counts), np.repeat(token_ids, hits), np.repeat(logprobs, hits), rate)
