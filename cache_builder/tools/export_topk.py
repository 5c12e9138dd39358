"""`anneal cache export --layout topk`: a cache as rectangles (topk_table.py), for trainers that know nothing of caches.

Tail draws and the tail at other temperatures are left out.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from cache_builder.tools.parquet_file import NewParquetFile
from cache_builder.tools.topk_table import (
    PADDING_LOGPROB,
    TopKReport,
    TopKRow,
    TopKTables,
    check_cells,
    schema_of,
)
from formats.cache import TeacherCache
from formats.errors import ConfigError
from formats.progress import Progress


def export_topk(
    cache: str | Path,
    out: str | Path,
    *,
    k: int | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> TopKReport:
    """Write the cache as rectangles to one Parquet file, which appears when it is complete. Memory: one row group.

    Args:
        k: entries of every position; None is the most that a position keeps, which reads the cache once more.
        limit: export only so many examples; None exports all.

    Raises:
        ConfigError: `out` exists, is no .parquet file name, or cannot be written; `k` is out of range; a row is too
            long for so many entries.
        FormatError: `cache` is no cache, or damaged.
    """
    progress = progress or Progress()
    opened = TeacherCache(cache)
    vocab_size = opened.manifest.vocab_size
    file = NewParquetFile(out)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}")
    if k is not None and not 1 <= k <= vocab_size:
        raise ConfigError(f"k must be from 1 to {vocab_size}, the teacher's vocabulary, got {k}")
    num_rows = min(len(opened), limit or len(opened))
    try:
        if k is None:
            progress.start("count entries", num_rows)
            k = _largest_head(opened, num_rows, progress)
        progress.start("export", num_rows)
        tables = TopKTables(_rows(opened, num_rows, k, progress), k)
        num_bytes = file.write(schema_of(k), _metadata(opened, k), tables)
    finally:
        progress.finish()
    return tables.report(str(file.path), num_bytes)


def _rows(cache: TeacherCache, num_rows: int, k: int, progress: Progress) -> Iterator[TopKRow]:
    for index, row in enumerate(cache.rows(0, num_rows)):
        check_cells(len(row), k, f"row {index}")
        yield TopKRow.of(row, k)
        progress.advance(1, len(row))


def _largest_head(cache: TeacherCache, num_rows: int, progress: Progress) -> int:
    """The most kept tokens of a position in the first rows; 1 where no row has a position."""
    largest = 1
    for row in cache.rows(0, num_rows):
        largest = max(largest, int(row.teacher.counts.max(initial=1)))
        progress.advance(1, len(row))
    return largest


def _metadata(cache: TeacherCache, k: int) -> dict[str, str]:
    return {
        "anneal_layout": "topk",
        "k": str(k),
        "temperature": "1",
        "predicts": "position t predicts token t + 1; labels are not shifted",
        "padding_logprob": str(PADDING_LOGPROB),
        "vocab_size": str(cache.manifest.vocab_size),
        "anneal_identity": json.dumps(cache.identity.to_dict()),
    }
