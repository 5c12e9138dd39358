"""Where one file that a command writes may go: into a folder that is there, and not among the files of a cache.

A directory that a command fills (`--out`) is made with its parents. For a file a missing folder is a slip of the pen.
"""

from pathlib import Path

from formats.disk.manifest import MANIFEST_NAME
from formats.disk.unfinished_build import BUILD_DIRECTORY


def misplaced(path: Path) -> str | None:
    """Why a file cannot be written to `path`, in a few words; None where it can, as far as names tell."""
    if path.is_dir():
        return "a directory"
    if not path.parent.is_dir():
        return f"no directory {path.parent}"
    if (path.parent / MANIFEST_NAME).is_file() or (path.parent / BUILD_DIRECTORY).is_dir():
        return f"{path.parent} is a cache, which holds its own files alone"
    return None
