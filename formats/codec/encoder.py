"""The writing half of the payload codec: distributions of some rows in, a payload for each out.

The arithmetic is done once for all rows that are handed over together, a few dozen numpy passes with no loop over
positions or entries; then every row's share of the byte planes becomes a zstd frame of its own. So short rows cost
little more than long ones, and a row's bytes do not depend on its company.
"""

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import zstandard

from formats.codec.config import MASS_TOLERANCE, CodecConfig
from formats.codec.layout import MAX_BODY_BYTES, MAX_ROW_POSITIONS, SECTIONS, Layout, to_planes
from formats.codec.quantise import (
    quantise_draws,
    quantise_labels,
    quantise_probabilities,
    quantise_tails,
)
from formats.logprobs import ragged
from formats.logprobs.topk import TopKLogprobs

LABEL_TOLERANCE = 1e-3
"""Nats by which a label's logprob may differ from that of the kept entry that is it."""
Labelled = tuple[TopKLogprobs, np.ndarray]
"""The distributions of a row's P positions, every label's logprob known, and int [P]: the token that comes next at
each of them."""


class _Compressors(threading.local):
    """Those of one thread, which no other may use at the same time, by their level."""

    def __init__(self) -> None:
        self.of_level: dict[int, zstandard.ZstdCompressor] = {}


