"""Caches with something changed behind their backs."""

from pathlib import Path

import independent_reader
import pyarrow as pa
import pytest

from formats import Manifest
from formats.disk.sealed_json import seal, unseal
from formats.errors import UnsupportedVersionError

OPTIONS = {"lengths": [6, 0, 11, 3, 1, 8], "rows_per_shard": 4, "rows_per_batch": 2}


def shard_path(directory: Path) -> Path:
    """The first shard."""
    return directory / "shard-00000.arrow"


def edited(directory: Path, change) -> bytes:
    """The manifest after a change, with a digest that is right."""
    content = unseal((directory / "manifest.json").read_bytes(), "manifest")
    change(content)
    return seal(content, indent=1)


def refused_manifest(directory: Path, change, match: str) -> None:
    """Neither reader takes the changed manifest."""
    data = edited(directory, change)
    with pytest.raises(UnsupportedVersionError, match=match):
        Manifest.from_bytes(data)
    (directory / "manifest.json").write_bytes(data)
    with pytest.raises(AssertionError):
        independent_reader.read_manifest(directory)


def write_arrow(path: Path, table: pa.Table, **options: object) -> None:
    """A table as an Arrow file."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema, **options) as writer:
        writer.write_table(table)


def reader_of(path: Path):
    """Every row that a shard gives."""
    from formats.disk.byte_source import open_store
    from formats.disk.shard import ShardReader

    reader = ShardReader(open_store(path.parent).open(path.name), path.name)
    return [reader.teacher(index) for index in range(len(reader))]


def table_of(directory: Path) -> pa.Table:
    """The first shard as a table."""
    return pa.ipc.open_file(pa.memory_map(str(shard_path(directory)))).read_all().combine_chunks()
