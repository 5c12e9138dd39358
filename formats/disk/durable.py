"""Durable, all-or-nothing file operations: the primitives of the cache's commit protocol.

A file becomes visible under its final name only when every byte of it is on the disk:
write to a temporary name in the same directory, fsync the file, rename, fsync the directory.
`commit_exclusive` never replaces an existing file, so two writers of the same shard cannot harm each other.
"""

import contextlib
import fcntl
import glob
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY_SUFFIX = ".tmp"


def temporary_name(final: Path) -> Path:
    """A unique sibling of `final`; hidden, and recognisable by its suffix when left behind by a crash."""
    return final.with_name(f".{final.name}.{uuid.uuid4().hex[:12]}{TEMPORARY_SUFFIX}")


@contextlib.contextmanager
def large_temporary(final: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file under a `temporary_name`, open for writing, and gone when the block ends however it ends.

    It is locked meanwhile, so that one of a process that was killed can be told: those of `final` are removed first.

    Raises:
        OSError: it cannot be made.
    """
    for left in final.parent.glob(f".{glob.escape(final.name)}.*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(OSError), open(left, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()
    temporary = temporary_name(final)
    try:
        with open(temporary, "xb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield temporary, file
    finally:
        temporary.unlink(missing_ok=True)


def fsync_directory(path: Path) -> None:
    """Flush the directory entry table of `path`, without which a rename may not survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Flush the contents of `path` to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` with `data` such that a reader sees the old or the new contents, never a mixture.

    Raises:
        OSError: the directory is missing, read-only or full; `path` is then unchanged.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:  # of a write: nothing says where
            error.filename = str(path)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def atomic_write_json(path: Path, value: Any, *, allow_nan: bool = False) -> None:
    """`atomic_write_bytes` of plain values as JSON for people: a value a line, keys sorted, letters as they are."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=allow_nan)
    atomic_write_bytes(path, text.encode() + b"\n")


def read_json_object(path: Path) -> dict[str, Any]:
    """What a JSON object in a file says; empty where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def locked(descriptor: int) -> bool:
    """Lock what is open there until it is closed; False where another process has it. A file system without locks lets
    everybody in.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """In this block no other one of this directory or file is under way, of whatever process: what is read in it and
    written again loses nothing. A file system without locks lets all of them in.

    Raises:
        OSError: there is no such directory or file.
    """
    while True:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not os.path.samestat(os.stat(path), os.fstat(descriptor)):
                continue  # the one that was waited for has replaced the file
            yield
            return
        finally:
            os.close(descriptor)


def commit_exclusive(temporary: Path, final: Path) -> bool:
    """Give the finished file `temporary` the name `final`, unless that name is taken.

    Returns True when this call made `final`, False when it already existed; `temporary` is gone either way.
    A hard link is used because, unlike a rename, it fails on an existing name.

    Raises:
        OSError: the file could not be flushed or linked; `final` does not exist then, `temporary` may.
    """
    fsync_file(temporary)
    try:
        os.link(temporary, final)
        created = True
    except FileExistsError:
        created = False
    except OSError:
        # Some shared file systems have no hard links; a rename is the best they offer.
        if final.exists():
            created = False
        else:
            os.rename(temporary, final)
            created = True
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    fsync_directory(final.parent)
    return created
