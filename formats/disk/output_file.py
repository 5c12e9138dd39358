"""Where a command may write. One file: into a folder that is there, and not among the files of a cache.

A directory that a command fills (`--out`) is made with its parents. For a file a missing folder is a slip of the pen.
Nothing is written to an address: of s3://bucket/x a path would make the folders `s3:` and `bucket` here.
"""

from pathlib import Path

from formats.disk.manifest import MANIFEST_NAME
from formats.disk.unfinished_build import BUILD_DIRECTORY
from formats.errors import ConfigError


def refuse_address(name: str, out: str | Path) -> None:
    """Refuse an output directory that is the address of another place.

    Args:
        name: of the option, for the message.

    Raises:
        ConfigError: it is.
    """
    if "://" in str(out):
        raise ConfigError(
            f"{name} must be a directory on this machine, got the address {out}; write it here and copy it there"
        )


def is_in_a_file(path: Path) -> bool:
    """Whether a file stands where `path`, or a folder that it would lie in, is to be a directory."""
    return any(place.exists() and not place.is_dir() for place in (path, *path.parents))


def misplaced(path: Path) -> str | None:
    """Why a file cannot be written to `path`, in a few words; None where it can, as far as names tell."""
    if path.is_dir():
        return "a directory"
    if not path.parent.is_dir():
        return f"no directory {path.parent}"
    if (path.parent / MANIFEST_NAME).is_file() or (path.parent / BUILD_DIRECTORY).is_dir():
        return f"{path.parent} is a cache, which holds its own files alone"
    return None
