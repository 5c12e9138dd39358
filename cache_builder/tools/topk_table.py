"""Rectangles of top-k logprobs, the table that `export --layout topk` and `convert` write. docs/export.md describes it
for those who read it.

One line per example of `L` tokens, `k` entries at every position, the likeliest first:

    input_ids         list<int32> [L]
    labels            list<int32> [L]: NOT shifted, `labels[t]` is `input_ids[t]`, or -100 where t carries no loss
    teacher_ids       list<int32[k]> [L, k]: entry t predicts token t + 1, as the logits at t do
    teacher_logprobs  list<float[k]> [L, k]: natural log, T = 1
    teacher_tail      list<float> [L]: log of the mass of all other tokens
    teacher_mask      list<bool> [L]: whether t has a teacher; of a cache's rows the last token never has

Where `teacher_mask` is true, exp(teacher_logprobs) and exp(teacher_tail) sum to 1: the distribution that training
sees, made whole as training does it (the stored tail is rounded, so the stored numbers sum to nearly 1).

Padding, chosen so that no loop needs to know of it: an entry that a position does not have is its first token once
more, at a logprob of -10,000. Its probability is exactly 0 in every dtype, and 0 times a finite number is 0 where
0 times minus infinity would be NaN; and a set of ids stays the set of kept tokens, so that "all others" is right. A
tail of no tokens is -10,000 as well. Positions without a teacher hold id 0 and -10,000 everywhere: they add nothing
to a sum over positions.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from formats.cache import CacheRow
from formats.disk.token_row import IGNORED
from formats.errors import ConfigError, FormatError
from formats.logprobs.ragged import rank_in_segment, segment_logsumexp, segment_of
from formats.progress import counted, format_bytes

PADDING_LOGPROB = -10_000.0
"""Of entries that do not exist: finite in half precision too."""
CELLS_PER_GROUP = 1 << 22
"""Entries of a row group, [L, k] of all its rows: some 40 MB."""
MOST_CELLS = (1 << 31) - 1
"""Arrow numbers the entries of a column with 32 bits."""


@dataclass(frozen=True, kw_only=True)
class TopKReport:
    """What was written."""

    out: str
    """The Parquet file."""
    num_rows: int
    """Examples, the lines of the table."""
    num_tokens: int
    """Tokens of all rows."""
    num_positions: int
    """Those with a teacher."""
    k: int
    """Entries of every position."""
    mean_mass: float
    """Mean probability of a position's entries; 0 without positions."""
    padding: float
    """Share of the entries of positions with a teacher that are padding."""
    num_bytes: int
    """Size of the file."""

    def text(self) -> str:
        """Two lines: the result, and how to read it."""
        return (
            f"{self.out}: {counted(self.num_rows, 'row')} of {self.num_tokens} tokens, "
            f"{self.num_positions} with a teacher of {self.k} entries ({self.mean_mass:.1%} of its mass, "
            f"{self.padding:.0%} padding), {format_bytes(self.num_bytes)}\n"
            f"read it with: datasets.load_dataset('parquet', data_files='{self.out}', split='train')"
        )


