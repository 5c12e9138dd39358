"""The simple way to write a cache: one process, rows appended in order.

    with CacheWriter("cache", identity=identity, vocab_size=V) as writer:
        for row in rows:
            writer.append(row, teacher_of(row))

For people with a teacher of their own, and for tests; `anneal cache build` has a resumable path of its own.
"""

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from formats.capture_settings import CaptureSettings
from formats.codec.config import CodecConfig
from formats.disk.durable import atomic_write_bytes, commit_exclusive, temporary_name
from formats.disk.manifest import MAX_COUNT, Manifest, ShardInfo, check_name, shard_name
from formats.disk.shard import MAX_ROWS_PER_BATCH, ROWS_PER_BATCH, ShardWriter
from formats.disk.token_row import TokenRow
from formats.errors import ConfigError, FormatError
from formats.identity.teacher_identity import TeacherIdentity
from formats.logprobs.topk import TopKLogprobs

ROWS_PER_SHARD = 4096


class CacheWriter:
    """Appends rows and rolls over to a new shard every `rows_per_shard`; `close` writes the manifest.

    Without `close` (or when the `with` block raises) there is no manifest and hence no cache.

    Args:
        directory: new or empty.
        identity: a `TeacherIdentity`, or its `to_dict()`.
        vocab_size: V of the teacher.
        positions, min_prob, max_k: what the teacher's distributions are, see `CaptureSettings`; 0 says that
            no entry was left out for its probability.
        codec: how to encode them, with the rate of their draws.
        stored: the distributions were read from another cache, see `Encoder`.

    Raises:
        FormatError: the directory exists and is not empty, or the manifest could not be written with these settings.
        ConfigError: settings out of range, or an identity that is none.
        ValueError: rows and teacher outputs that do not fit together.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        identity: Any,
        vocab_size: int,
        positions: str = CaptureSettings.positions,
        min_prob: float = 0.0,
        max_k: int = CaptureSettings.max_k,
        codec: CodecConfig | None = None,
        rows_per_shard: int = ROWS_PER_SHARD,
        rows_per_batch: int = ROWS_PER_BATCH,
        stored: bool = False,
    ) -> None:
        self.directory = Path(directory)
        for name, value, most in (
            ("rows_per_shard", rows_per_shard, MAX_COUNT),
            ("rows_per_batch", rows_per_batch, MAX_ROWS_PER_BATCH),
        ):
            if not 1 <= value <= most:
                raise ConfigError(f"{name} must be from 1 to {most}, got {value!r}")
        codec = codec if codec is not None else CodecConfig()
        if not stored:
            codec.require_codes(min_prob, min(max_k, vocab_size))
        identity = identity if isinstance(identity, dict) else identity.to_dict()
        TeacherIdentity.from_dict(identity)
        self._rows_per_shard = rows_per_shard
        self._shard_options = {
            "vocab_size": vocab_size,
            "positions": positions,
            "max_k": min(max_k, vocab_size),
            "codec": codec,
            "rows_per_batch": rows_per_batch,
            "stored": stored,
        }
        self._manifest = {
            "identity": identity,
            "min_prob": min_prob,
            **{name: self._shard_options[name] for name in ("codec", "positions", "max_k", "vocab_size")},
        }
        # What cannot be said of a cache is refused now, and not when all its rows are written.
        Manifest(shards=[], **self._manifest)  # type: ignore[arg-type]
        self.directory.mkdir(parents=True, exist_ok=True)
        if any(self.directory.iterdir()):
            raise FormatError(
                f"a new cache needs an empty directory, got {self.directory}; choose another or empty it"
            )
        self._shards: list[ShardInfo] = []
        self._files: dict[str, str] = {}
        self._writer: ShardWriter | None = None
        self._temporary = Path()
        self._rows_in_shard = 0

    def append(self, row: TokenRow, teacher: TopKLogprobs) -> None:
        """Add one example."""
        if self._writer is None:
            self._temporary = temporary_name(self.directory / shard_name(len(self._shards)))
            self._writer = ShardWriter(self._temporary, **self._shard_options)  # type: ignore[arg-type]
        self._writer.append(row, teacher)
        self._rows_in_shard += 1
        if self._rows_in_shard == self._rows_per_shard:
            self._finish_shard()

    def add_file(self, name: str, data: bytes) -> None:
        """Store an auxiliary file such as `tokenizer.json`."""
        atomic_write_bytes(self.directory / check_name(name), data)
        self._files[name] = hashlib.sha256(data).hexdigest()

    def _finish_shard(self) -> None:
        if self._writer is None:
            return
        name = shard_name(len(self._shards))
        info = self._writer.close(name)
        self._writer, self._rows_in_shard = None, 0
        commit_exclusive(self._temporary, self.directory / name)
        self._shards.append(info)

    def close(self) -> Manifest:
        """Finish the last shard and write the manifest: from now on the directory is a cache."""
        self._finish_shard()
        shards, files = self._shards, self._files
        manifest = Manifest(shards=shards, files=files, **self._manifest)  # type: ignore[arg-type]
        manifest.write(self.directory)
        return manifest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._writer is not None:
            self._writer.abort()
