"""Packed teacher logprobs of many positions: the ragged in-memory form that every part of the program
exchanges.

A position keeps its *head*, the tokens with p >= min_prob (always the most probable one), as ids and
logprobs, and the *tail function* of everything else at a few temperatures (see `tail_function.py`). From
these the T-softmax of the head and its exact mass follow at any temperature:

    log Z_T = log(sum_head exp(beta * l_j) + exp(A(beta))),    p_T(j) = exp(beta * l_j) / Z_T,    beta = 1/T.

It may also keep a few *tail draws*, single tokens of the tail (see `tail_draws.py`), and it keeps the
logprob of its *label*, the token that actually comes next, whether that one is kept or not.

No Python object per token: a few flat arrays. P: positions, E: kept entries of all positions, K: tail nodes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from formats.logprobs import ragged, tail_draws, tail_function
from formats.logprobs.tail_draws import TailDraws
from formats.logprobs.tail_function import TAIL_BETAS

MAX_VOCAB_SIZE = 1 << 20
_Selection = slice | np.ndarray
_FIELDS = (
    ("offsets", np.int64),
    ("token_ids", np.int32),
    ("logprobs", np.float32),
    ("label_logprobs", np.float32),
)


@dataclass(frozen=True, eq=False)
class TopKLogprobs:
    """Heads and tails of P positions. The order of the entries within a head carries no meaning.

    Raises:
        ValueError: the arrays do not fit together; `validate` checks their contents as well.
    """

    offsets: np.ndarray
    """int64 [P+1]: entries of position p are `offsets[p]:offsets[p + 1]`; starts at 0."""
    token_ids: np.ndarray
    """int32 [E]: token ids, distinct within a position."""
    logprobs: np.ndarray
    """float32 [E]: natural log, temperature 1, normalised over the whole vocabulary."""
    log_tail_nodes: np.ndarray
    """float32 [P, len(TAIL_BETAS)]: A(beta) at the nodes; -inf where the head is the whole vocabulary."""
    vocab_size: int
    """V: tokens the teacher can predict, without padding."""
    draws: TailDraws
    """Tokens drawn from the tail of each position; `TailDraws.none` where nothing was drawn."""
    label_logprobs: np.ndarray
    """float32 [P]: natural log, T = 1, of the token that comes next; -inf where it is impossible. NaN means
    unknown: allowed here, for distributions made by hand, and refused by every writer."""

    def __post_init__(self) -> None:
        for name, dtype in _FIELDS:
            array = np.ascontiguousarray(getattr(self, name), dtype=dtype)
            if array.ndim != 1:
                raise ValueError(f"{name} must be one-dimensional, got shape {array.shape}")
            object.__setattr__(self, name, array)
        nodes = np.ascontiguousarray(self.log_tail_nodes, dtype=np.float32)
        object.__setattr__(self, "log_tail_nodes", nodes)
        if len(self.offsets) == 0 or self.offsets[0] != 0 or self.offsets[-1] != len(self.token_ids):
            raise ValueError("offsets must run from 0 to the number of entries")
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(
                "token_ids and logprobs must be equally long, "
                f"got {len(self.token_ids)} and {len(self.logprobs)}"
            )
        if nodes.shape != (len(self), len(TAIL_BETAS)):
            raise ValueError(
                f"log_tail_nodes must have shape {(len(self), len(TAIL_BETAS))}, got {nodes.shape}"
            )
        if len(self.label_logprobs) != len(self):
            raise ValueError(
                f"label_logprobs must be one per position, got {len(self.label_logprobs)} for {len(self)}"
            )
        if len(self.draws) != len(self):
            raise ValueError(f"draws must cover {len(self)} positions, got {len(self.draws)}")
        if not 1 <= self.vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(f"vocab_size must be from 1 to {MAX_VOCAB_SIZE}, got {self.vocab_size}")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_entries(self) -> int:
        """E: kept entries of all positions."""
        return len(self.token_ids)

    @property
    def counts(self) -> np.ndarray:
        """int64 [P]: head size of each position."""
        return np.diff(self.offsets)

    @staticmethod
    def empty(vocab_size: int, draw_rate: int = 0) -> "TopKLogprobs":
        """No positions at all."""
        none, nodes = np.zeros(0), np.zeros((0, len(TAIL_BETAS)))
        return TopKLogprobs(
            np.zeros(1, np.int64), none, none, nodes, vocab_size, TailDraws.none(0, draw_rate), none
        )

    # --- at a temperature -------------------------------------------------------------------------------

    def log_tail(self, temperature: float) -> np.ndarray:
        """float32 [P]: A(1/temperature), the captured value at a node and interpolated between nodes.

        Raises:
            ValueError: the temperature is not finite or below 0.5.
        """
        return tail_function.interpolate(self.log_tail_nodes, self.vocab_size - self.counts, temperature)

    def log_head(self, temperature: float) -> np.ndarray:
        """float32 [P]: log sum_head exp(l_j / temperature), unnormalised."""
        beta = np.float32(tail_function.check_temperature(temperature))
        return ragged.segment_logsumexp(beta * self.logprobs, self.offsets)

    def log_partition(self, temperature: float) -> np.ndarray:
        """float32 [P]: log Z_T; 0 up to rounding at temperature 1."""
        return np.logaddexp(self.log_head(temperature), self.log_tail(temperature))

    def head_mass(self, temperature: float) -> np.ndarray:
        """float32 [P]: the probability P_T of the head at this temperature."""
        with np.errstate(over="ignore"):
            return 1 / (1 + np.exp(self.log_tail(temperature) - self.log_head(temperature)))

    def kept_labels(self, label_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(positions whose label is kept, ascending; the entry that is it), int64 [at most P] each.

        Args:
            label_ids: int [P], the token that comes next at every position.
        """
        entries = np.flatnonzero(self.token_ids == np.repeat(label_ids, self.counts))
        return np.searchsorted(self.offsets, entries, side="right") - 1, entries

    # --- selection --------------------------------------------------------------------------------------

    def slice(self, start: int, stop: int) -> "TopKLogprobs":
        """Positions start to stop, 0 <= start <= stop <= P; views, nothing is copied."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"slice must lie within 0..{len(self)}, got {start}:{stop}")
        a, b = int(self.offsets[start]), int(self.offsets[stop])
        offsets = self.offsets[start : stop + 1] - a
        return self._selected(offsets, slice(a, b), slice(start, stop), self.draws.slice(start, stop))

    def take(self, positions: np.ndarray) -> "TopKLogprobs":
        """The given positions (indices or boolean mask), in that order, copied."""
        chosen = np.arange(len(self))[np.asarray(positions)]
        offsets, source = ragged.taken(self.offsets, chosen)
        return self._selected(offsets, source, chosen, self.draws.take(chosen))

    def _selected(
        self,
        offsets: np.ndarray,
        entries: _Selection,
        positions: _Selection,
        draws: TailDraws,
    ) -> "TopKLogprobs":
        """These entries and positions, with new offsets and draws."""
        return replace(
            self,
            offsets=offsets,
            token_ids=self.token_ids[entries],
            logprobs=self.logprobs[entries],
            log_tail_nodes=self.log_tail_nodes[positions],
            draws=draws,
            label_logprobs=self.label_logprobs[positions],
        )

    @staticmethod
    def concatenate(parts: Sequence["TopKLogprobs"]) -> "TopKLogprobs":
        """All positions of all parts.

        Raises:
            ValueError: no parts (use `empty`), or parts of different vocabularies or rates of draws.
        """
        if not parts:
            raise ValueError("concatenate needs at least one part, got none; use TopKLogprobs.empty")
        sizes = sorted({part.vocab_size for part in parts})
        if len(sizes) > 1:
            raise ValueError(f"all parts must share one vocabulary size, got {sizes}")
        return TopKLogprobs(
            ragged.offsets_of(np.concatenate([part.counts for part in parts])),
            np.concatenate([part.token_ids for part in parts]),
            np.concatenate([part.logprobs for part in parts]),
            np.concatenate([part.log_tail_nodes for part in parts]),
            sizes[0],
            TailDraws.concatenate([part.draws for part in parts]),
            np.concatenate([part.label_logprobs for part in parts]),
        )

    def sorted(self) -> "TopKLogprobs":
        """Entries by descending logprob, ties by ascending id: the order in which people read a head."""
        by_id = ragged.segment_order(self.token_ids, self.offsets)
        order = by_id[ragged.segment_order(-self.logprobs[by_id], self.offsets)]
        return replace(self, token_ids=self.token_ids[order], logprobs=self.logprobs[order])

    def prune(self, min_prob: float = 0.0, max_k: int = MAX_VOCAB_SIZE) -> "TopKLogprobs":
        """What a capture with a higher `min_prob` or a lower `max_k` would have stored.

        Entries with p < min_prob, or beyond the `max_k` most probable, move into the tail *exactly*, at every
        node, and tokens are drawn among them at the same rate as among the others; the most probable entry
        always stays. Ties are broken by ascending id. What is known of the labels stays.

        Raises:
            ValueError: min_prob outside 0..1 or max_k below 1.
        """
        if not 0 <= min_prob <= 1 or max_k < 1:
            raise ValueError(f"min_prob must be from 0 to 1 and max_k at least 1, got {min_prob} and {max_k}")
        head = self.sorted()
        rank = ragged.rank_in_segment(head.offsets)
        with np.errstate(divide="ignore"):
            keep = (rank == 0) | ((head.logprobs >= np.float32(np.log(min_prob))) & (rank < max_k))
        gone = ragged.offsets_of(ragged.segment_sum((~keep).astype(np.int64), head.offsets))
        lost = head.logprobs[~keep]
        nodes = head.log_tail_nodes.astype(np.float64)
        for k, beta in enumerate(TAIL_BETAS):
            nodes[:, k] = np.logaddexp(
                nodes[:, k], ragged.segment_logsumexp(beta * lost.astype(np.float64), gone)
            )
        drawn = self.draws
        if drawn.rate:
            ids = head.token_ids[~keep]
            # Even over what can be pruned, and the same for the same tokens: there is no row's key here.
            seed = hashlib.blake2b(ids.tobytes() + lost.tobytes(), digest_size=8).digest()
            begin = tail_draws.starts(seed, np.arange(len(self)))
            drawn = drawn.joined(tail_draws.draw(gone, ids, lost, drawn.rate, begin))
        return replace(
            self,
            offsets=head.offsets - gone,
            token_ids=head.token_ids[keep],
            logprobs=head.logprobs[keep],
            log_tail_nodes=nodes,
            draws=drawn,
        )

    def validate(self) -> "TopKLogprobs":
        """Check the contents; returns self.

        Raises:
            ValueError: offsets that fall, an empty head, ids outside the vocabulary or repeated within a
                position, logprobs that are NaN or above 0 by more than rounding, tails that are NaN or above
                log V, labels' logprobs above 0 by more than rounding, draws that are not tokens of the tail,
                are more than there can be, or have no probability.
        """
        counts = self.counts
        if (counts < 1).any() or (counts > self.vocab_size).any():
            raise ValueError(
                f"every head must have 1 to {self.vocab_size} entries, got {counts.min()}..{counts.max()}"
            )
        if self.num_entries:
            low, high = int(self.token_ids.min()), int(self.token_ids.max())
            if low < 0 or high >= self.vocab_size:
                raise ValueError(f"token ids must be from 0 to {self.vocab_size - 1}, got {low}..{high}")
            keyed = np.sort(ragged.segment_of(self.offsets) * self.vocab_size + self.token_ids)
            if (keyed[1:] == keyed[:-1]).any():
                raise ValueError("token ids must be distinct within a position, got a repeated one")
            if not (self.logprobs <= 1e-3).all():
                raise ValueError("logprobs must not be above 0 or NaN")
        if not (self.log_tail_nodes <= np.log(self.vocab_size) + 1e-3).all():
            raise ValueError("tail nodes must not be above log(vocab_size) or NaN")
        if (self.label_logprobs > 1e-3).any():
            raise ValueError("label_logprobs must not be above 0")
        self.validate_draws()
        return self

    def validate_draws(self) -> None:
        """The part of `validate` about draws.

        Raises:
            ValueError: see `validate`.
        """
        drawn = self.draws
        if not len(self):
            return
        low, high = int(drawn.counts.min()), int(drawn.counts.max())
        most = tail_draws.most_draws(self.vocab_size, drawn.rate) if drawn.rate else 0
        if low < 0 or high > most:
            raise ValueError(f"a position must have 0 to {most} draws, got {low}..{high}")
        if not len(drawn.token_ids):
            return
        if not 0 <= int(drawn.token_ids.min()) <= int(drawn.token_ids.max()) < self.vocab_size:
            raise ValueError(f"drawn token ids must be from 0 to {self.vocab_size - 1}")
        if not ((drawn.logprobs <= 1e-3) & np.isfinite(drawn.logprobs)).all():
            raise ValueError("logprobs of draws must be finite and not above 0")
        # Every token of a position once as an even number, and its successor where it was drawn.
        head = (ragged.segment_of(self.offsets) * self.vocab_size + self.token_ids) * 2
        tail = (ragged.segment_of(drawn.offsets) * self.vocab_size + drawn.token_ids) * 2 + 1
        both = np.sort(np.concatenate([head, tail]))
        if ((both[1:] - both[:-1] == 1) & (both[1:] & 1 == 1)).any():
            raise ValueError("draws must be tokens of the tail, got one of the head")