class Encoder(Layout):
    """Turns rows into payloads; any number of threads may share one. Further arguments as for `Layout`.

    Args:
        stored: the rows were read from a cache. Their sums were checked when they came from a teacher, and are off by
            what was rounded since, which is most where many tokens are equally likely.
    """

    _compressors = _Compressors()

    def __init__(
        self,
        config: CodecConfig,
        vocab_size: int,
        max_k: int,
        ranked_ids: np.ndarray | None = None,
        *,
        stored: bool = False,
    ) -> None:
        super().__init__(config, vocab_size, max_k, ranked_ids)
        self._stored = stored

    def encode(self, topk: TopKLogprobs, label_ids: np.ndarray) -> bytes:
        """The payload of one row; empty for a row without positions.

        Raises:
            ValueError: see `encode_all`.
        """
        return self.encode_all([(topk, label_ids)])[0]

    def encode_all(self, rows: Sequence[Labelled]) -> list[bytes]:
        """The payloads of some rows, the same as one by one.

        Raises:
            ValueError: the contents of a row are invalid, unnormalised, or break `vocab_size` or `max_k`; a label's
                logprob is unknown, or is not that of the kept entry that is it.
        """
        return [self._compress(sections) for sections in self._sections(rows)]

    def sections(self, topk: TopKLogprobs, label_ids: np.ndarray) -> tuple[bytes, ...]:
        """The uncompressed sections of one row, in the order of `SECTIONS`; those of what the configuration
        leaves out are empty.

        Raises:
            ValueError: see `encode_all`.
        """
        return next(self._sections([(topk, label_ids)]))

    def _compress(self, sections: tuple[bytes, ...]) -> bytes:
        filled = [section for section in sections if section]
        if not filled:
            return b""
        stream = self._compressor().compressobj(size=sum(map(len, filled)))
        parts = []
        for section in filled[:-1]:
            parts.append(stream.compress(section))
            parts.append(stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
        parts.append(stream.compress(filled[-1]))
        parts.append(stream.flush(zstandard.COMPRESSOBJ_FLUSH_FINISH))
        return b"".join(parts)

    def _compressor(self) -> zstandard.ZstdCompressor:
        level, mine = self.config.zstd_level, self._compressors.of_level
        if level not in mine:
            mine[level] = zstandard.ZstdCompressor(
                level=level, write_checksum=True, write_content_size=True, write_dict_id=False
            )
        return mine[level]

    # --- the arithmetic -----------------------------------------------------------------------------------

    def _sections(self, rows: Sequence[Labelled]) -> Iterator[tuple[bytes, ...]]:
        """The sections of each row."""
        if not rows:
            return
        for topk, label_ids in rows:
            self._check_sizes(topk, label_ids)
        topk = TopKLogprobs.concatenate([topk for topk, _ in rows]) if len(rows) > 1 else rows[0][0]
        unkept = self._checked(topk, np.concatenate([label_ids for _, label_ids in rows]))
        positions_at = ragged.offsets_of(np.array([len(topk) for topk, _ in rows]))
        entries_at = topk.offsets[positions_at]
        draws_at = topk.draws.offsets[positions_at]
        labels_at = ragged.offsets_of(unkept)[positions_at]
        labels = topk.label_logprobs[unkept]
        labels = labels.view(np.uint32) if self._exact else quantise_labels(labels)
        ids, probabilities, tails = self._distribution_planes(topk)
        columns = [
            (to_planes(topk.counts - 1, self._count_width), positions_at),
            (ids, entries_at),
            (probabilities, entries_at),
            (tails, positions_at),
            (to_planes(labels, self._label_width), labels_at),
        ]
        if self.config.draw_rate:
            draw_ids, draw_logprobs = self._draw_planes(topk)
            columns += [
                (to_planes(topk.draws.counts, self._draw_count_width), positions_at),
                (draw_ids, draws_at),
                (draw_logprobs, draws_at),
            ]
        left_out = (b"",) * (len(SECTIONS) - len(columns))
        for row in range(len(rows)):
            sections = (planes[..., at[row] : at[row + 1]].tobytes() for planes, at in columns)
            yield *sections, *left_out

    def _distribution_planes(self, topk: TopKLogprobs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rank gaps and probabilities of the kept tokens; tails, uint8 [width, K, P]."""
        ranks, logprobs = self._by_rank(topk.token_ids, topk.logprobs, topk.offsets)
        gaps = np.diff(ranks, prepend=-1) - 1
        first = topk.offsets[:-1]
        gaps[first] = ranks[first]
        if self._exact:
            stored_E = logprobs.view(np.uint32)
            stored_KP = np.ascontiguousarray(topk.log_tail_nodes.T).view(np.uint32)
        else:
            config = self.config
            stored_E = quantise_probabilities(logprobs, config.sqrt_steps, config.linear_steps)
            stored_KP = quantise_tails(
                topk.log_tail_nodes,
                self.vocab_size - topk.counts,
                stored_E,
                topk.offsets,
                self._mass_table,
                config.tail_steps,
            )
        width = self._number_width
        return to_planes(gaps, self._id_width), to_planes(stored_E, width), to_planes(stored_KP, width)

    def _draw_planes(self, topk: TopKLogprobs) -> tuple[np.ndarray, np.ndarray]:
        """Of the draws: rank gaps, logprobs."""
        drawn = topk.draws
        ranks, logprobs = self._by_rank(drawn.token_ids, drawn.logprobs, drawn.offsets)
        gaps = np.diff(ranks, prepend=0)
        first = drawn.offsets[:-1][drawn.counts > 0]
        gaps[first] = ranks[first]
        stored = logprobs.view(np.uint32) if self._exact else quantise_draws(logprobs, self.config.draw_steps)
        return to_planes(gaps, self._id_width), to_planes(stored, self._number_width)

    def _by_rank(
        self, token_ids: np.ndarray, logprobs: np.ndarray, offsets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ranks int64, logprobs), by ascending rank within each position."""
        ranks = self._rank_of_id[token_ids] if self._id_of_rank is not None else token_ids
        order = ragged.segment_order(ranks, offsets)
        return ranks[order].astype(np.int64), logprobs[order]

    # --- what is refused ----------------------------------------------------------------------------------

    def _check_sizes(self, topk: TopKLogprobs, label_ids: np.ndarray) -> None:
        if topk.vocab_size != self.vocab_size:
            raise ValueError(f"vocab_size must be {self.vocab_size}, got {topk.vocab_size}")
        if topk.draws.rate != self.config.draw_rate:
            raise ValueError(f"tail draws must have rate {self.config.draw_rate}, got {topk.draws.rate}")
        if len(topk) > MAX_ROW_POSITIONS:
            raise ValueError(f"a row must have at most {MAX_ROW_POSITIONS} positions, got {len(topk)}")
        sizes = (len(topk), topk.num_entries, len(topk.draws.token_ids), len(topk))
        if self.body_bytes(*sizes) > MAX_BODY_BYTES:
            raise ValueError("a row's teacher must be below 2 GiB; use shorter rows or a smaller max_k")
        if np.shape(label_ids) != (len(topk),):
            raise ValueError(f"label_ids must be one per position ({len(topk)}), got {np.shape(label_ids)}")

    def _checked(self, topk: TopKLogprobs, label_ids: np.ndarray) -> np.ndarray:
        """bool [P]: the positions whose label is not kept; everything of them is right."""
        topk.validate()
        if len(topk) and int(topk.counts.max()) > self.max_k:
            raise ValueError(
                f"a head must have at most max_k = {self.max_k} entries, got {topk.counts.max()}"
            )
        if not self._exact and not self._stored and len(topk):
            mass = np.exp(topk.log_partition(1.0).astype(np.float64))
            if not (np.abs(mass - 1) <= MASS_TOLERANCE).all():
                worst = mass[np.argmax(np.abs(mass - 1))]
                raise ValueError(
                    f"head and tail of a position must sum to 1, got {worst:.4g}; "
                    "logprobs must be normalised over the whole vocabulary"
                )
        logprobs = topk.label_logprobs
        if np.isnan(logprobs).any():
            raise ValueError("label_logprobs must be known to be stored, got NaN")
        positions, entries = topk.kept_labels(label_ids)
        known, kept = logprobs[positions], topk.logprobs[entries]
        with np.errstate(invalid="ignore"):
            same = (known == kept) | (np.abs(known - kept) <= LABEL_TOLERANCE)
        if not same.all():
            at = int(np.argmin(same))
            raise ValueError(
                "label_logprobs must be those of the tokens that come next, got "
                f"{known[at]:.4g} for a kept token of {kept[at]:.4g}; check that rows are not shifted"
            )
        unkept = np.ones(len(topk), np.bool_)
        unkept[positions] = False
        return unkept
