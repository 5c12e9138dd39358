"""`anneal cache export --layout topk`: a cache as rectangles (topk_table.py), for trainers that know nothing of caches.

Tail draws and the tail at other temperatures are left out.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from cache_builder.tools.parquet_file import NewParquetFile
from cache_builder.tools.topk_table import (
    TopKReport,
    TopKRow,
    TopKTables,
    check_cells,
    check_choice,
    layout_metadata,
    schema_of,
)
from formats.cache import TeacherCache
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
    file = NewParquetFile(out)
    check_choice(k, limit, most=opened.manifest.vocab_size, what="the teacher's vocabulary")
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
        **layout_metadata(k),
        "vocab_size": str(cache.manifest.vocab_size),
        "anneal_identity": json.dumps(cache.identity.to_dict()),
    }
