"""Where the bytes of a cache come from: a local directory (memory maps) or any fsspec URL (range requests).

Both give `Source` objects with one operation, `read(offset, length)`, so the reader above knows no
difference. A local file must be a regular file and no symbolic link: a cache from a stranger cannot point
outside its directory.
"""

import contextlib
import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from formats.errors import AnnealError, CorruptShardError, FormatError, one_line


class Source(Protocol):
    """One file, read at any offset."""

    size: int
    """Bytes in the file."""

    def read(self, offset: int, length: int) -> memoryview:
        """Exactly these bytes; raises CorruptShardError where the file ends earlier."""
        ...


class Store(Protocol):
    """One directory."""

    root: str
    """As given by the user, for messages."""

    def names(self) -> list[str]:
        """File names in the directory; raises FormatError when it does not exist."""
        ...

    def read(self, name: str, limit: int) -> bytes:
        """A whole small file; raises FileNotFoundError, or FormatError above `limit` bytes."""
        ...

    def open(self, name: str) -> Source:
        """Open for random access; raises FileNotFoundError or FormatError."""
        ...


def _check_range(name: str, size: int, offset: int, length: int) -> None:
    if offset < 0 or length < 0 or offset + length > size:
        raise CorruptShardError(
            f"{name} must have {offset + length} bytes, got {size}; copy or build it again"
        )


class MappedFile:
    """A local file, memory-mapped read-only; the pages are shared between processes."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        try:
            # NONBLOCK: opening a named pipe must not hang. NOFOLLOW: no link may lead out of the directory.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            reason = "a symbolic link" if path.is_symlink() else error.strerror
            raise FormatError(
                f"files of a cache must be regular and readable, got {path}: {reason}"
            ) from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise FormatError(f"files of a cache must be regular files, got {path}")
            self.size = status.st_size
            self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) if self.size else b""
        finally:
            os.close(descriptor)
        self._view = memoryview(self._map)

    def read(self, offset: int, length: int) -> memoryview:
        _check_range(self.name, self.size, offset, length)
        return self._view[offset : offset + length]


class LocalStore:
    """A directory of the local file system."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self._path = root

    def names(self) -> list[str]:
        try:
            return sorted(os.listdir(self._path))
        except OSError as error:
            raise FormatError(
                f"a cache must be a readable directory, got {self.root}: {error.strerror}"
            ) from None

    def open(self, name: str) -> MappedFile:
        try:
            return MappedFile(self._path / name)
        except NotADirectoryError:
            raise FormatError(
                f"a cache must be a directory, got the file {self.root}; anneal cache build makes one of a corpus"
            ) from None

    def read(self, name: str, limit: int) -> bytes:
        source = self.open(name)
        if source.size > limit:
            raise FormatError(f"{name} must be at most {limit} bytes, got {source.size}")
        return bytes(source.read(0, source.size))


@contextlib.contextmanager
def _one_line_errors(url: str) -> Iterator[None]:
    """What clients raise beside OSError, each of its own class, such as for a status of 403."""
    try:
        yield
    except (OSError, AnnealError):
        raise
    except Exception as error:
        raise FormatError(f"{url} must be readable, got: {one_line(error)}") from error


class RemoteFile:
    """A file behind fsspec, one range request per read."""

    def __init__(self, store: "RemoteStore", name: str) -> None:
        self.name = name
        self._store = store
        with _one_line_errors(store.root):
            size = store.filesystem.size(store.path(name))
        if size is None:
            raise FormatError(f"a server must tell the sizes of files, got none of {name} in {store.root}")
        self.size = int(size)

    def read(self, offset: int, length: int) -> memoryview:
        _check_range(self.name, self.size, offset, length)
        path = self._store.path(self.name)
        with _one_line_errors(self._store.root):
            data = self._store.filesystem.cat_file(path, start=offset, end=offset + length)
        if len(data) == self.size > length:
            raise FormatError(
                f"a server must answer requests for a part of a file, got all of {self.name} from {self._store.root}; "
                "copy the cache here"
            )
        if len(data) != length:
            raise CorruptShardError(
                f"{self.name} must have {offset + length} bytes, got fewer; copy it again"
            )
        return memoryview(data)


class RemoteStore:
    """A directory behind an fsspec URL; the connection is made again in every process that uses it."""

    def __init__(self, url: str) -> None:
        self.root = url
        self._process = -1
        self._filesystem: Any = None
        self._path = ""

    @property
    def filesystem(self) -> Any:
        if self._process != os.getpid():
            # A forked child must not share its parent's sockets or event loop.
            import fsspec

            try:
                self._filesystem, self._path = fsspec.core.url_to_fs(self.root)
            except (ImportError, ValueError) as error:
                raise FormatError(
                    f"a cache must be a directory or a URL that fsspec can open, got {self.root}: {one_line(error)}"
                ) from None
            self._process = os.getpid()
        return self._filesystem

    def path(self, name: str) -> str:
        return f"{self.filesystem and self._path.rstrip('/')}/{name}"

    def names(self) -> list[str]:
        try:
            with _one_line_errors(self.root):
                listed = self.filesystem.ls(self.path(""), detail=False)
        except FileNotFoundError:
            raise FormatError(f"a cache must be a readable directory, got {self.root}") from None
        return sorted(str(item).rstrip("/").rsplit("/", 1)[-1] for item in listed)

    def open(self, name: str) -> RemoteFile:
        return RemoteFile(self, name)

    def read(self, name: str, limit: int) -> bytes:
        source = self.open(name)
        if source.size > limit:
            raise FormatError(f"{name} must be at most {limit} bytes, got {source.size}")
        return bytes(source.read(0, source.size))


def open_store(path_or_url: str | os.PathLike[str]) -> LocalStore | RemoteStore:
    """A local path, or any URL that fsspec knows (`s3://`, `gs://`, `https://`, `memory://`, ...)."""
    text = os.fspath(path_or_url)
    if "://" in text:
        scheme, _, rest = text.partition("://")
        if scheme in ("file", "local"):
            return LocalStore(Path(rest))
        return RemoteStore(text)
    return LocalStore(Path(text))
