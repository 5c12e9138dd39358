"""Staged rows: the tokenised corpus, cut into the units that a build captures one at a time.

`_build/rows-00000.arrow` holds the token ids and loss masks of one shard-to-be. Tokenising once, before the
engine starts, gives exact progress, lets any worker capture any shard, and fixes the rows a shard is made of:
an engine's numbers depend in their last bits on what is batched together, so a shard is always prefilled as
one unit.

Memory: one shard of tokens.  File: one Arrow IPC batch, about five bytes per token.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from formats.disk.durable import atomic_write_bytes
from formats.disk.manifest import ShardInfo
from formats.disk.token_row import TokenRow
from formats.errors import CorruptShardError

SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.bool_()))])


@dataclass(frozen=True, kw_only=True)
class StagedShard:
    """One entry of the plan: the rows of a shard-to-be."""

    num_rows: int
    """Rows in the shard."""
    num_tokens: int
    """Tokens of all rows."""
    num_positions: int
    """Positions that will be captured."""
    sha256: str
    """SHA-256 of the staged file, checked whenever it is read."""

    def describes(self, info: ShardInfo) -> bool:
        """Whether a captured shard has the counts that were planned."""
        planned = (self.num_rows, self.num_tokens, self.num_positions)
        return (info.num_rows, info.num_tokens, info.num_positions) == planned


def rows_name(index: int) -> str:
    """File name of the staged rows of shard number `index`."""
    return f"rows-{index:05d}.arrow"


def cut(rows: Iterable[TokenRow], max_rows: int, max_tokens: int) -> Iterator[list[TokenRow]]:
    """Consecutive groups of at most `max_rows` rows and `max_tokens` tokens (one longer row goes alone)."""
    group: list[TokenRow] = []
    num_tokens = 0
    for row in rows:
        if group and (len(group) == max_rows or num_tokens + len(row) > max_tokens):
            yield group
            group, num_tokens = [], 0
        group.append(row)
        num_tokens += len(row)
    if group:
        yield group


def _lists(arrays: Sequence[np.ndarray]) -> pa.ListArray:
    offsets = np.zeros(len(arrays) + 1, np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))


def to_bytes(rows: Sequence[TokenRow]) -> bytes:
    """One Arrow IPC file; the same rows give the same bytes."""
    sink = pa.BufferOutputStream()
    columns = [_lists([row.input_ids for row in rows]), _lists([row.loss_mask for row in rows])]
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
    return bytes(sink.getvalue().to_pybytes())


def from_bytes(data: bytes) -> list[TokenRow]:
    """The inverse of `to_bytes`."""
    batch = pa.ipc.open_file(pa.BufferReader(data)).get_batch(0)
    ids, masks = batch.column(0), batch.column(1)
    offsets = ids.offsets.to_numpy()
    values = ids.values.to_numpy()
    mask_values = masks.values.to_numpy(zero_copy_only=False)
    return [TokenRow(values[a:b], mask_values[a:b]) for a, b in pairwise(offsets.tolist())]


def stage(directory: Path, index: int, rows: Sequence[TokenRow], positions: str) -> StagedShard:
    """Write the rows of one shard atomically and durably; rewriting the same rows gives the same bytes.

    Raises:
        OSError: the disk is full or fails; nothing is left under the final name.
    """
    data = to_bytes(rows)
    atomic_write_bytes(directory / rows_name(index), data)
    return StagedShard(
        num_rows=len(rows),
        num_tokens=sum(len(row) for row in rows),
        num_positions=sum(len(row.positions(positions)) for row in rows),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def read_staged(directory: Path, index: int, expected: StagedShard) -> list[TokenRow]:
    """The rows of one shard, checked against the plan.

    Raises:
        CorruptShardError: the file is not the one that was planned.
    """
    path = directory / rows_name(index)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != expected.sha256:
        raise CorruptShardError(
            f"staged rows must match the plan, got other bytes in {path}; start over with --overwrite"
        )
    return from_bytes(data)
