"""The manifest: what is in a cache directory. A directory without one is not a cache.

Written last, atomically; sealed by its own digest; parsed and checked here and nowhere else. Row counts
come from it, so that opening a cache of ten thousand shards touches one file.
"""

import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from formats.capture_settings import CaptureSettings
from formats.codec.config import CodecConfig
from formats.disk.durable import atomic_write_bytes
from formats.disk.sealed_json import seal, unseal
from formats.disk.unfinished_build import BUILD_DIRECTORY, build_progress
from formats.errors import (
    DEVELOPMENT_CACHE,
    ConfigError,
    FormatError,
    IncompleteCacheError,
    UnsupportedVersionError,
)
from formats.logprobs.tail_function import TAIL_BETAS
from formats.logprobs.topk import MAX_VOCAB_SIZE

FORMAT = "anneal-teacher-cache"
VERSION = 1
DRAFTS = (2, 3)
"""Versions that were in use before the first release only."""
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 28
MAX_COUNT = 1 << 53
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def shard_name(number: int) -> str:
    """`shard-00000.arrow`, `shard-00001.arrow`, ...: ours; the format allows any names."""
    return f"shard-{number:05d}.arrow"


def check_name(name: Any) -> str:
    """A file name that cannot leave the cache directory: no separator, no leading dot, no `..`, no NUL.

    Raises:
        FormatError: anything else.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name or name == MANIFEST_NAME:
        raise FormatError(f"a file named in the manifest must be a plain name inside the cache, got {name!r}")
    return name


def _check_sha256(value: Any, name: str) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise FormatError(f"the SHA-256 of {name} must be 64 lower-case hex digits, got {value!r}")
    return value


def _check_count(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value < MAX_COUNT:
        raise FormatError(f"{name} must be a whole number from 0 to 2^53, got {value!r}")
    return value


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One shard as the manifest lists it.

    Raises:
        FormatError: a name that leaves the directory, a digest that is none, a count out of range.
    """

    name: str
    """File name inside the cache directory."""
    sha256: str
    """SHA-256 of the whole file, lower-case hex."""
    num_bytes: int
    """Size of the file."""
    num_rows: int
    """Rows, that is training examples."""
    num_tokens: int
    """Tokens of all rows."""
    num_positions: int
    """Positions with a stored teacher distribution."""
    num_entries: int
    """Head entries of all positions."""
    num_payload_bytes: int
    """Bytes of all payloads, the part of the file that holds the teacher."""

    def __post_init__(self) -> None:
        check_name(self.name)
        _check_sha256(self.sha256, self.name)
        for item in fields(self):
            if item.name.startswith("num_"):
                _check_count(getattr(self, item.name), f"{item.name} of {self.name}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of `manifest.json`.

    Raises:
        FormatError: a value outside its range, or names that occur twice.
    """

    identity: dict[str, Any]
    """Where the cache comes from (`TeacherIdentity.to_dict()`); opaque to this module."""
    codec: CodecConfig
    """How payloads are encoded; every shard repeats it."""
    positions: str
    """`loss`: only positions whose next token carries loss are stored; `all`: every position with a next
    token."""
    min_prob: float
    """Entries below this probability were moved into the tail at capture."""
    max_k: int
    """The most entries a head may have."""
    vocab_size: int
    """V: tokens the teacher can predict, without padding."""
    shards: list[ShardInfo]
    """In row order: row i of the cache is found by counting through the shards."""
    files: dict[str, str] = field(default_factory=dict)
    """Auxiliary files (such as tokenizer.json) and their SHA-256."""

    def __post_init__(self) -> None:
        if not isinstance(self.identity, dict) or not isinstance(self.files, dict):
            raise FormatError("identity and files must be JSON objects")
        try:
            _ = self.capture
        except ConfigError as error:
            raise FormatError(f"{error}, in the manifest") from None
        if type(self.vocab_size) is not int or not 1 <= self.vocab_size <= MAX_VOCAB_SIZE:
            raise FormatError(f"vocab_size must be from 1 to {MAX_VOCAB_SIZE}, got {self.vocab_size!r}")
        if type(self.max_k) is not int or not 1 <= self.max_k <= self.vocab_size:
            raise FormatError(f"max_k must be from 1 to vocab_size, got {self.max_k!r}")
        for name, digest in self.files.items():
            _check_sha256(digest, check_name(name))
        names = [shard.name for shard in self.shards] + list(self.files)
        if len(set(names)) != len(names):
            raise FormatError("every file may be listed once in the manifest, got a repeated name")

    @property
    def capture(self) -> CaptureSettings:
        """How the cache was captured."""
        return CaptureSettings(
            positions=self.positions,
            min_prob=self.min_prob,
            max_k=self.max_k,
            draw_rate=self.codec.draw_rate,
        )

    @property
    def num_rows(self) -> int:
        return sum(shard.num_rows for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_positions(self) -> int:
        return sum(shard.num_positions for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    def to_bytes(self) -> bytes:
        """The sealed JSON text; equal manifests give equal bytes."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "identity": self.identity,
            "codec": self.codec.to_dict(),
            "tail_betas": list(TAIL_BETAS),
            "positions": self.positions,
            "min_prob": self.min_prob,
            "max_k": self.max_k,
            "vocab_size": self.vocab_size,
            "shards": [asdict(shard) for shard in self.shards],
            "files": dict(sorted(self.files.items())),
        }
        return seal(content, indent=1)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """Parse and check.

        Raises:
            FormatError: not a manifest, or a value outside its range.
            UnsupportedVersionError: written by a newer format or with an unknown codec.
            CorruptShardError: the text does not match its digest.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise FormatError(f"a manifest must be at most {MAX_MANIFEST_BYTES} bytes, got {len(data)}")
        content = unseal(data, MANIFEST_NAME)
        check_version(content, MANIFEST_NAME)
        expected = {"format", "version", "tail_betas"} | {item.name for item in fields(cls)}
        _require_keys(content, expected, MANIFEST_NAME)
        shards = content["shards"]
        if not isinstance(shards, list):
            raise FormatError("shards must be a list in the manifest")
        shard_keys = {item.name for item in fields(ShardInfo)}
        for shard in shards:
            _require_keys(shard, shard_keys, "a shard in the manifest")
        return cls(
            identity=content["identity"],
            codec=CodecConfig.from_dict(content["codec"]),
            positions=content["positions"],
            min_prob=content["min_prob"],
            max_k=content["max_k"],
            vocab_size=content["vocab_size"],
            shards=[ShardInfo(**shard) for shard in shards],
            files=content["files"],
        )

    def write(self, directory: str | Path) -> None:
        """Write `manifest.json` atomically: from now on the directory is a cache."""
        atomic_write_bytes(Path(directory) / MANIFEST_NAME, self.to_bytes())

    @classmethod
    def read(cls, directory: str | Path) -> "Manifest":
        """Read the manifest of a local directory or fsspec URL.

        Raises:
            FormatError: no such directory, no cache, or not readable as one.
            IncompleteCacheError: shards but no manifest.
        """
        from formats.disk.byte_source import open_store

        return cls.from_bytes(read_manifest_bytes(open_store(directory)))


def read_manifest_bytes(store: Any) -> bytes:
    """The raw manifest of an opened store; see `Manifest.read` for the errors."""
    try:
        return store.read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        names = store.names()
    if BUILD_DIRECTORY not in names and any(name.endswith(".arrow") for name in names):
        raise IncompleteCacheError(
            f"a cache needs a {MANIFEST_NAME}, got shards without one in {store.root}: an unfinished copy, or a writer "
            "that was stopped; copy or write all of it again"
        )
    if BUILD_DIRECTORY in names:
        progress = build_progress(store.root)
        done, planned = progress if progress else (0, 0)
        state = f"with {done} of {planned} shards" if planned else "that is still being planned"
        raise IncompleteCacheError(
            f"a cache needs a {MANIFEST_NAME}, got an unfinished build {state} in {store.root}; "
            "run the same build command again to finish it"
        )
    raise FormatError(f"a cache is a directory with a {MANIFEST_NAME}, got {store.root}; check the path")


def _require_keys(content: Any, expected: set[str], what: str) -> None:
    if not isinstance(content, dict) or set(content) != expected:
        got = sorted(set(content) ^ expected) if isinstance(content, dict) else type(content).__name__
        raise FormatError(f"{what} must have exactly the keys of the format, differs in {got}")


def check_version(content: dict[str, Any], what: str) -> None:
    """The one place where format name, version and tail nodes are checked, for manifests and shards.

    Raises:
        FormatError: another format altogether.
        UnsupportedVersionError: a version or node set that this reader does not know.
    """
    if content.get("format") != FORMAT:
        raise FormatError(f"{what} must have format {FORMAT!r}, got {content.get('format')!r}")
    version = content.get("version")
    if type(version) is int and version in DRAFTS:
        raise UnsupportedVersionError(
            f"{what} must have version {VERSION}, got {version}: {DEVELOPMENT_CACHE}"
        )
    if type(version) is not int or version != VERSION:
        raise UnsupportedVersionError(
            f"{what} must have version {VERSION}, got {version!r}; upgrade anneal to read it"
        )
    if content.get("tail_betas") != list(TAIL_BETAS):
        raise UnsupportedVersionError(
            f"{what} must have tail_betas {list(TAIL_BETAS)}, got {content.get('tail_betas')!r}"
        )
