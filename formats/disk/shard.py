"""One shard: an Arrow IPC file whose rows are training examples. Writer and reader.

The writer flushes a record batch every `ROWS_PER_BATCH` rows, so that row r lies in batch r // rows_per_batch: a
random row is one division, one memory-mapped slice, one decompression. The same input gives the same bytes, by however
many threads it is encoded; the rank table of the ids is learned from the rows that hold the first `SAMPLE_ENTRIES` kept
entries, and from their draws, so until then rows wait in memory. The reader trusts nothing: see `arrow_file.py` for the
container, `formats/codec` for the payload; the content key of every row is recomputed when the row is read, which
checks tokens and mask as well.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from formats.capture_settings import POSITION_MODES, CaptureSettings
from formats.codec.config import CodecConfig
from formats.codec.encoder import Encoder
from formats.codec.payload import Codec
from formats.codec.rank_table import from_text, rank_by_frequency, to_text
from formats.disk.arrow_file import ArrowFile, Batch
from formats.disk.byte_source import Source
from formats.disk.manifest import FORMAT, VERSION, ShardInfo, check_version
from formats.disk.row_encoder import Encoded, EncoderThreads, RowEncoder
from formats.disk.sealed_json import seal, unseal
from formats.disk.token_row import KEY_BYTES, TokenRow, content_key
from formats.errors import CorruptShardError, FormatError
from formats.logprobs.ragged import offsets_of
from formats.logprobs.tail_function import TAIL_BETAS
from formats.logprobs.topk import MAX_VOCAB_SIZE, TopKLogprobs

ROWS_PER_BATCH = 32
SAMPLE_ENTRIES = 1 << 20
MAX_ROWS_PER_BATCH = 1 << 16
METADATA_KEY = b"anneal"
_METADATA_KEYS = {
    "format", "version", "codec", "tail_betas", "positions", "max_k", "vocab_size", "rows_per_batch",
    "ranked_ids",
}  # fmt: skip


class _HashingFile:
    """A file that hashes what is written; the little that pyarrow asks of a Python sink."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb")  # noqa: SIM115
        self.digest = hashlib.sha256()
        self.size = 0
        self.closed = False

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        if not self.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self.closed = True


