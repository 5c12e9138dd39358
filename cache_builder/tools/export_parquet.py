"""`anneal cache export --layout positions`: the decoded values as plain columns, for DuckDB, Polars, pandas or Spark.

One row per captured position; the head is a pair of lists, likeliest token first, which `UNNEST` (DuckDB) or
`explode` (Polars) turns into one row per entry:

    key             binary(16)   content key of the example
    row             int64        number of the example in the cache
    position        int32        index i within the example; the distribution predicts token i + 1
    token_id        int32        token at `position`
    label_id        int32        token at `position + 1`
    loss            bool         whether that label carries cross-entropy
    token_ids       list<int32>  head
    logprobs        list<float>  natural log, T = 1
    label_logprob   float        logprob of the label, in the head or not; to 1/32 nat where it is not, and
                                 -255/16 stands for all below (exact in a `float32` cache)
    log_tail        list<float>  A(beta) = log sum over the tail of exp(beta * logprob), at the betas that the
                                 file's metadata key `tail_betas` lists
    draw_ids        list<int32>  tokens drawn from the tail, each expected draw_rate * p^(3/4) times (the
                                 file's metadata key `draw_rate`); a token drawn twice is there twice
    draw_logprobs   list<float>  their logprobs

Exported values are those that training sees. A Parquet file is five to twenty times larger than the cache.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cache_builder.tools.parquet_file import NewParquetFile
from formats.cache import CacheRow, TeacherCache
from formats.errors import ConfigError
from formats.logprobs.tail_function import TAIL_BETAS
from formats.progress import Progress, counted, format_bytes

POSITIONS_PER_GROUP = 1 << 16
ENTRIES_PER_GROUP = 1 << 24
"""Kept tokens of a row group: a cache of whole distributions would need 80 GB for one, and more entries than Arrow
numbers, if positions alone were counted."""
SCHEMA = pa.schema(
    [
        ("key", pa.binary(16)),
        ("row", pa.int64()),
        ("position", pa.int32()),
        ("token_id", pa.int32()),
        ("label_id", pa.int32()),
        ("loss", pa.bool_()),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("label_logprob", pa.float32()),
        ("log_tail", pa.list_(pa.float32())),
        ("draw_ids", pa.list_(pa.int32())),
        ("draw_logprobs", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written."""

    out: str
    """The Parquet file."""
    num_rows: int
    """Examples."""
    num_positions: int
    """Lines of the table."""
    num_bytes: int
    """Size of the file."""

    def text(self) -> str:
        """Two lines: the result, and how to look at it."""
        return (
            f"{self.out}: {self.num_positions} positions of {counted(self.num_rows, 'row')}, "
            f"{format_bytes(self.num_bytes)}\n"
            f"look at it with: duckdb -c \"FROM '{self.out}' LIMIT 5\""
        )


def export_parquet(
    cache: str | Path, out: str | Path, *, limit: int | None = None, progress: Progress | None = None
) -> ExportReport:
    """Write the decoded cache to one Parquet file, which appears when it is complete. Memory: one row group.

    Args:
        limit: export only so many examples; None exports all.

    Raises:
        ConfigError: `out` exists, is no .parquet file name, or cannot be written.
        FormatError: `cache` is no cache, or damaged.
    """
    progress = progress or Progress()
    opened = TeacherCache(cache)
    file = NewParquetFile(out)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}")
    num_rows = min(len(opened), limit or len(opened))
    metadata = {
        "tail_betas": json.dumps(list(TAIL_BETAS)),
        "draw_rate": str(opened.manifest.codec.draw_rate),
        "anneal_identity": json.dumps(opened.identity.to_dict()),
        "vocab_size": str(opened.manifest.vocab_size),
    }
    num_positions = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal num_positions
        for group in _groups(opened, num_rows, progress):
            table = _table(group)
            num_positions += table.num_rows
            yield table

    try:
        progress.start("export", num_rows)
        num_bytes = file.write(SCHEMA, metadata, tables())
    finally:
        progress.finish()
    return ExportReport(
        out=str(file.path), num_rows=num_rows, num_positions=num_positions, num_bytes=num_bytes
    )


def _groups(cache: TeacherCache, num_rows: int, progress: Progress) -> Iterator[list[tuple[int, CacheRow]]]:
    group: list[tuple[int, CacheRow]] = []
    size = entries = 0
    for index, row in enumerate(cache.rows(0, num_rows)):
        group.append((index, row))
        size += len(row.positions)
        entries += row.teacher.num_entries
        progress.advance(1, len(row))
        if size >= POSITIONS_PER_GROUP or entries >= ENTRIES_PER_GROUP:
            yield group
            group, size, entries = [], 0, 0
    if group:
        yield group


def _table(group: list[tuple[int, CacheRow]]) -> pa.Table:
    parts = [_columns(index, row) for index, row in group]
    merged: list[Any] = [pa.concat_arrays([part[name] for part in parts]) for name in SCHEMA.names]
    return pa.Table.from_arrays(merged, schema=SCHEMA)


def _columns(index: int, row: CacheRow) -> dict[str, Any]:
    """The columns of one example."""
    head = row.teacher.sorted()
    positions = row.positions
    num_positions = len(positions)
    offsets = pa.array(head.offsets.astype(np.int32))
    drawn = head.draws
    draw_offsets = pa.array(drawn.offsets.astype(np.int32))
    return {
        "key": pa.array([row.key] * num_positions, pa.binary(16)),
        "row": pa.array(np.full(num_positions, index, np.int64)),
        "position": pa.array(positions),
        "token_id": pa.array(row.input_ids[positions]),
        "label_id": pa.array(row.label_ids),
        "loss": pa.array(row.loss_mask[positions + 1]),
        "token_ids": pa.ListArray.from_arrays(offsets, pa.array(head.token_ids)),
        "logprobs": pa.ListArray.from_arrays(offsets, pa.array(head.logprobs)),
        "label_logprob": pa.array(head.label_logprobs),
        "log_tail": _lists(head.log_tail_nodes),
        "draw_ids": pa.ListArray.from_arrays(draw_offsets, pa.array(drawn.token_ids)),
        "draw_logprobs": pa.ListArray.from_arrays(draw_offsets, pa.array(drawn.logprobs)),
    }


def _lists(values_PK: np.ndarray) -> pa.ListArray:
    """One list of K numbers per position."""
    offsets = np.arange(len(values_PK) + 1, dtype=np.int32) * values_PK.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values_PK.reshape(-1)))
