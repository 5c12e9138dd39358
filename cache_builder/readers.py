"""Records out of one file: .jsonl, .json, .csv, .parquet, .arrow or .txt, as a stream.

Each reader yields one record at a time and holds no more than one record (JSON Lines, CSV), one batch of columns
(Parquet, Arrow) or one document (text), so memory does not grow with the file. The exception is a `.json` file
with one big array, which has to be parsed at once. Values keep the type that the file gives them: nothing is
guessed, so a CSV cell `42` stays the text "42". Every error names the file and the line or row.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

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


def read_records(path: Path) -> Iterator[Record]:
    """The records of one file, in its order.

    Raises:
        CorpusError: unreadable, torn or malformed; the message names the file and the line or row.
    """
    family = family_of(path)
    assert family is not None, path
    try:
        yield from READERS[family](path)
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"a corpus must be UTF-8 text, got other bytes in {path}; convert the file"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(f"a compressed corpus must be whole, got {path}: {error}; copy it again") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise CorpusError(f"a corpus must be readable, got {path}: {reason}") from error


def _open_text(path: Path) -> IO[str]:
    """The file as UTF-8 text without a byte-order mark, decompressed."""
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8-sig")  # type: ignore[arg-type]
    if path.suffix == ".zst":
        import zstandard

        try:
            stream = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True)
            return io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8-sig")  # type: ignore[type-var]
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from error
    return path.open(encoding="utf-8-sig", newline="")


def _read_json(path: Path) -> Iterator[Record]:
    """JSON Lines, or one array of objects. Which one is seen from the first character, not from the suffix."""
    import zstandard

    try:
        with _open_text(path) as file:
            first = _first_character(file)
        if first == "[":
            yield from _read_json_array(path)
        else:
            yield from _read_json_lines(path)
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error


def _first_character(file: IO[str]) -> str:
    while block := file.read(4096):
        if stripped := block.lstrip():
            return stripped[0]
    return ""


def _read_json_lines(path: Path) -> Iterator[Record]:
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                if number == 1 and ".json" in path.suffixes and _is_one_object(path):
                    raise CorpusError(
                        f"a .json corpus must be an array of records or one record per line, got one object in {path}"
                    ) from error
                reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
                column = f" at character {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                raise CorpusError(
                    f"every line must be one JSON object, got bad JSON in {path}, line {number}: {reason}{column}; "
                    "mend or delete the line"
                ) from error
            yield Record(_require_object(values, f"{path}, line {number}", "line"), path.name, number, "line")


def _is_one_object(path: Path) -> bool:
    with _open_text(path) as file:
        try:
            return isinstance(json.load(file), dict)
        except (json.JSONDecodeError, RecursionError):
            return False


def _read_json_array(path: Path) -> Iterator[Record]:
    with _open_text(path) as file:
        try:
            array = json.load(file)
        except (json.JSONDecodeError, RecursionError) as error:
            place = f", line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else ""
            raise CorpusError(
                f"a .json corpus must be an array of records or one record per line, got bad JSON in {path}{place}"
            ) from error
    for number, values in enumerate(array, 1):
        yield Record(_require_object(values, f"{path}, row {number}", "record"), path.name, number)


def _require_object(values: Any, where: str, noun: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise CorpusError(
            f'every {noun} must be a JSON object such as {{"text": "..."}}, got {type(values).__name__} in {where}'
        )
    return values


def _read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(MAX_DOCUMENT_BYTES)  # the default of 128 KiB is shorter than many documents
    with _open_text(path) as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            for number, cells in enumerate(reader, 1):
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise CorpusError(
                        f"every row must have the {len(header)} columns of the header, got {len(cells)} in {path}, "
                        f"row {number} (line {reader.line_num}); quote cells that hold a comma or a line break"
                    )
                yield Record(dict(zip(header, cells, strict=True)), path.name, number)
        except csv.Error as error:
            raise CorpusError(
                f"a .csv corpus must be valid CSV, got {path}, line {reader.line_num}: {error}"
            ) from error


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _rows_of(file.iter_batches(batch_size=BATCH_ROWS), path)
    except pa.ArrowInvalid as error:
        raise CorpusError(
            f"a .parquet corpus must be a Parquet file, got {path}: {_one_line(error)}"
        ) from error


def _read_arrow(path: Path) -> Iterator[Record]:
    """Both encodings of Arrow IPC: the file format, and the stream format that `datasets` writes."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            try:
                file = pa.ipc.open_file(source)
                batches = (file.get_batch(index) for index in range(file.num_record_batches))
            except pa.ArrowInvalid:
                source.seek(0)
                batches = iter(pa.ipc.open_stream(source))
            yield from _rows_of(batches, path)
    except pa.ArrowInvalid as error:
        raise CorpusError(
            f"an .arrow corpus must be an Arrow IPC file, got {path}: {_one_line(error)}"
        ) from error


def _rows_of(batches: Iterator[Any], path: Path) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for values in batch.slice(start, BATCH_ROWS).to_pylist():
                number += 1
                yield Record(values, path.name, number)


def _read_text(path: Path) -> Iterator[Record]:
    """The whole file is one document."""
    size = path.stat().st_size
    if size > MAX_DOCUMENT_BYTES:
        raise CorpusError(
            f"a .txt file is one document of at most {MAX_DOCUMENT_BYTES // 2**20} MiB, got {size // 2**20} MiB in {path}; "
            'write it as .jsonl, one {"text": ...} per document'
        )
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    yield Record({"text": data.decode("utf-8")}, path.name, 1)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "txt": _read_text,
}
