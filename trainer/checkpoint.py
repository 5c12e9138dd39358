"""Checkpoints that are complete or absent.

`transformers` writes a checkpoint in place: killed half-way, it leaves a directory with the right name and
wrong contents, and resumes from it. Here a checkpoint is written to a hidden staging directory, flushed to
the disk, marked with the list of its files and their sizes, and only then renamed; resuming takes the
newest marked one.

    out/.checkpoint-40.staging/   being written; swept away at the next start
    out/checkpoint-40/            complete: complete.json names every file
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from formats.disk.durable import atomic_write_bytes, fsync_directory, fsync_file
from formats.errors import one_line
from formats.progress import format_bytes

MARKER = "complete.json"
_NAME = re.compile(r"^checkpoint-(\d+)$")
_LEFTOVER = re.compile(r"^\.checkpoint-\d+\.staging$")


@contextlib.contextmanager
def writing_to(place: Path) -> Iterator[None]:
    """In this block a file that cannot be written to the directory `place` is an `OSError`, and says where: safetensors
    and torch have errors of their own for it.
    """
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(place)
        raise
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        said = one_line(error) if isinstance(error, SafetensorError) else "a file was not written whole"
        free = format_bytes(shutil.disk_usage(place).free)
        raise OSError(errno.EIO, f"{said}, {free} are free", str(place)) from None


def staging_directory(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of this step is written before it has a name."""
    return run_dir / f".checkpoint-{step}.staging"


def final_directory(run_dir: Path, step: int) -> Path:
    """Where the complete checkpoint of this step lives."""
    return run_dir / f"checkpoint-{step}"


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MARKER)


def commit_checkpoint(staging: Path, final: Path, step: int) -> None:
    """Flush `staging`, mark it complete and give it its name, which must not belong to a complete checkpoint.

    Raises:
        OSError: the disk is full or read-only; there is no checkpoint of this step then.
    """
    for path in _files(staging):
        fsync_file(path)
    for directory in sorted({path.parent for path in _files(staging)}, reverse=True):
        fsync_directory(directory)
    sizes = {path.relative_to(staging).as_posix(): path.stat().st_size for path in _files(staging)}
    content = {"step": step, "files": sizes}
    atomic_write_bytes(staging / MARKER, json.dumps(content, indent=1).encode())
    if final.exists():  # never a complete one: such a step is not saved again
        shutil.rmtree(final)
    os.rename(staging, final)
    fsync_directory(final.parent)


def is_complete(directory: Path) -> bool:
    """True when the marker is there and every file it names has the size it names."""
    try:
        sizes = json.loads((directory / MARKER).read_text(encoding="utf-8"))["files"]
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def complete_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every complete checkpoint, oldest first."""
    found = []
    for path in run_dir.iterdir() if run_dir.is_dir() else ():
        match = _NAME.match(path.name)
        if match and path.is_dir() and is_complete(path):
            found.append((int(match[1]), path))
    return sorted(found)


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The complete checkpoint of the highest step, if there is one."""
    found = complete_checkpoints(run_dir)
    return found[-1][1] if found else None


def sweep(run_dir: Path) -> list[str]:
    """Remove what an interrupted save left behind, never a complete checkpoint; returns the names."""
    removed = []
    for path in sorted(run_dir.iterdir()) if run_dir.is_dir() else ():
        unmarked = _NAME.match(path.name) and path.is_dir() and not is_complete(path)
        if (_LEFTOVER.match(path.name) and path.is_dir()) or unmarked:
            shutil.rmtree(path)
            removed.append(path.name)
    return removed


def rotate(run_dir: Path, limit: int | None, keep: Path | None = None) -> None:
    """Delete the oldest complete checkpoints until `limit` are left, but never `keep`, the best one."""
    if limit is None or limit <= 0:
        return
    candidates = [path for _, path in complete_checkpoints(run_dir)]
    surplus = len(candidates) - limit
    for path in candidates[:-1]:  # the newest always stays
        if surplus <= 0:
            break
        if keep is None or path.resolve() != keep.resolve():
            shutil.rmtree(path)
            surplus -= 1
