"""Records out of one file: .jsonl, .json, .csv, .parquet, .arrow or .txt, as a stream.

Each reader holds one record (JSON Lines, CSV), one batch of columns (Parquet, Arrow) or one document (text)
at a time, so memory does not grow with the file. The exception is a `.json` file with one big array, which
has to be parsed at once. Values keep the type that the file gives them: nothing is guessed, so a CSV cell
`42` stays the text "42"; what column files add to nested records is taken out (`column_values.py`). Every
error names the file and the line or row.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import zstandard

from cache_builder.corpus.column_values import plain
from cache_builder.corpus.json_text import parse_json
from formats.errors import CorpusError

# Suffix -> family. Only one family may occur in a corpus: their columns would not agree.
FAMILIES = {
    ".jsonl": "json",
    ".json": "json",
    ".jsonl.gz": "json",
    ".json.gz": "json",
    ".jsonl.zst": "json",
    ".json.zst": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "txt",
}
BATCH_ROWS = 1024
# A document is held in memory as a whole while it is tokenised.
MAX_DOCUMENT_BYTES = 256 * 2**20
LARGEST_WINDOW = 2**31
"""Bytes: the longest window of any zstd file, 31 bits."""
Columns = Collection[str] | None


class Record(NamedTuple):
    """One record of the corpus, and where it stands."""

    values: Mapping[str, Any]
    """Column name to value, as the file has it."""
    source: str
    """Name of the file, or of the data set."""
    number: int
    """Line (JSON Lines) or row (everything else) in that file, from 1."""
    unit: str = "row"
    """What `number` counts."""
    left_out: tuple[str, ...] = ()
    """Columns that a column file has and nobody asked for; `values` is without them."""

    @property
    def where(self) -> str:
        """The place as a reader of an error message looks it up: `data.jsonl, line 12`."""
        return f"{self.source}, {self.unit} {self.number}"


def suffix_of(path: Path) -> str | None:
    """The recognised suffix of `path` (compression included), or None."""
    name = path.name.lower()
    matches = [suffix for suffix in FAMILIES if name.endswith(suffix) and len(name) > len(suffix)]
    return max(matches, key=len, default=None)


def family_of(path: Path) -> str | None:
    """`json`, `csv`, `parquet`, `arrow`, `txt`, or None for a file that is no corpus."""
    suffix = suffix_of(path)
    return None if suffix is None else FAMILIES[suffix]


def read_records(path: Path, columns: Columns = None) -> Iterator[Record]:
    """The records of one file, in its order.

    Parquet and Arrow files give only those of `columns` that they have (all if None), and the names of the others;
    the other kinds give all.

    Raises:
        CorpusError: unreadable, torn or malformed; the message names the file and the line or row.
    """
    family = family_of(path)
    assert family is not None, path
    try:
        yield from READERS[family](path, columns)
    except UnicodeDecodeError as error:
        raise CorpusError(f"a corpus must be UTF-8 text, got other bytes in {path}; convert it") from error
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise CorpusError(f"a compressed corpus must be whole, got {path}: {error}; copy it again") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise CorpusError(f"a corpus must be readable, got {path}: {reason}") from error


def _open_binary(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_ZstdStream(path))
    return path.open("rb")


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of all frames of a file. A torn file raises, which `stream_reader` does not."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._frame: Any = None
        self._pending = b""
        self._at = 0

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while self._at == len(self._pending):
            unused = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            data = unused or self._file.read(1 << 16)
            if self._frame is not None and self._frame.eof:
                self._frame = None
            if not data:
                if self._frame is not None:
                    raise EOFError("it ends within a compressed frame")
                return 0
            self._frame = (
                self._frame or zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()
            )
            self._pending, self._at = self._frame.decompress(data), 0
        size = min(len(buffer), len(self._pending) - self._at)
        buffer[:size] = memoryview(self._pending)[self._at : self._at + size]
        self._at += size
        return size


def _read_json(path: Path, _: Columns) -> Iterator[Record]:
    """JSON Lines, or one array of objects: told apart by the first character, not by the suffix."""
    with _open_binary(path) as file:
        first = b""
        while not first and (block := file.read(4096)):
            first = block.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    reader = _read_json_array if first == b"[" else _read_json_lines
    yield from reader(path)


def _read_json_lines(path: Path) -> Iterator[Record]:
    with _open_binary(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                values = parse_json(line.decode("utf-8"), f"{path}, line {number}")
            except UnicodeDecodeError as error:
                raise CorpusError(
                    f"a corpus must be UTF-8 text, got other bytes in {path}, line {number}; convert it"
                ) from error
            except json.JSONDecodeError as error:
                if number == 1 and _is_one_object(path):
                    raise CorpusError(
                        "a .json corpus must be an array of records or one record per line, "
                        f"got one object over several lines in {path}"
                    ) from error
                raise CorpusError(
                    f"every line must be one JSON object, got bad JSON in {path}, line {number}: "
                    f"{error.msg} at character {error.colno}; mend or delete the line"
                ) from error
            yield Record(_require_object(values, f"{path}, line {number}", "line"), path.name, number, "line")


def _is_one_object(path: Path) -> bool:
    with _open_binary(path) as file:
        try:
            return isinstance(json.load(file), dict)
        except (ValueError, RecursionError):
            return False


def _read_json_array(path: Path) -> Iterator[Record]:
    with _open_binary(path) as file:
        text = file.read().removeprefix(codecs.BOM_UTF8).decode("utf-8")
    try:
        array = parse_json(text, str(path))
    except json.JSONDecodeError as error:
        raise CorpusError(
            "a .json corpus must be an array of records or one record per line, "
            f"got bad JSON in {path}, line {error.lineno}: {error.msg}; mend the file"
        ) from error
    for number, values in enumerate(array, 1):
        yield Record(_require_object(values, f"{path}, row {number}", "record"), path.name, number)


def _require_object(values: Any, where: str, noun: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise CorpusError(
            f'every {noun} must be a JSON object such as {{"text": "..."}}, '
            f"got {type(values).__name__} in {where}"
        )
    return values


def _require_unique(columns: list[str], path: Path) -> None:
    """A second column of a name would take the place of the first."""
    if repeated := [name for name in columns if columns.count(name) > 1]:
        raise CorpusError(
            f"every column must have a name of its own, got {repeated[0]} twice in {path}; rename or drop one"
        )


def _read_csv(path: Path, _: Columns) -> Iterator[Record]:
    csv.field_size_limit(MAX_DOCUMENT_BYTES)  # the default of 128 KiB is shorter than many documents
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            _require_unique([name for name in header if name], path)
            for number, cells in enumerate(reader, 1):
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise CorpusError(
                        f"every row must have the {len(header)} columns of the header, got {len(cells)} in "
                        f"{path}, row {number} (line {reader.line_num}); quote cells with commas or new lines"
                    )
                yield Record(dict(zip(header, cells, strict=True)), path.name, number)
        except csv.Error as error:
            raise CorpusError(
                f"a .csv corpus must be valid CSV, got {path}, line {reader.line_num}: {error}"
            ) from error


def _read_parquet(path: Path, columns: Columns) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _require_unique(file.schema_arrow.names, path)
            found = file.schema_arrow.names
            names = [name for name in found if columns is None or name in columns]
            yield from _rows_of(file.iter_batches(batch_size=BATCH_ROWS, columns=names), path, names, found)
    except pa.ArrowException as error:
        raise CorpusError(f"a .parquet corpus must be a Parquet file, got {path}: {_line(error)}") from error


def _read_arrow(path: Path, columns: Columns) -> Iterator[Record]:
    """Both encodings of Arrow IPC: the file format, and the stream format that `datasets` writes."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            try:
                file = pa.ipc.open_file(source)
                schema = file.schema
                batches = (file.get_batch(index) for index in range(file.num_record_batches))
            except pa.ArrowInvalid:
                source.seek(0)
                batches = pa.ipc.open_stream(source)
                schema = batches.schema
            _require_unique(schema.names, path)
            names = [name for name in schema.names if columns is None or name in columns]
            yield from _rows_of(iter(batches), path, names, schema.names)
    except pa.ArrowException as error:
        raise CorpusError(
            f"an .arrow corpus must be an Arrow IPC file, got {path}: {_line(error)}"
        ) from error


def _rows_of(batches: Iterator[Any], path: Path, names: list[str], found: list[str]) -> Iterator[Record]:
    number = 0
    left_out = tuple(name for name in found if name not in names)
    for batch in batches:
        batch = batch.select(names)
        kinds = dict(zip(names, batch.schema.types, strict=True))
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for values in batch.slice(start, BATCH_ROWS).to_pylist(maps_as_pydicts="strict"):
                number += 1
                values = {name: plain(value, kinds[name]) for name, value in values.items()}
                yield Record(values, path.name, number, left_out=left_out)


def _read_text(path: Path, _: Columns) -> Iterator[Record]:
    """The whole file is one document."""
    size = path.stat().st_size
    if size > MAX_DOCUMENT_BYTES:
        raise CorpusError(
            f"a .txt file is one document of at most {MAX_DOCUMENT_BYTES // 2**20} MiB, "
            f'got {size // 2**20} MiB in {path}; write .jsonl with one {{"text": ...}} per document'
        )
    if size:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        yield Record({"text": data.decode("utf-8")}, path.name, 1)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


READERS: dict[str, Callable[[Path, Columns], Iterator[Record]]] = {
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "txt": _read_text,
}
