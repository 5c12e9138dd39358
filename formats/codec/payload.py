"""The payload codec: one row's teacher distributions to bytes and back. docs/format.md specifies every byte.

Heads are sorted by token rank and stored as rank gaps; every number is split into byte planes (all low
bytes, then all high bytes), plane after plane in one zstd frame whose blocks end with the sections, so that
each section gets entropy tables of its own. The writing half is in `encoder.py`; this is the reading half, a few
dozen numpy passes over a row, with no loop over positions or entries.

The codec is told the *label* of every position, the token that comes next: where it is among the kept tokens
its logprob is theirs and is not stored again.

P: positions, E: kept entries, K: tail nodes, S: tail draws, U: labels that are not kept.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import zstandard

from formats.codec.encoder import Encoder
from formats.codec.layout import MAX_BODY_BYTES, MAX_ROW_POSITIONS, SECTIONS, from_planes
from formats.codec.quantise import dequantise_draws, dequantise_labels, dequantise_tails
from formats.errors import CorruptShardError
from formats.logprobs import ragged
from formats.logprobs.tail_draws import TailDraws
from formats.logprobs.tail_function import TAIL_BETAS
from formats.logprobs.topk import TopKLogprobs


class Codec(Encoder):
    """Encoder and decoder of one configuration, vocabulary and rank table; arguments as for `Encoder`. Any number of
    threads may encode with it, one may decode."""

    @cached_property
    def _decompressor(self) -> zstandard.ZstdDecompressor:
        return zstandard.ZstdDecompressor()

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
