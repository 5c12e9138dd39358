"""Generated rows in `_build/`, a file a batch: `generated-FIRST-LAST-HASH.arrow`.

Sampling costs far more than tokenising, so what is written is kept batch by batch. The name says which rows a file has
(LAST excluded) and what its bytes are: one that is damaged counts as missing.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from cache_builder.commit.staging import from_bytes, to_bytes
from formats.disk.durable import atomic_write_bytes
from formats.disk.token_row import TokenRow

NAME = re.compile(r"generated-(\d{10})-(\d{10})-([0-9a-f]{32})\.arrow")


def write_generated(directory: Path, first: int, rows: Sequence[TokenRow]) -> None:
    """Write one batch atomically and durably.

    Raises:
        OSError: the disk is full or fails; nothing is left under the final name.
    """
    data = to_bytes(rows)
    atomic_write_bytes(directory / _name(first, first + len(rows), data), data)


def generated_batches(directory: Path) -> dict[tuple[int, int], Path]:
    """(first, last) -> file of every batch that is there."""
    found = {}
    for path in sorted(directory.glob("generated-*.arrow")):
        if match := NAME.fullmatch(path.name):
            found[int(match[1]), int(match[2])] = path
    return found


def read_generated(directory: Path, first: int, last: int) -> list[TokenRow] | None:
    """The rows of one batch; None if it is not there, or not what was written."""
    for path in sorted(directory.glob(f"generated-{first:010d}-{last:010d}-*.arrow")):
        if not NAME.fullmatch(path.name):
            continue
        data = path.read_bytes()
        if path.name == _name(first, last, data):
            return from_bytes(data)
        path.unlink()
    return None


def _name(first: int, last: int, data: bytes) -> str:
    return f"generated-{first:010d}-{last:010d}-{hashlib.sha256(data).hexdigest()[:32]}.arrow"
