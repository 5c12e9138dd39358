"""The payload codec: one row's teacher distributions to bytes and back.

docs/format.md specifies every byte. P: positions, N: entries, K: tail nodes.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import zstandard

from formats import segments
from formats.errors import ConfigError, CorruptShardError, UnsupportedVersionError
from formats.tail import TAIL_BETAS
from formats.topk import TopKLogprobs

MAX_BODY_BYTES = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """How payloads are encoded.

    Raises:
        ConfigError: a value out of range.
    """

    probabilities: str = "float32"
    """How logprobs are stored; `float32` is exact."""
    zstd_level: int = 3
    """Compression level, 1 to 19."""

    def __post_init__(self) -> None:
        if self.probabilities != "float32":
            raise ConfigError(f"probabilities must be float32, got {self.probabilities!r}")
        if type(self.zstd_level) is not int or not 1 <= self.zstd_level <= 19:
            raise ConfigError(f"zstd_level must be from 1 to 19, got {self.zstd_level!r}")

    @classmethod
    def lossless(cls) -> "CodecConfig":
        """Exact float32 logprobs and tails; with `max_k` = V the cache is the full distribution."""
        return cls(probabilities="float32")

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Any) -> "CodecConfig":
        """Inverse of `to_dict`.

        Raises:
            UnsupportedVersionError: keys or values that this reader does not know.
        """
        known = {item.name for item in fields(cls)}
        if not isinstance(content, dict) or set(content) != known:
            raise UnsupportedVersionError(
                f"the codec must have the keys {sorted(known)}, got {content!r}; upgrade anneal"
            )
        try:
            return cls(**content)
        except ConfigError as error:
            raise UnsupportedVersionError(f"this codec is not known: {error}; upgrade anneal") from None


class Codec:
    """Encoder and decoder of one configuration and vocabulary. Not shared between threads."""

    def __init__(self, config: CodecConfig, vocab_size: int, max_k: int) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.max_k = min(max_k, vocab_size)
        self._compressor = zstandard.ZstdCompressor(
            level=config.zstd_level, write_checksum=True, write_content_size=True, write_dict_id=False
        )
        self._decompressor = zstandard.ZstdDecompressor()

    def encode(self, topk: TopKLogprobs) -> bytes:
        """The payload of one row; empty for a row without positions.

        Raises:
            ValueError: the contents are invalid or break `vocab_size` or `max_k`.
        """
        if topk.vocab_size != self.vocab_size:
            raise ValueError(f"vocab_size must be {self.vocab_size}, got {topk.vocab_size}")
        topk.validate()
        if len(topk) == 0:
            return b""
        if int(topk.counts.max()) > self.max_k:
            raise ValueError(f"a head must have at most {self.max_k} entries, got {topk.counts.max()}")
        order = segments.segment_order(topk.token_ids, topk.offsets)
        body = b"".join(
            (
                topk.counts.astype("<u4").tobytes(),
                topk.token_ids[order].astype("<u4").tobytes(),
                topk.logprobs[order].astype("<f4").tobytes(),
                topk.log_tail_nodes.astype("<f4").tobytes(),
            )
        )
        if len(body) > MAX_BODY_BYTES:
            raise ValueError(
                f"a row's payload must be below 2 GiB, got {len(body)} bytes; use a smaller max_k"
            )
        return self._compressor.compress(body)

    def decode(self, payload: bytes | memoryview, num_positions: int) -> TopKLogprobs:
        """Inverse of `encode`.

        Raises:
            CorruptShardError: the payload breaks a rule; nothing larger than the rule allows is allocated.
        """
        if num_positions == 0:
            if len(payload):
                raise CorruptShardError("a row without positions must have an empty payload")
            return TopKLogprobs.empty(self.vocab_size)
        body = self._decompress(payload, num_positions)
        entries = len(body) - 4 * num_positions * (1 + len(TAIL_BETAS))
        if entries < 0 or entries % 8:
            raise CorruptShardError("payload sections do not fill the payload")
        n = entries // 8
        counts = np.frombuffer(body, "<u4", num_positions)
        if counts.min() < 1 or counts.max() > self.max_k or int(counts.sum(dtype=np.int64)) != n:
            raise CorruptShardError("head sizes do not match the payload")
        at = 4 * num_positions
        topk = TopKLogprobs(
            segments.offsets_of(counts),
            np.frombuffer(body, "<u4", n, at).astype(np.int32),
            np.frombuffer(body, "<f4", n, at + 4 * n),
            np.frombuffer(body, "<f4", num_positions * len(TAIL_BETAS), at + 8 * n).reshape(
                num_positions, -1
            ),
            self.vocab_size,
        )
        try:
            return topk.validate()
        except ValueError as error:
            raise CorruptShardError(f"payload contents are invalid: {error}") from None

    def _decompress(self, payload: bytes | memoryview, num_positions: int) -> bytes:
        limit = min(MAX_BODY_BYTES, 4 * num_positions * (1 + len(TAIL_BETAS) + 2 * self.max_k))
        try:
            declared = zstandard.frame_content_size(payload)
            if not 0 < declared <= limit:
                raise CorruptShardError(f"a payload must declare 1 to {limit} bytes, got {declared}")
            return self._decompressor.decompress(payload, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise CorruptShardError(f"a payload must be one intact zstd frame: {error}") from None
