"""`anneal cache convert`: teacher logprobs that DistillKit stored (distillkit.py) as rectangles (topk_table.py).

The result is marked, in its metadata, as what it is: known at T = 1 only, of a teacher whose identity nobody recorded.
It is no cache: a cache knows the tail at seven temperatures and the logprob of every label, and these files hold
neither. What decides whether they belong to a model is its KL before the first step.

Row i of a file predicts token i + 1; there may be one row less than tokens. Packed files name the sequences of a line
1, 2, ... in `attention_mask`: each becomes a row of its own.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cache_builder.tools.distillkit import Compression
from cache_builder.tools.parquet_file import NewParquetFile
from cache_builder.tools.topk_table import (
    PADDING_LOGPROB,
    TopKReport,
    TopKRow,
    TopKTables,
    check_cells,
    check_choice,
    layout_metadata,
    schema_of,
)
from formats.disk.token_row import IGNORED
from formats.errors import ConfigError, FormatError, one_line
from formats.progress import Progress

LOGPROBS, IDS = "compressed_logprobs", "bytepacked_indices"
_OTHER_FORMATS = {"packed_indices": "the legacy format", "token_ids": "the uncompressed format"}
LINES_PER_BATCH = 2
"""Lines read at a time; one of 8,192 tokens takes some 100 MB while it is decoded."""


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """What was written."""

    table: TopKReport
    """The new file."""
    num_over: int
    """Positions whose entries summed to 1 or more: made to sum to 1, without a tail."""

    def text(self) -> str:
        """Four lines: the result, how to read it, and what is not known."""
        return (
            f"{self.table.text()}\n"
            f"{self.num_over} positions had entries of a mass of 1 or more, which the compression does; they have no "
            "tail\n"
            "T = 1 only, identity unverified: the KL of its own teacher must be nearly zero before the first step"
        )


def convert_distillkit(
    files: Sequence[str | Path],
    compression: str | Path,
    out: str | Path,
    *,
    k: int | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Write the rows of DistillKit's Parquet files, in order, to one Parquet file that appears when it is complete.

    Args:
        compression: its `compression_config.yaml`.
        k: entries of every position; None is the files' own number. The others join the tail.
        limit: read only so many lines.

    Raises:
        ConfigError: `out` exists or cannot be written; no files; `k` out of range; a configuration that is not
            supported.
        FormatError: files of another format or configuration, or damaged.
    """
    progress = progress or Progress()
    file = NewParquetFile(out)
    settings = Compression.read(compression)
    if not files:
        raise ConfigError("convert needs at least one Parquet file, got none")
    check_choice(k, limit, most=settings.k, what="the entries of a position in these files")
    k = k or settings.k
    reading = _Reading([Path(name).expanduser() for name in files], settings, k, limit, progress)
    tables = TopKTables(reading.rows(), k)
    try:
        progress.start("convert", reading.count_lines(), unit="line")
        num_bytes = file.write(schema_of(k), _metadata(files, settings, k), tables)
    finally:
        progress.finish()
    return ConvertReport(table=tables.report(str(file.path), num_bytes), num_over=reading.num_over)


def _metadata(files: Sequence[str | Path], settings: Compression, k: int) -> dict[str, str]:
    return {
        **layout_metadata(k),
        "anneal_marks": json.dumps(["T = 1 only", "identity unverified"]),
        "distillkit": json.dumps(
            {"files": [Path(name).name for name in files], "d": settings.d, "k": settings.k}
        ),
    }


