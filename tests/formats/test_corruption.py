"""Damaged and foreign caches: a typed error or the identical rows, never anything else."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from damaged_caches import OPTIONS, edited, reader_of, shard_path, table_of, write_arrow
from make_teachers import by_id, write_cache

from formats import (
    Manifest,
    TeacherCache,
)
from formats.errors import CorruptShardError, FormatError


def contents(directory: Path) -> list[bytes]:
    """Everything that opening and reading a cache yields, as comparable bytes."""
    cache = TeacherCache(directory)
    seen = [json.dumps(cache.manifest.identity).encode(), cache.manifest.codec.to_dict().__repr__().encode()]
    for row in cache:
        t = row.teacher
        arrays = (
            row.input_ids,
            row.loss_mask,
            *by_id(t),
            t.log_tail_nodes,
            t.label_logprobs,
            *by_id(t.draws),
        )
        seen.append(row.key + b"".join(np.ascontiguousarray(a).tobytes() for a in arrays))
    return seen


def footer_start(data: bytes) -> int:
    return len(data) - 10 - int.from_bytes(data[-10:-6], "little")


def first_batch(data: bytes) -> int:
    """Where the schema message ends."""
    return 8 + 8 + int.from_bytes(data[12:16], "little")


def assert_noticed_or_harmless(directory: Path, path: Path, changed: bytes, expected: list[bytes]) -> bool:
    path.write_bytes(changed)
    try:
        assert contents(directory) == expected
    except FormatError:
        return True
    return False


def test_every_bit_of_the_manifest(cache_dir: Path):
    path, expected = cache_dir / "manifest.json", contents(cache_dir)
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(FormatError):
            Manifest.from_bytes(bytes(changed))
    assert contents(cache_dir) == expected


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 17])
def test_every_bit_of_header_and_footer(cache_dir: Path, every: int):
    """Every bit where there is time for it, else every 17th: each bit of a byte gets its turn."""
    path, expected = shard_path(cache_dir), contents(cache_dir)
    data = path.read_bytes()
    places = [*range(first_batch(data)), *range(footer_start(data), len(data))]
    for bit in range(0, 8 * len(places), every):
        changed = bytearray(data)
        changed[places[bit // 8]] ^= 1 << (bit % 8)
        assert_noticed_or_harmless(cache_dir, path, bytes(changed), expected)


def test_random_bits_elsewhere(cache_dir: Path):
    path, expected = shard_path(cache_dir), contents(cache_dir)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    noticed = 0
    for at in rng.integers(first_batch(data), footer_start(data), 1000).tolist():
        changed = bytearray(data)
        changed[at] ^= 1 << int(rng.integers(8))
        noticed += assert_noticed_or_harmless(cache_dir, path, bytes(changed), expected)
    assert noticed > 500


def test_truncations_at_both_ends(cache_dir: Path):
    path = shard_path(cache_dir)
    data = path.read_bytes()
    for length in [*range(0, min(1024, len(data)), 7), *range(max(0, len(data) - 1024), len(data), 3)]:
        path.write_bytes(data[:length])
        with pytest.raises(CorruptShardError, match="must have"):
            TeacherCache(cache_dir)[0]
        with pytest.raises(FormatError):
            # The same without the manifest's size check in front.
            from formats.disk.arrow_file import ArrowFile
            from formats.disk.byte_source import open_store

            ArrowFile(open_store(cache_dir).open(path.name), path.name)


def test_validate_full_notices_what_reading_may_not(cache_dir: Path):
    path = shard_path(cache_dir)
    data = bytearray(path.read_bytes())
    at = first_batch(bytes(data)) - 1  # padding of the schema message
    data[at] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptShardError, match="SHA-256"):
        TeacherCache(cache_dir).validate(full=True)


def test_missing_swapped_and_foreign_shards(cache_dir: Path, tmp_path: Path):
    first, second = sorted(cache_dir.glob("*.arrow"))
    data = first.read_bytes()
    first.unlink()
    with pytest.raises(CorruptShardError, match=r"must contain shard-00000\.arrow"):
        TeacherCache(cache_dir).validate()
    shutil.copy(second, first)
    with pytest.raises(CorruptShardError):
        TeacherCache(cache_dir).validate()
    write_cache(tmp_path / "other", vocab_size=32, **OPTIONS)
    foreign = (tmp_path / "other" / first.name).read_bytes()
    first.write_bytes(foreign)
    manifest = edited(cache_dir, lambda m: m["shards"][0].update(num_bytes=len(foreign)))
    (cache_dir / "manifest.json").write_bytes(manifest)
    with pytest.raises(FormatError, match="belongs to another cache"):
        TeacherCache(cache_dir).validate()
    first.write_bytes(data)


def test_an_auxiliary_file_is_checked(cache_dir: Path):
    (cache_dir / "notes.txt").write_bytes(b"Auxiliary")
    with pytest.raises(CorruptShardError, match=r"notes\.txt"):
        TeacherCache(cache_dir).file("notes.txt")
    with pytest.raises(CorruptShardError):
        TeacherCache(cache_dir).validate()


def test_foreign_tables_are_refused(cache_dir: Path, tmp_path: Path):
    table = table_of(cache_dir)
    path = tmp_path / "x.arrow"
    write_arrow(path, table.replace_schema_metadata(table.schema.metadata).slice(0, 2))
    assert len(reader_of(path)) == 2
    compressed = pa.ipc.IpcWriteOptions(compression="zstd")
    ids = table.column("input_ids")
    for bad, match, options in (
        (pa.table({"a": [1]}), "columns", {}),
        (table.replace_schema_metadata({}), "metadata key", {}),
        (table.replace_schema_metadata({"anneal": "{}"}), "digest", {}),
        (table.drop_columns(["key"]), "columns", {}),
        (table.set_column(1, "input_ids", ids.cast(pa.list_(pa.int64()))), "columns", {}),
        (table.set_column(1, "input_ids", ids.cast(pa.large_list(pa.int32()))), "columns", {}),
        (table.slice(0, 2), "compression", {"options": compressed}),
        (table, "record batch", {}),  # more rows in a batch than the metadata says
    ):
        write_arrow(path, bad, **options)
        with pytest.raises(FormatError, match=match):
            reader_of(path)


def test_swapped_columns_within_a_shard_are_noticed(cache_dir: Path, tmp_path: Path):
    table = table_of(cache_dir).slice(0, 2)
    path = tmp_path / "x.arrow"
    swapped = table.set_column(0, table.schema.field(0), table.column("key").take([1, 0]))
    write_arrow(path, swapped)
    with pytest.raises(CorruptShardError, match="content key"):
        reader_of(path)
    payloads = table.set_column(3, table.schema.field(3), table.column("payload").take([1, 0]))
    write_arrow(path, payloads)
    with pytest.raises(CorruptShardError):
        reader_of(path)
