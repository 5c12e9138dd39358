"""A prepared data set as a Parquet file of `input_ids` and `labels`: the rows that a cache is then built from."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from formats.disk.output_file import misplaced
from formats.disk.token_row import IGNORED
from formats.errors import ConfigError
from integrations.joined_rows import mask_of, rows_of

SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})
ROWS_PER_GROUP = 4096


def write_rows(dataset: Any, path: str | Path) -> tuple[int, int]:
    """Write every row, packed ones one by one, once; the file appears when it is complete.

    Of several processes (`torchrun`) the first one writes, and the others count.

    Returns:
        (rows, tokens of the longest one).

    Raises:
        ConfigError: the file is there already, has no place (`misplaced`), or no row carries loss.
    """
    if int(os.environ.get("RANK", "0")):
        sizes = [len(ids) for group in _groups(dataset) for ids, _ in group]
        return len(sizes), max(sizes, default=0)
    target = Path(path).expanduser()
    if target.exists():
        raise ConfigError(f"{target} must be a new file, got one that is there; remove it or choose another")
    if reason := misplaced(target):
        raise ConfigError(f"rows must go to a file that can be written, got {target}: {reason}")
    staging = target.with_name(f".{target.name}.{os.getpid()}")
    num_rows = longest = 0
    try:
        with pq.ParquetWriter(staging, SCHEMA) as writer:
            for group in _groups(dataset):
                num_rows += len(group)
                longest = max(longest, *(len(ids) for ids, _ in group))
                columns = {name: [pair[at] for pair in group] for at, name in enumerate(SCHEMA.names)}
                writer.write_table(pa.table(columns, schema=SCHEMA))
        if not num_rows:
            raise ConfigError("the data set must have rows that carry loss, got none")
        staging.replace(target)
    finally:
        staging.unlink(missing_ok=True)
    return num_rows, longest


def _groups(dataset: Any) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    group: list[tuple[np.ndarray, np.ndarray]] = []
    for ids, labels in rows_of(dataset):
        mask = mask_of(ids, labels)
        if mask.any():
            group.append((ids.astype(np.int32), np.where(mask, ids, IGNORED).astype(np.int32)))
        if len(group) == ROWS_PER_GROUP:
            yield group
            group = []
    if group:
        yield group