class _Reading:
    """The files' lines as rows."""

    def __init__(
        self, files: list[Path], settings: Compression, k: int, limit: int | None, progress: Progress
    ) -> None:
        self._files, self._settings, self._k, self._limit = files, settings, k, limit
        self._progress = progress
        self.num_over = 0

    def count_lines(self) -> int:
        """Of all files together, at most the limit.

        Raises:
            FormatError: a file that is no Parquet, or of another format.
        """
        total = 0
        for path in self._files:
            opened = _open(path)
            total += opened.metadata.num_rows
            names = opened.schema_arrow.names
            if missing := [name for name in ("input_ids", LOGPROBS, IDS) if name not in names]:
                other = next((kind for name, kind in _OTHER_FORMATS.items() if name in names), None)
                raise FormatError(
                    f"{path} must have the columns input_ids, {LOGPROBS} and {IDS}, got none named {missing[0]}"
                    + (f"; it is {other} of DistillKit, which is not read" if other else "")
                )
        return min(total, self._limit or total)

    def rows(self) -> Iterator[TopKRow]:
        """Every sequence of every line."""
        left = self._limit
        for path in self._files:
            opened = _open(path)
            known = [
                name
                for name in ("input_ids", LOGPROBS, IDS, "attention_mask", "labels")
                if name in opened.schema_arrow.names
            ]
            line = 0
            for batch in opened.iter_batches(batch_size=LINES_PER_BATCH, columns=known):
                for at in range(batch.num_rows):
                    if left == 0:
                        return
                    where = f"{path.name}, line {line}"
                    yield from self._sequences({name: batch.column(name)[at] for name in known}, where)
                    line += 1
                    left = None if left is None else left - 1

    def _sequences(self, line: dict[str, pa.Scalar], where: str) -> Iterator[TopKRow]:
        tokens = _numbers(line["input_ids"], where)
        logprobs = _bytes(line[LOGPROBS], self._settings.logprob_bytes, LOGPROBS, where)
        ids = _bytes(line[IDS], self._settings.id_bytes, IDS, where)
        length, num_rows = len(tokens), len(ids)
        if len(logprobs) != num_rows or num_rows not in (length, length - 1):
            raise FormatError(
                f"{where} must have a distribution for every token, or for all but the last, got {len(logprobs)} and "
                f"{num_rows} for {length} tokens"
            )
        if tokens.min() < 0 or tokens.max() >= self._settings.d:
            raise FormatError(
                f"{where} must have input_ids below d = {self._settings.d}, got "
                f"{int(tokens.min() if tokens.min() < 0 else tokens.max())}; another configuration?"
            )
        segments = _column(line, "attention_mask", length, np.ones(length, np.int64), where)
        labels = _column(line, "labels", length, tokens, where)
        if ((labels != IGNORED) & (labels != tokens)).any():
            raise FormatError(f"{where} must have labels that are its tokens or {IGNORED}, got others")
        try:
            entries, values = self._settings.decode_ids(ids), self._settings.decode_logprobs(logprobs)
        except FormatError as error:
            raise FormatError(f"{where}: {error}") from None
        bounds = np.flatnonzero(np.diff(segments)) + 1
        for start, stop in zip([0, *bounds], [*bounds, length], strict=True):
            if segments[start] != 0 and stop > start:  # 0 is padding
                check_cells(int(stop - start), self._k, where)
                known = slice(start, min(stop, num_rows))
                yield self._row(tokens[start:stop], labels[start:stop], entries[known], values[known])
        self._progress.advance(1, length)

    def _row(
        self, tokens: np.ndarray, labels: np.ndarray, entries_Pk: np.ndarray, logprobs_Pk: np.ndarray
    ) -> TopKRow:
        """One sequence; nothing predicts its first token."""
        order = np.argsort(-logprobs_Pk, axis=1, kind="stable")  # a fitted curve need not fall
        entries = np.take_along_axis(entries_Pk, order, 1)
        probabilities = np.exp(np.take_along_axis(logprobs_Pk, order, 1))
        total = probabilities.sum(axis=1)
        over = total >= 1
        self.num_over += int(over.sum())
        rest = np.where(over, 0.0, 1 - total) + probabilities[:, self._k :].sum(axis=1) / np.maximum(
            total, 1.0
        )
        length, known = len(tokens), len(entries)
        ids = np.zeros((length, self._k), np.int32)
        values = np.full((length, self._k), PADDING_LOGPROB, np.float32)
        tail = np.full(length, PADDING_LOGPROB, np.float32)
        ids[:known] = entries[:, : self._k]
        with np.errstate(divide="ignore"):
            kept = np.log(probabilities[:, : self._k] / np.maximum(total, 1.0)[:, None])
            values[:known] = np.maximum(kept, PADDING_LOGPROB)
            tail[:known] = np.maximum(np.log(rest), PADDING_LOGPROB)
        targets = labels.astype(np.int32)
        targets[0] = IGNORED
        mask = np.arange(length) < known
        return TopKRow(tokens.astype(np.int32), targets, ids, values, tail, mask, known * self._k)


def _open(path: Path):  # type: ignore[no-untyped-def]  # pyarrow has no types
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise FormatError(f"{path} must be a Parquet file, got {one_line(error)}") from None


def _numbers(value: pa.Scalar, where: str) -> np.ndarray:
    """int64 [L] of a list of whole numbers."""
    values = getattr(value, "values", None)
    if values is None or values.null_count or not pa.types.is_integer(values.type) or not len(values):
        raise FormatError(
            f"{where} must have lists of whole numbers, got {value.type} that is empty or has nulls"
        )
    return values.to_numpy(zero_copy_only=False).astype(np.int64)


def _column(
    line: dict[str, pa.Scalar], name: str, length: int, default: np.ndarray, where: str
) -> np.ndarray:
    if name not in line:
        return default
    values = _numbers(line[name], where)
    if len(values) != length:
        raise FormatError(
            f"{where} must have {length} numbers in {name}, as many as tokens, got {len(values)}"
        )
    return values


def _bytes(value: pa.Scalar, width: int, name: str, where: str) -> np.ndarray:
    """uint8 [P, width] of a list of lists, or of byte strings."""
    lists = getattr(value, "values", None)
    if lists is not None and (pa.types.is_binary(lists.type) or pa.types.is_large_binary(lists.type)):
        flat = np.frombuffer(b"".join(lists.drop_null().to_pylist()), np.uint8)
        lengths = pc.binary_length(lists).fill_null(0).to_numpy()
    elif lists is not None and pa.types.is_nested(lists.type) and hasattr(lists, "flatten"):
        flat = lists.flatten().to_numpy(zero_copy_only=False)
        lengths = pc.list_value_length(lists).fill_null(0).to_numpy()
    else:
        raise FormatError(f"{where} must have lists of bytes in {name}, got {value.type}")
    if (lengths != width).any():
        raise FormatError(
            f"{where} must have {width} bytes a position in {name}, as the configuration says, got "
            f"{int(lengths[lengths != width][0])}; another configuration?"
        )
    if flat.dtype != np.uint8:
        if len(flat) and not (np.issubdtype(flat.dtype, np.integer) and 0 <= flat.min() <= flat.max() <= 255):
            raise FormatError(f"{where} must have bytes in {name}, got {flat.dtype}")
        flat = flat.astype(np.uint8)
    return flat.reshape(-1, width)
