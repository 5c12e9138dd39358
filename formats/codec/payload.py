"""The payload codec: one row's teacher distributions to bytes and back. docs/format.md specifies every byte.

Heads are sorted by token rank and stored as rank gaps; every number is split into byte planes (all low
bytes, then all high bytes), plane after plane in one zstd frame whose blocks end with the sections, so that
each section gets entropy tables of its own. Encoding and decoding are a few dozen numpy passes over a row,
with no loop over positions or entries.

The codec is told the *label* of every position, the token that comes next: where it is among the kept tokens
its logprob is theirs and is not stored again.

P: positions, E: kept entries, K: tail nodes, S: tail draws, U: labels that are not kept.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import zstandard

from formats.codec.config import CodecConfig
from formats.codec.quantise import (
    dequantise_draws,
    dequantise_labels,
    dequantise_tails,
    probability_tables,
    quantise_draws,
    quantise_labels,
    quantise_probabilities,
    quantise_tails,
)
from formats.codec.rank_table import permutations
from formats.errors import CorruptShardError
from formats.logprobs import ragged
from formats.logprobs.tail_draws import TailDraws, most_draws
from formats.logprobs.tail_function import TAIL_BETAS
from formats.logprobs.topk import TopKLogprobs

MAX_BODY_BYTES = (1 << 31) - 1
MAX_ROW_POSITIONS = 1 << 22
MASS_TOLERANCE = 0.02
LABEL_TOLERANCE = 1e-3
"""Nats by which a label's logprob may differ from that of the kept entry that is it."""
SECTIONS = ("counts", "ids", "probabilities", "tails", "labels", "draw_counts", "draw_ids", "draw_logprobs")


