"""Opening a teacher cache: rows by index or by content key, from a directory or any fsspec URL.

Opening reads the manifest only, so ten thousand shards open as fast as one. Shards are opened on first use
and at most `MAX_OPEN_SHARDS` stay open; a reader is picklable and reopens itself in a worker process.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from formats.cache_row import CacheRow
from formats.disk.byte_source import open_store
from formats.disk.manifest import Manifest, ShardInfo, read_manifest_bytes
from formats.disk.shard import ShardReader
from formats.disk.token_row import KEY_BYTES, TokenRow
from formats.errors import CorruptShardError, FormatError
from formats.logprobs.tail_function import TAIL_BETAS

if TYPE_CHECKING:
    from formats.identity.teacher_identity import TeacherIdentity

MAX_OPEN_SHARDS = 64


class TeacherCache:
    """A complete cache, read-only.

    Raises:
        FormatError: not a cache; more precisely `UnsupportedVersionError`, `CorruptShardError` or
            `IncompleteCacheError`.
    """

    def __init__(self, path_or_url: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path_or_url)
        self._store = open_store(path_or_url)
        data = read_manifest_bytes(self._store)
        self._digest = hashlib.sha256(data).digest()
        self.manifest = Manifest.from_bytes(data)
        counts = [shard.num_rows for shard in self.manifest.shards]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
        self._open: OrderedDict[int, ShardReader] = OrderedDict()

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which holds the checksums of everything else: two equal ones are one cache."""
        return self._digest.hex()

    # --- rows ---------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> CacheRow:
        shard, at = self._locate(index)
        tokens, teacher = self.shard(shard).teacher(at)
        return CacheRow(tokens, teacher, self.manifest.positions)

    def tokens(self, index: int) -> TokenRow:
        """The tokens of row `index` without decoding its teacher."""
        shard, at = self._locate(index)
        return self.shard(shard).row(at)[0]

    def lengths(self) -> np.ndarray:
        """int32 [rows]: tokens of every row, without reading tokens or teachers."""
        parts = [self.shard(number).lengths() for number in range(len(self.manifest.shards))]
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[CacheRow]:
        """Rows start to stop in order, one shard after the other."""
        for index in range(*slice(start, stop).indices(len(self))):
            yield self[index]

    def __iter__(self) -> Iterator[CacheRow]:
        return self.rows()

    def _locate(self, index: int) -> tuple[int, int]:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"row must be below {count}, got {index}")
        index %= count
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def shard(self, number: int) -> ShardReader:
        """The reader of shard `number`, opened on first use."""
        reader = self._open.get(number)
        if reader is None:
            info = self.manifest.shards[number]
            reader = self._open_shard(info)
            self._open[number] = reader
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(number)
        return reader

    def _open_shard(self, info: ShardInfo) -> ShardReader:
        try:
            source = self._store.open(info.name)
        except FileNotFoundError:
            raise CorruptShardError(
                f"{self.path} must contain {info.name}, which its manifest lists; copy it again"
            ) from None
        if source.size != info.num_bytes:
            raise CorruptShardError(
                f"{info.name} must have {info.num_bytes} bytes, got {source.size}; copy it again"
            )
        manifest = self.manifest
        reader = ShardReader(
            source,
            info.name,
            {
                "codec": manifest.codec.to_dict(),
                "tail_betas": list(TAIL_BETAS),
                "positions": manifest.positions,
                "max_k": manifest.max_k,
                "vocab_size": manifest.vocab_size,
            },
        )
        if len(reader) != info.num_rows:
            raise CorruptShardError(
                f"{info.name} must have {info.num_rows} rows, got {len(reader)}; copy it again"
            )
        return reader

    # --- by content key -----------------------------------------------------------------------------------

    @cached_property
    def _keys(self) -> tuple[np.ndarray, np.ndarray]:
        parts = [self.shard(number).keys() for number in range(len(self.manifest.shards))]
        flat = np.concatenate(parts) if parts else np.zeros((0, 16), np.uint8)
        keys = np.ascontiguousarray(flat).view("S16").ravel() if len(flat) else np.zeros(0, "S16")
        order = np.argsort(keys, kind="stable")
        return keys[order], order

    def index_of(self, key: bytes) -> int:
        """The first row with this content key; the index of all keys is built on the first call.

        Raises:
            KeyError: no such row.
        """
        keys, order = self._keys
        # numpy drops zero bytes at the end of its strings, so both sides must be of its making; among keys of
        # one length that confuses none.
        wanted = np.array([key], keys.dtype)[0]
        at = int(np.searchsorted(keys, wanted))
        if len(key) != KEY_BYTES or at == len(keys) or keys[at] != wanted:
            raise KeyError(f"no row with content key {key.hex()} in {self.path}")
        return int(order[at])

    # --- everything else ----------------------------------------------------------------------------------

    @cached_property
    def identity(self) -> "TeacherIdentity":
        """Which teacher, tokenizer, corpus and settings made this cache."""
        from formats.identity.teacher_identity import TeacherIdentity

        return TeacherIdentity.from_dict(self.manifest.identity)

    def file(self, name: str, limit: int = 1 << 28) -> bytes:
        """An auxiliary file (such as `tokenizer.json`), checked against the manifest.

        Raises:
            KeyError: the manifest lists no such file.
            CorruptShardError: it is missing or differs from the manifest.
        """
        expected = self.manifest.files[name]
        try:
            data = self._store.read(name, limit)
        except FileNotFoundError:
            raise CorruptShardError(
                f"{self.path} must contain {name}, which its manifest lists; copy it again"
            ) from None
        if hashlib.sha256(data).hexdigest() != expected:
            raise CorruptShardError(
                f"{name} does not match its SHA-256 in the manifest; copy or build it again"
            )
        return data

    def summary(self, **options: Any) -> dict[str, Any]:
        """Everything `anneal cache inspect` prints; see `formats.inspect.summary.summarise`."""
        from formats.inspect.summary import summarise

        return summarise(self, **options)

    def validate(self, full: bool = False) -> None:
        """Check every shard: size, metadata, row count; with `full` also SHA-256 and the contents of every
        row.

        Raises:
            FormatError: the first problem found.
        """
        from formats.validate import validate

        validate(self, full=full)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "digest": self._digest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]
        if self._digest != state["digest"]:
            raise FormatError(f"{self.path} was rebuilt while it was in use; start again")

    def __repr__(self) -> str:
        return f"TeacherCache({self.path!r}, rows={len(self)}, shards={len(self.manifest.shards)})"
