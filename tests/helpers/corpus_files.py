"""The same records in files of every format, read and refused."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from cache_builder.corpus.corpus import CorpusConfig, open_corpus
from formats.errors import ConfigError, CorpusError

RECORDS = [{"text": f"document {index}\nwith 漢字", "id": index} for index in range(7)]
TEXTS = [record["text"] for record in RECORDS]


def lines_of(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write(path: Path, records: list[dict[str, Any]] = RECORDS) -> Path:
    """Write the records in the format of the suffix, as other programs do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(records)
    match "".join(path.suffixes):
        case ".jsonl":
            path.write_text(lines_of(records), encoding="utf-8")
        case ".json":
            path.write_text(json.dumps(records, indent=1), encoding="utf-8")
        case ".jsonl.gz":
            path.write_bytes(gzip.compress(lines_of(records).encode()))
        case ".jsonl.zst":
            path.write_bytes(zstandard.compress(lines_of(records).encode()))
        case ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(records[0]))
                writer.writeheader()
                writer.writerows(records)
        case ".parquet":
            pq.write_table(table, path, row_group_size=3)
        case ".arrow":
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
                file.write_table(table, max_chunksize=2)
        case other:
            raise AssertionError(other)
    return path


def texts(source: Path | str, **options: Any) -> list[str]:
    return [record.values["text"] for record in open_corpus(CorpusConfig(source=str(source), **options))]


def refusal(source: Path | str, **options: Any) -> str:
    """The message of the error that opening or reading raises."""
    with pytest.raises((CorpusError, ConfigError)) as caught:
        list(open_corpus(CorpusConfig(source=str(source), **options)))
    assert "\n" not in str(caught.value)
    return str(caught.value)