def check_choice(k: int | None, limit: int | None, *, most: int, what: str) -> None:
    """Refuse numbers of entries and of examples that cannot be.

    Args:
        most: entries that a position can have.
        what: that number is, for the message.

    Raises:
        ConfigError: `limit` is below 1, or `k` out of range.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}")
    if k is not None and not 1 <= k <= most:
        raise ConfigError(f"k must be from 1 to {most}, {what}, got {k}")


def layout_metadata(k: int) -> dict[str, str]:
    """What the file says of its columns, whoever the teacher is."""
    return {
        "anneal_layout": "topk",
        "k": str(k),
        "temperature": "1",
        "predicts": "position t predicts token t + 1; labels are not shifted",
        "padding_logprob": str(PADDING_LOGPROB),
    }


@dataclass(frozen=True, eq=False)
class TopKRow:
    """One example as rectangles; the columns are described above."""

    input_ids: np.ndarray
    """int32 [L]."""
    labels: np.ndarray
    """int32 [L], not shifted."""
    teacher_ids: np.ndarray
    """int32 [L, k]."""
    teacher_logprobs: np.ndarray
    """float32 [L, k]."""
    teacher_tail: np.ndarray
    """float32 [L]."""
    teacher_mask: np.ndarray
    """bool [L]."""
    num_entries: int
    """Entries that are no padding."""

    @staticmethod
    def of(row: CacheRow, k: int) -> "TopKRow":
        """The k most probable tokens of every position; the others join the tail, exactly."""
        head = row.teacher.sorted()
        rank, position = rank_in_segment(head.offsets), segment_of(head.offsets)
        logprobs = head.logprobs.astype(np.float64)
        log_tail = head.log_tail(1.0).astype(np.float64)
        log_z = np.logaddexp(segment_logsumexp(logprobs, head.offsets), log_tail)
        kept = rank < k
        left_out = segment_logsumexp(np.where(kept, -np.inf, logprobs), head.offsets)
        first = head.token_ids[head.offsets[:-1]]
        at = row.positions

        length = len(row)
        ids = np.zeros((length, k), np.int32)
        values = np.full((length, k), PADDING_LOGPROB, np.float32)
        tail = np.full(length, PADDING_LOGPROB, np.float32)
        mask = np.zeros(length, np.bool_)
        ids[at] = first[:, None]
        ids[at[position[kept]], rank[kept]] = head.token_ids[kept]
        values[at[position[kept]], rank[kept]] = np.maximum(logprobs - log_z[position], PADDING_LOGPROB)[kept]
        tail[at] = np.maximum(np.logaddexp(log_tail, left_out) - log_z, PADDING_LOGPROB)
        mask[at] = True
        labels = np.where(row.loss_mask, row.input_ids, np.int32(IGNORED))
        return TopKRow(row.input_ids, labels, ids, values, tail, mask, int(kept.sum()))

    def mass(self) -> float:
        """The probability of all entries of all positions together."""
        return float(np.exp(self.teacher_logprobs[self.teacher_mask], dtype=np.float64).sum())


def schema_of(k: int) -> pa.Schema:
    """The columns, for so many entries."""
    return pa.schema(
        [
            ("input_ids", pa.list_(pa.int32())),
            ("labels", pa.list_(pa.int32())),
            ("teacher_ids", pa.list_(pa.list_(pa.int32(), k))),
            ("teacher_logprobs", pa.list_(pa.list_(pa.float32(), k))),
            ("teacher_tail", pa.list_(pa.float32())),
            ("teacher_mask", pa.list_(pa.bool_())),
        ]
    )


class TopKTables:
    """Rows as tables, one per row group, and what is counted on the way."""

    def __init__(self, rows: Iterable[TopKRow], k: int) -> None:
        self._rows, self._k = rows, k
        self.num_rows = self.num_tokens = self.num_positions = self.num_entries = 0
        self.mass = 0.0

    def __iter__(self) -> Iterator[pa.Table]:
        """One table per row group.

        Raises:
            FormatError: there is not a single row.
        """
        group: list[TopKRow] = []
        cells = 0
        for row in self._rows:
            own = row.teacher_ids.size
            if group and cells + own > CELLS_PER_GROUP:
                yield self._table(group)
                group, cells = [], 0
            group.append(row)
            cells += own
        if not group:
            raise FormatError("there must be a row to write, got none; the files are empty")
        yield self._table(group)

    def _table(self, group: list[TopKRow]) -> pa.Table:
        for row in group:
            self.num_rows += 1
            self.num_tokens += len(row.input_ids)
            self.num_positions += int(row.teacher_mask.sum())
            self.num_entries += row.num_entries
            self.mass += row.mass()
        lengths = [len(row.input_ids) for row in group]
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        schema = schema_of(self._k)
        columns = []
        for field in schema:
            flat = np.concatenate([getattr(row, field.name) for row in group])
            values = pa.array(flat.reshape(-1))
            if flat.ndim == 2:
                values = pa.FixedSizeListArray.from_arrays(values, self._k)
            columns.append(pa.ListArray.from_arrays(offsets, values))
        return pa.Table.from_arrays(columns, schema=schema)

    def report(self, out: str, num_bytes: int) -> TopKReport:
        """After the last table."""
        positions = max(self.num_positions, 1)
        return TopKReport(
            out=out,
            num_rows=self.num_rows,
            num_tokens=self.num_tokens,
            num_positions=self.num_positions,
            k=self._k,
            mean_mass=self.mass / positions,
            padding=1 - self.num_entries / (positions * self._k) if self.num_positions else 0.0,
            num_bytes=num_bytes,
        )


def check_cells(length: int, k: int, where: str) -> None:
    """Refuse a row of so many tokens that a column cannot number its entries.

    Raises:
        ConfigError: naming the row.
    """
    if length * k > MOST_CELLS:
        raise ConfigError(f"k must be at most {MOST_CELLS // length} for {where} of {length} tokens, got {k}")
