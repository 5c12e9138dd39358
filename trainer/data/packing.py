"""Best-fit packing: which rows share a sequence, so that little of it is padding.

Rows are taken longest first and each goes into the open sequence with the least room that still holds it
(best-fit decreasing). The rooms in use are the bits of one integer, so the search is a shift and a mask:
O(rows * capacity / 64) bit operations, below a second for a million rows of 2048 tokens.
"""

from collections.abc import Iterable

import numpy as np

from formats.errors import ConfigError


def capacity_of(lengths_of: Iterable[np.ndarray], pack_length: int | None) -> int:
    """Tokens of a pack: `pack_length`, or the longest row of all caches of a run.

    Args:
        lengths_of: of each cache int [rows], tokens of each row.
    """
    return pack_length or max(int(lengths.max()) for lengths in lengths_of)


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Group row indices into packs of at most `capacity` tokens; every row is in exactly one pack.

    Deterministic. Rows of a pack are in ascending order, packs in order of their first row.

    Raises:
        ConfigError: a row is longer than the capacity.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise ConfigError(
            f"pack_length must hold the longest row of {int(lengths.max())} tokens, got {capacity}; "
            "leave pack_length out or rebuild the cache with a smaller --max-length"
        )
    packs: list[list[int]] = []
    open_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set while some pack has exactly r tokens of room left
    for index in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = int(lengths[index])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = open_by_room[room].pop()
            if not open_by_room[room]:
                rooms &= ~(1 << room)
            packs[pack].append(index)
        else:
            room, pack = capacity, len(packs)
            packs.append([index])
        if room - length:
            open_by_room[room - length].append(pack)
            rooms |= 1 << (room - length)
    return sorted((sorted(pack) for pack in packs), key=lambda pack: pack[0])