def bytes_for(largest: int) -> int:
    """Byte planes that hold the numbers 0 to `largest`."""
    return max(1, (int(largest).bit_length() + 7) // 8)


def to_planes(values: np.ndarray, width: int) -> bytes:
    """All low bytes, then all second bytes, ...: `width` planes."""
    as_bytes = np.ascontiguousarray(values, dtype="<u4").view(np.uint8).reshape(-1, 4)
    return np.ascontiguousarray(as_bytes[:, :width].T).tobytes()


def from_planes(body: np.ndarray, start: int, count: int, width: int) -> np.ndarray:
    """uint32 [count]: the inverse of `to_planes`, read at body[start:]."""
    planes = body[start : start + count * width].reshape(width, count)
    values = planes[0].astype(np.uint32)
    for k in range(1, width):
        values |= planes[k].astype(np.uint32) << np.uint32(8 * k)
    return values


class Codec:
    """Encoder and decoder of one configuration, vocabulary and rank table. Not shared between threads.

    Args:
        config: what to store and how finely.
        vocab_size: V.
        max_k: the most entries a head may have.
        ranked_ids: int32, frequent token ids first (see `vocabulary.py`); None or empty for id order.
    """

    def __init__(
        self, config: CodecConfig, vocab_size: int, max_k: int, ranked_ids: np.ndarray | None = None
    ) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.max_k = min(max_k, vocab_size)
        self._id_of_rank: np.ndarray | None = None
        if ranked_ids is not None and len(ranked_ids):
            self._id_of_rank, self._rank_of_id = permutations(ranked_ids, vocab_size)
        self._count_width = bytes_for(self.max_k - 1)
        self._id_width = bytes_for(vocab_size - 1)
        self._most_draws = most_draws(vocab_size, config.draw_rate) if config.draw_rate else 0
        self._draw_count_width = bytes_for(self._most_draws)
        self._exact = config.probabilities == "float32"
        self._number_width = 4 if self._exact else 2
        self._label_width = 4 if self._exact else 1
        self._logprob_table, self._mass_table = probability_tables(config.sqrt_steps, config.linear_steps)
        self._compressor = zstandard.ZstdCompressor(
            level=config.zstd_level, write_checksum=True, write_content_size=True, write_dict_id=False
        )
        self._decompressor = zstandard.ZstdDecompressor()

    def body_bytes(
        self, num_positions: int, num_entries: int, num_draws: int = 0, num_labels: int = 0
    ) -> int:
        """Bytes of a row before compression; `num_labels` counts the labels that are not kept."""
        per_position = self._count_width + self._number_width * len(TAIL_BETAS)
        if self.config.draw_rate:
            per_position += self._draw_count_width
        per_token = self._id_width + self._number_width
        tokens = (num_entries + num_draws) * per_token
        return num_positions * per_position + tokens + num_labels * self._label_width

    # --- encoding -----------------------------------------------------------------------------------------

    def sections(self, topk: TopKLogprobs, label_ids: np.ndarray) -> tuple[bytes, ...]:
        """The uncompressed sections of one row, in the order of `SECTIONS`; those of what the configuration
        leaves out are empty.

        Args:
            topk: of P positions, every label's logprob known.
            label_ids: int [P]: the token that comes next at every position.

        Raises:
            ValueError: the contents are invalid, unnormalised, or break `vocab_size` or `max_k`; a label's
                logprob is unknown, or is not that of the kept entry that is it.
        """
        labels = self._checked_labels(topk, label_ids)
        ranks, logprobs = self._by_rank(topk.token_ids, topk.logprobs, topk.offsets)
        gaps = np.diff(ranks, prepend=-1) - 1
        first = topk.offsets[:-1]
        gaps[first] = ranks[first]
        if self._exact:
            probabilities = to_planes(logprobs.view(np.uint32), 4)
            tails = to_planes(np.ascontiguousarray(topk.log_tail_nodes.T).view(np.uint32).ravel(), 4)
        else:
            config = self.config
            codes = quantise_probabilities(logprobs, config.sqrt_steps, config.linear_steps)
            probabilities = to_planes(codes, 2)
            stored = quantise_tails(
                topk.log_tail_nodes,
                self.vocab_size - topk.counts,
                codes,
                topk.offsets,
                self._mass_table,
                config.tail_steps,
            )
            tails = to_planes(stored.ravel(), 2)
        return (
            to_planes(topk.counts - 1, self._count_width),
            to_planes(gaps, self._id_width),
            probabilities,
            tails,
            labels,
            *self._draw_sections(topk.draws),
        )

    def _draw_sections(self, drawn: TailDraws) -> tuple[bytes, bytes, bytes]:
        if not self.config.draw_rate:
            return b"", b"", b""
        ranks, logprobs = self._by_rank(drawn.token_ids, drawn.logprobs, drawn.offsets)
        gaps = np.diff(ranks, prepend=0)
        first = drawn.offsets[:-1][drawn.counts > 0]
        gaps[first] = ranks[first]
        if self._exact:
            stored = to_planes(logprobs.view(np.uint32), 4)
        else:
            stored = to_planes(quantise_draws(logprobs, self.config.draw_steps), 2)
        return to_planes(drawn.counts, self._draw_count_width), to_planes(gaps, self._id_width), stored

    def _by_rank(
        self, token_ids: np.ndarray, logprobs: np.ndarray, offsets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ranks int64, logprobs), by ascending rank within each position."""
        ranks = self._rank_of_id[token_ids] if self._id_of_rank is not None else token_ids
        order = ragged.segment_order(ranks, offsets)
        return ranks[order].astype(np.int64), logprobs[order]

    def _checked_labels(self, topk: TopKLogprobs, label_ids: np.ndarray) -> bytes:
        """The section of the labels; checks everything else as well."""
        self._check(topk)
        if np.shape(label_ids) != (len(topk),):
            raise ValueError(f"label_ids must be one per position ({len(topk)}), got {np.shape(label_ids)}")
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
        unkept = np.delete(logprobs, positions)
        if self._exact:
            return to_planes(unkept.view(np.uint32), 4)
        return quantise_labels(unkept).tobytes()

    def _check(self, topk: TopKLogprobs) -> None:
        if topk.vocab_size != self.vocab_size:
            raise ValueError(f"vocab_size must be {self.vocab_size}, got {topk.vocab_size}")
        if topk.draws.rate != self.config.draw_rate:
            raise ValueError(f"tail draws must have rate {self.config.draw_rate}, got {topk.draws.rate}")
        if len(topk) > MAX_ROW_POSITIONS:
            raise ValueError(f"a row must have at most {MAX_ROW_POSITIONS} positions, got {len(topk)}")
        topk.validate()
        if len(topk) and int(topk.counts.max()) > self.max_k:
            raise ValueError(
                f"a head must have at most max_k = {self.max_k} entries, got {topk.counts.max()}"
            )
        sizes = (len(topk), topk.num_entries, len(topk.draws.token_ids), len(topk))
        if self.body_bytes(*sizes) > MAX_BODY_BYTES:
            raise ValueError("a row's teacher must be below 2 GiB; use shorter rows or a smaller max_k")
        if not self._exact and len(topk):
            mass = np.exp(topk.log_partition(1.0).astype(np.float64))
            if not (np.abs(mass - 1) <= MASS_TOLERANCE).all():
                worst = mass[np.argmax(np.abs(mass - 1))]
                raise ValueError(
                    f"head and tail of a position must sum to 1, got {worst:.4g}; "
                    "logprobs must be normalised over the whole vocabulary"
                )

    def encode(self, topk: TopKLogprobs, label_ids: np.ndarray) -> bytes:
        """The payload of one row; empty for a row without positions.

        Args:
            topk, label_ids: see `sections`.

        Raises:
            ValueError: see `sections`.
        """
        sections = [section for section in self.sections(topk, label_ids) if section]
        if len(topk) == 0:
            return b""
        stream = self._compressor.compressobj(size=sum(map(len, sections)))
        parts = []
        for section in sections[:-1]:
            parts.append(stream.compress(section))
            parts.append(stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
        parts.append(stream.compress(sections[-1]))
        parts.append(stream.flush(zstandard.COMPRESSOBJ_FLUSH_FINISH))
        return b"".join(parts)

    # --- decoding -----------------------------------------------------------------------------------------

    def decode(self, payload: bytes | memoryview, label_ids: np.ndarray) -> TopKLogprobs:
        """Inverse of `encode`; entries come in rank order.

        Args:
            label_ids: int [P]: the token that comes next at every position.

        Raises:
            CorruptShardError: the payload breaks a rule; nothing larger than the rules allow is allocated.
        """
        num_positions = len(label_ids)
        if num_positions == 0:
            if len(payload):
                raise CorruptShardError("a row without positions must have an empty payload")
            return TopKLogprobs.empty(self.vocab_size, self.config.draw_rate)
        body = self._decompress(payload, num_positions)
        at = num_positions * self._count_width
        counts = from_planes(body, 0, num_positions, self._count_width).astype(np.int64) + 1
        n = int(counts.sum())
        if int(counts.max()) > self.max_k or len(body) < self.body_bytes(num_positions, n):
            raise CorruptShardError("head sizes do not match the payload")
        offsets = ragged.offsets_of(counts)
        token_ids = self._decode_ids(from_planes(body, at, n, self._id_width), offsets, counts)
        at += n * self._id_width
        codes = from_planes(body, at, n, self._number_width)
        at += n * self._number_width
        stored = from_planes(body, at, num_positions * len(TAIL_BETAS), self._number_width)
        stored = stored.reshape(len(TAIL_BETAS), num_positions)
        at += num_positions * len(TAIL_BETAS) * self._number_width
        if self._exact:
            logprobs = codes.view(np.float32)
            nodes = np.ascontiguousarray(stored.view(np.float32).T)
            bound = np.log(self.vocab_size) + 1e-3
            if not ((logprobs <= 1e-3).all() and (nodes <= bound).all()):
                raise CorruptShardError("logprobs must be at most 0 and tails at most log V")
        else:
            if int(codes.max()) >= len(self._logprob_table):
                raise CorruptShardError("a probability code is above the largest one")
            logprobs = self._logprob_table[codes]
            nodes = dequantise_tails(
                stored, self.vocab_size - counts, codes, offsets, self._mass_table, self.config.tail_steps
            )
        unknown = np.full(num_positions, np.nan, np.float32)
        none = TailDraws.none(num_positions)
        topk = TopKLogprobs(offsets, token_ids, logprobs, nodes, self.vocab_size, none, unknown)
        positions, entries = topk.kept_labels(label_ids)
        num_labels = num_positions - len(positions)
        drawn = self._decode_draws(body, at + num_labels * self._label_width, num_positions, n, num_labels)
        labels = np.empty(num_positions, np.float32)
        labels[positions] = logprobs[entries]
        rest = np.ones(num_positions, np.bool_)
        rest[positions] = False
        labels[rest] = self._decode_labels(from_planes(body, at, num_labels, self._label_width))
        return replace(topk, draws=drawn, label_logprobs=labels)

    def _decode_labels(self, stored: np.ndarray) -> np.ndarray:
        if not self._exact:
            return dequantise_labels(stored)
        logprobs = stored.view(np.float32)
        if not (logprobs <= 1e-3).all():
            raise CorruptShardError("logprobs of labels must be at most 0")
        return logprobs

    def _decode_draws(
        self, body: np.ndarray, at: int, num_positions: int, num_entries: int, num_labels: int
    ) -> TailDraws:
        """The last three sections, from body[at:]; checks that the body ends with them."""
        config = self.config
        num_draws = 0
        if len(body) < self.body_bytes(num_positions, num_entries, 0, num_labels):
            raise CorruptShardError("labels that are not kept do not match the payload")
        if config.draw_rate:
            width = self._draw_count_width
            counts = from_planes(body, at, num_positions, width).astype(np.int64)
            at += num_positions * width
            num_draws = int(counts.sum())
            if int(counts.max()) > self._most_draws:
                raise CorruptShardError(f"a position must have at most {self._most_draws} draws")
        if len(body) != self.body_bytes(num_positions, num_entries, num_draws, num_labels):
            raise CorruptShardError("head sizes, labels or numbers of draws do not match the payload")
        if not config.draw_rate:
            return TailDraws.none(num_positions)
        offsets = ragged.offsets_of(counts)
        running = np.zeros(num_draws + 1, np.int64)
        np.cumsum(from_planes(body, at, num_draws, self._id_width), out=running[1:])
        ranks = running[1:] - np.repeat(running[offsets[:-1]], counts)
        if num_draws and int(ranks.max()) >= self.vocab_size:
            raise CorruptShardError("a drawn token id is outside the vocabulary")
        token_ids = ranks.astype(np.int32) if self._id_of_rank is None else self._id_of_rank[ranks]
        at += num_draws * self._id_width
        stored = from_planes(body, at, num_draws, self._number_width)
        logprobs = stored.view(np.float32) if self._exact else dequantise_draws(stored, config.draw_steps)
        if not ((logprobs <= 1e-3) & np.isfinite(logprobs)).all():
            raise CorruptShardError("logprobs of draws must be finite and at most 0")
        return TailDraws(offsets, token_ids, logprobs, config.draw_rate)

    def _decode_ids(self, gaps: np.ndarray, offsets: np.ndarray, counts: np.ndarray) -> np.ndarray:
        # 64 bits: hostile gaps must not wrap around into the vocabulary. Ranks restart in every head, so what
        # had accumulated before it is subtracted.
        running = gaps.astype(np.int64)
        running += 1
        np.cumsum(running, out=running)
        before = np.zeros(len(counts), np.int64)
        before[1:] = running[offsets[1:-1] - 1]
        running -= np.repeat(before + 1, counts)
        if int(running[offsets[1:] - 1].max()) >= self.vocab_size:
            raise CorruptShardError("a token id is outside the vocabulary")
        return running.astype(np.int32) if self._id_of_rank is None else self._id_of_rank[running]

    def _decompress(self, payload: bytes | memoryview, num_positions: int) -> np.ndarray:
        if num_positions > MAX_ROW_POSITIONS:
            raise CorruptShardError(
                f"a row must have at most {MAX_ROW_POSITIONS} positions, got {num_positions}"
            )
        least = self.body_bytes(num_positions, num_positions)
        draws = num_positions * self._most_draws
        largest = self.body_bytes(num_positions, num_positions * self.max_k, draws, num_positions)
        most = min(MAX_BODY_BYTES, largest)
        try:
            declared = zstandard.frame_content_size(payload)
            if not least <= declared <= most:
                raise CorruptShardError(f"a payload must declare {least} to {most} bytes, got {declared}")
            if not payload[4] & 4:
                raise CorruptShardError("a payload must carry a checksum")
            body = self._decompressor.decompress(payload, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise CorruptShardError(f"a payload must be one intact zstd frame: {error}") from None
        if len(body) != declared:
            raise CorruptShardError(f"a payload must hold the {declared} bytes it declares, got {len(body)}")
        return np.frombuffer(body, np.uint8)


def section_bytes(codec: Codec, rows: Sequence[tuple[TopKLogprobs, np.ndarray]]) -> dict[str, float]:
    """Compressed bytes of each section of the codec over some rows and their label ids: compressed alone,
    scaled to the payloads' sum."""
    names = SECTIONS[:5] + SECTIONS[5:] * (codec.config.draw_rate > 0)
    alone = dict.fromkeys(names, 0)
    total = 0
    compressor = zstandard.ZstdCompressor(level=codec.config.zstd_level, write_content_size=False)
    for row, label_ids in rows:
        if len(row):
            total += len(codec.encode(row, label_ids))
            for name, section in zip(SECTIONS, codec.sections(row, label_ids), strict=True):
                if section:
                    alone[name] += len(compressor.compress(section))
    scale = total / max(1, sum(alone.values()))
    return {name: size * scale for name, size in alone.items()}
