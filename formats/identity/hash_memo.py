"""Remember the fingerprint of a large file set, so that a second command does not read 16 GB again.

The memo is keyed by path, size, inode, modification time and *change* time of every file.  The change time is
set by the kernel on every write and cannot be set back by a program, so a rewritten file is always read
again.  Two guards close the remaining hole, a write within the clock tick of the previous one: the files must
be unchanged for two seconds when they are hashed, and their state must be the same after hashing as before.

A memo that cannot be read or written is no error: the files are hashed again.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from formats.disk.durable import atomic_write_bytes

SETTLED_SECONDS = 2.0
MEMO_FROM_BYTES = 256 << 20
"""Smaller file sets are hashed every time: it takes less than a second."""


def memo_directory() -> Path:
    """`$XDG_CACHE_HOME/anneal/fingerprints`, by default under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "anneal" / "fingerprints"


def state_of(paths: Sequence[Path]) -> list[list]:
    """What must be unchanged for a remembered fingerprint to hold."""
    state = []
    for path in sorted(Path(p).resolve() for p in paths):
        stat = path.stat()
        state.append([str(path), stat.st_size, stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns])
    return state


def remembered(
    paths: Sequence[Path], compute: Callable[[], dict[str, str]], *, min_bytes: int = MEMO_FROM_BYTES
) -> dict[str, str]:
    """`compute()`, or its result of an earlier call if none of `paths` has changed since."""
    before = state_of(paths)
    if sum(entry[1] for entry in before) < min_bytes:
        return compute()
    key = hashlib.sha256(json.dumps(before).encode()).hexdigest()
    memo = memo_directory() / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(memo.read_text(encoding="utf-8"))
        if stored["state"] == before and all(isinstance(v, str) for v in stored["digests"].values()):
            return dict(stored["digests"])
    result = compute()
    settled = all(time.time() - entry[5] / 1e9 > SETTLED_SECONDS for entry in before)
    if settled and state_of(paths) == before:
        with contextlib.suppress(OSError):
            memo.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(memo, json.dumps({"state": before, "digests": result}).encode())
    return result