class ShardWriter:
    """Writes one shard to `path`, which must not exist; the caller commits it under its final name.

    Args:
        pool: threads that encode the rows; None does it within `append`.
        stored: the distributions come from a cache, see `Encoder`.

    Raises:
        FileExistsError: `path` exists.
        ValueError: rows and teacher outputs that do not fit together.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        vocab_size: int,
        positions: str = CaptureSettings.positions,
        max_k: int = CaptureSettings.max_k,
        codec: CodecConfig | None = None,
        rows_per_batch: int = ROWS_PER_BATCH,
        pool: EncoderThreads | None = None,
        stored: bool = False,
    ) -> None:
        if positions not in POSITION_MODES:
            raise ValueError(f"positions must be one of {', '.join(POSITION_MODES)}, got {positions!r}")
        if not 1 <= vocab_size <= MAX_VOCAB_SIZE or max_k < 1:
            raise ValueError(f"vocab_size must be from 1 to {MAX_VOCAB_SIZE} and max_k at least 1")
        self._path = Path(path)
        self._positions = positions
        self._config = codec if codec is not None else CodecConfig()
        self._vocab_size = vocab_size
        self._max_k = min(max_k, vocab_size)
        self._rows_per_batch = rows_per_batch
        self._file = _HashingFile(self._path)
        self._waiting: list[tuple[TokenRow, TopKLogprobs]] = []
        self._pending: list[tuple[TokenRow, bytes]] = []
        self._pool, self._stored = pool, stored
        self._encoder: RowEncoder | None = None
        self._writer: Any = None
        self._counts = dict.fromkeys(("rows", "tokens", "positions", "entries", "payload_bytes"), 0)

    def append(self, row: TokenRow, teacher: TopKLogprobs) -> None:
        """Add one example.

        Raises:
            ValueError: `teacher` has another number of positions than the row, or invalid contents, such as
                labels whose logprob is unknown (which may be noticed a few rows later).
        """
        expected = len(row.positions(self._positions))
        if len(teacher) != expected:
            raise ValueError(
                f"a row needs one teacher distribution per position ({expected}), got {len(teacher)}"
            )
        if len(row) and not 0 <= int(row.input_ids.min()) <= int(row.input_ids.max()) < MAX_VOCAB_SIZE:
            raise ValueError(f"input_ids must be from 0 to {MAX_VOCAB_SIZE - 1}")
        if teacher.vocab_size != self._vocab_size:
            raise ValueError(f"vocab_size must be {self._vocab_size}, got {teacher.vocab_size}")
        for name, value in (
            ("rows", 1),
            ("tokens", len(row)),
            ("positions", len(teacher)),
            ("entries", teacher.num_entries),
        ):
            self._counts[name] += value
        if self._encoder is None:
            self._waiting.append((row, teacher))
            if self._counts["entries"] >= SAMPLE_ENTRIES:
                self._start()
        else:
            self._add(self._encoder.add(row, teacher))

    def _start(self) -> RowEncoder:
        """Fix the rank table, write the header and encode the rows that waited for it."""
        import pyarrow as pa

        ranked_ids = np.zeros(0, np.int32)
        if self._config.rank_ids and self._waiting:
            sample = np.concatenate(
                [ids for _, teacher in self._waiting for ids in (teacher.token_ids, teacher.draws.token_ids)]
            )
            ranked_ids = rank_by_frequency(sample, self._vocab_size)
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "codec": self._config.to_dict(),
            "tail_betas": list(TAIL_BETAS),
            "positions": self._positions,
            "max_k": self._max_k,
            "vocab_size": self._vocab_size,
            "rows_per_batch": self._rows_per_batch,
            "ranked_ids": to_text(ranked_ids),
        }
        self._schema = pa.schema(
            [
                pa.field("key", pa.binary(KEY_BYTES), nullable=False),
                pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
                pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
                pa.field("payload", pa.large_binary(), nullable=False),
            ],
            metadata={METADATA_KEY: seal(metadata)},
        )
        self._writer = pa.ipc.new_file(pa.PythonFile(self._file, mode="w"), self._schema)
        codec = Encoder(self._config, self._vocab_size, self._max_k, ranked_ids, stored=self._stored)
        self._encoder = encoder = RowEncoder(codec, self._positions, self._pool)
        for row, teacher in self._waiting:
            self._add(encoder.add(row, teacher))
        self._waiting.clear()
        return encoder

    def _add(self, encoded: Iterable[Encoded]) -> None:
        for row, payload in encoded:
            self._counts["payload_bytes"] += len(payload)
            self._pending.append((row, payload))
            if len(self._pending) == self._rows_per_batch:
                self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._pending:
            return
        rows = [row for row, _ in self._pending]
        payloads = [payload for _, payload in self._pending]
        offsets = offsets_of(np.array([len(row) for row in rows])).astype(np.int32)
        payload_offsets = offsets_of(np.array([len(payload) for payload in payloads]))
        columns = [
            pa.array([row.key for row in rows], pa.binary(KEY_BYTES)),
            pa.ListArray.from_arrays(offsets, np.concatenate([row.input_ids for row in rows])),
            pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([row.loss_mask for row in rows]))),
            pa.Array.from_buffers(
                pa.large_binary(),
                len(rows),
                [None, pa.py_buffer(payload_offsets.tobytes()), pa.py_buffer(b"".join(payloads))],
            ),
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self._pending.clear()

    def close(self, name: str | None = None) -> ShardInfo:
        """Finish and fsync the file; `name` is the name it will be committed under (default: its own)."""
        encoder = self._encoder or self._start()
        self._add(encoder.rest())
        self._flush()
        self._writer.close()
        self._file.close()
        return ShardInfo(
            name=name or self._path.name,
            sha256=self._file.digest.hexdigest(),
            num_bytes=self._file.size,
            **{f"num_{key}": value for key, value in self._counts.items()},
        )

    def abort(self) -> None:
        """Drop the unfinished file."""
        if self._encoder is not None:
            self._encoder.cancel()
        self._file.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()


class ShardReader:
    """Random and sequential access to the rows of one shard.

    Raises:
        FormatError: not a shard, or one whose settings differ from `expected` (the manifest's).
        UnsupportedVersionError: another version or codec.
        CorruptShardError: damaged.
    """

    def __init__(self, source: Source, name: str, expected: dict[str, Any] | None = None) -> None:
        self.name = name
        self.source = source
        self._file = ArrowFile(source, name)
        sealed = self._file.metadata.get(METADATA_KEY)
        if sealed is None:
            raise FormatError(
                f"{name} must carry the metadata key 'anneal'; it is not a shard of a teacher cache"
            )
        settings = unseal(sealed, f"the metadata of {name}")
        check_version(settings, name)
        if set(settings) != _METADATA_KEYS:
            raise FormatError(f"{name} must have exactly the metadata of format version {VERSION}")
        for key, value in (expected or {}).items():
            if settings[key] != value:
                raise FormatError(
                    f"{name} must have the {key} of the manifest ({value!r}), got {settings[key]!r}: "
                    "it belongs to another cache"
                )
        self.positions = settings["positions"]
        self._rows_per_batch = settings["rows_per_batch"]
        vocab_size, max_k = settings["vocab_size"], settings["max_k"]
        if self.positions not in POSITION_MODES:
            raise FormatError(f"{name}: positions must be one of {', '.join(POSITION_MODES)}")
        for key, limit in (
            ("vocab_size", MAX_VOCAB_SIZE),
            ("max_k", vocab_size),
            ("rows_per_batch", MAX_ROWS_PER_BATCH),
        ):
            if type(settings[key]) is not int or not 1 <= settings[key] <= limit:
                raise FormatError(
                    f"{name}: {key} must be a whole number from 1 to {limit}, got {settings[key]!r}"
                )
        self.codec_config = CodecConfig.from_dict(settings["codec"])
        ranked_ids = from_text(settings["ranked_ids"], vocab_size)
        self.codec = Codec(self.codec_config, vocab_size, max_k, ranked_ids, stored=True)
        self._cached: OrderedDict[int, Batch] = OrderedDict()
        last = self._batch(self._file.num_batches - 1) if self._file.num_batches else ()
        self._num_rows = max(self._file.num_batches - 1, 0) * self._rows_per_batch + len(last)

    def __len__(self) -> int:
        return self._num_rows

    def _batch(self, index: int) -> Batch:
        batch = self._cached.get(index)
        if batch is None:
            batch = self._file.batch(index)
            full = index < self._file.num_batches - 1
            if not 1 <= len(batch) <= self._rows_per_batch or (full and len(batch) != self._rows_per_batch):
                raise CorruptShardError(
                    f"{self.name}: every record batch but the last must have {self._rows_per_batch} rows"
                )
            self._cached[index] = batch
            if len(self._cached) > 4:
                self._cached.popitem(last=False)
        return batch

    def keys(self) -> np.ndarray:
        """uint8 [rows, 16]: the content keys of all rows, as stored."""
        parts = [self._file.batch(index).keys for index in range(self._file.num_batches)]
        return np.concatenate(parts) if parts else np.zeros((0, KEY_BYTES), np.uint8)

    def lengths(self) -> np.ndarray:
        """int32 [rows]: tokens of every row, from the offsets alone."""
        parts = [np.diff(self._file.batch(index).token_offsets) for index in range(self._file.num_batches)]
        return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)

    def row(self, index: int) -> tuple[TokenRow, memoryview]:
        """The tokens and the encoded payload of row `index`, checked against its content key.

        Raises:
            IndexError: outside the shard.
            CorruptShardError: tokens, mask and key do not belong together.
        """
        if not 0 <= index < self._num_rows:
            raise IndexError(f"row must be from 0 to {self._num_rows - 1}, got {index}")
        batch = self._batch(index // self._rows_per_batch)
        at = index % self._rows_per_batch
        a, b = batch.token_offsets[at : at + 2]
        input_ids, loss_mask = batch.input_ids[a:b], batch.loss_mask[a:b]
        if content_key(input_ids, loss_mask) != batch.keys[at].tobytes():
            raise CorruptShardError(
                f"{self.name}: row {index} does not match its content key; copy or build it again"
            )
        try:
            tokens = TokenRow(input_ids, loss_mask)
        except ValueError as error:
            raise CorruptShardError(f"{self.name}: row {index}: {error}") from None
        start, stop = batch.payload_offsets[at : at + 2]
        return tokens, batch.payload[start:stop]

    def teacher(self, index: int) -> tuple[TokenRow, TopKLogprobs]:
        """Row `index`, decoded; errors as for `row`."""
        tokens, payload = self.row(index)
        try:
            return tokens, self.codec.decode(payload, tokens.label_ids(self.positions))
        except CorruptShardError as error:
            raise CorruptShardError(f"{self.name}: row {index}: {error}") from None
