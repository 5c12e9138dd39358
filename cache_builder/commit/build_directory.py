"""The output directory: what it holds, and how to take it over or clear it without harming anything else.

    out/manifest.json      written last: from then on the directory is a cache
    out/shard-00000.arrow  committed one by one under their final names
    out/tokenizer.json     so that `inspect` can show text
    out/_build/            everything unfinished: settings, staged rows, plan, claims, notes, temporary files;
                           removed after the manifest

Only names of this list are ever deleted.
"""

import contextlib
import os
import re
import shutil
import time
from enum import Enum
from pathlib import Path

from formats.disk.durable import TEMPORARY_SUFFIX, atomic_write_bytes, fsync_directory
from formats.disk.manifest import MANIFEST_NAME, Manifest
from formats.disk.unfinished_build import BUILD_DIRECTORY
from formats.errors import AnnealError, ConfigError

TOKENIZER_NAME = "tokenizer.json"
DISCARD_NAME = "discard"
_OURS = re.compile(r"shard-\d{5,}\.arrow|tokenizer\.json|\..*" + re.escape(TEMPORARY_SUFFIX))


class State(Enum):
    """What an output directory holds."""

    EMPTY = "nothing"
    UNFINISHED = "an unfinished build"
    FINISHED = "a cache"


def shard_name(index: int) -> str:
    """File name of shard number `index`."""
    return f"shard-{index:05d}.arrow"


def build_directory(out: Path) -> Path:
    """Where everything unfinished lives."""
    return out / BUILD_DIRECTORY


def state_of(out: Path) -> State:
    """Look at the output directory.

    Raises:
        ConfigError: it is no directory, or holds something that this program did not make.
    """
    try:
        names = set(os.listdir(out))
    except FileNotFoundError:
        return State.EMPTY
    except OSError as error:
        raise ConfigError(f"--out must be a readable directory, got {out}: {error.strerror}") from None
    if MANIFEST_NAME in names:
        try:
            Manifest.read(out)
        except AnnealError as error:
            raise ConfigError(
                f"--out must be new, empty, a cache or an unfinished build, got {out} "
                f"with a {MANIFEST_NAME} that cannot be read: {error}"
            ) from None
        return State.FINISHED
    if BUILD_DIRECTORY in names and (out / BUILD_DIRECTORY).is_dir():
        return State.UNFINISHED
    if names:
        raise ConfigError(
            f"--out must be new, empty, a cache or an unfinished build, got {out}, "
            f"which holds {sorted(names)[0]}; choose another directory"
        )
    return State.EMPTY


def open_output(out: Path) -> None:
    """Make the directory and its `_build/`, and prove that files can be written and flushed there.

    Raises:
        ConfigError: they cannot.
    """
    try:
        build = build_directory(out)
        build.mkdir(parents=True, exist_ok=True)
        probe = build / f".probe.{os.getpid()}{TEMPORARY_SUFFIX}"
        atomic_write_bytes(probe, b"x" * 4096)
        probe.unlink()
        fsync_directory(out)
    except OSError as error:
        raise ConfigError(
            f"--out must be a directory that can be written, got {out}: {error.strerror or error}"
        ) from None


def discard(out: Path) -> None:
    """Delete a cache or an unfinished build, and nothing else that lies beside it.

    A marker goes first, so that a directory whose deletion was interrupted is still known as ours; the
    manifest next, so that nobody opens what is left.
    """
    build = build_directory(out)
    build.mkdir(exist_ok=True)
    atomic_write_bytes(build / DISCARD_NAME, b"")
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    fsync_directory(out)
    for name in os.listdir(out):
        if _OURS.fullmatch(name):
            (out / name).unlink(missing_ok=True)
    remove_build(out)


def is_discarding(out: Path) -> bool:
    """Whether an earlier `discard` was interrupted."""
    return (build_directory(out) / DISCARD_NAME).exists()


def remove_build(out: Path) -> None:
    """Delete `_build/`, its discard marker last, and temporary files that a killed process left beside it.

    Another worker may still be adding files: retried.
    """
    build = build_directory(out)
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(out):
            if name.startswith(".") and _OURS.fullmatch(name):
                (out / name).unlink(missing_ok=True)
    for _ in range(20):
        with contextlib.suppress(FileNotFoundError, OSError):
            for entry in list(os.scandir(build)):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                elif entry.name != DISCARD_NAME:
                    os.unlink(entry.path)
            (build / DISCARD_NAME).unlink(missing_ok=True)
            build.rmdir()
        if not build.exists():
            break
        time.sleep(0.05)
    fsync_directory(out)
