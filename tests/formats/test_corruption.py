"""Damaged, foreign and hostile caches: a typed error or the identical rows, never anything else."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import independent_reader
import numpy as np
import pyarrow as pa
import pytest
from make_teachers import by_id, capture, write_cache

from formats import (
    CacheWriter,
    CodecConfig,
    Manifest,
    TailDraws,
    TeacherCache,
    TokenRow,
    TopKLogprobs,
)
from formats.disk.sealed_json import seal, unseal
from formats.errors import CorruptShardError, FormatError, IncompleteCacheError, UnsupportedVersionError

OPTIONS = {"lengths": [6, 0, 11, 3, 1, 8], "rows_per_shard": 4, "rows_per_batch": 2}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corruption") / "cache"
    write_cache(directory, vocab_size=31, min_prob=0.05, draw_rate=6, **OPTIONS)
    return directory


@pytest.fixture
def cache_dir(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "cache"))


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


def shard_path(directory: Path) -> Path:
    return directory / "shard-00000.arrow"


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


# --- settings of the codec ------------------------------------------------------------------------------------


def refused_manifest(directory: Path, change, match: str) -> None:
    data = edited(directory, change)
    with pytest.raises(UnsupportedVersionError, match=match):
        Manifest.from_bytes(data)
    (directory / "manifest.json").write_bytes(data)
    with pytest.raises(AssertionError):
        independent_reader.read_manifest(directory)


DRAW_KEYS = ("draw_rate", "draw_steps")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m["codec"].pop("draw_rate"), "must have the keys"),
        (lambda m: m["codec"].pop("draw_steps"), "must have the keys"),
        (lambda m: m["codec"].pop("tail_steps"), "must have the keys"),
        (lambda m: m["codec"].update(new=1), "must have the keys"),
        (lambda m: m["codec"].update(draw_rate=65), "draw_rate must be"),
        (lambda m: m["codec"].update(draw_rate=-1), "draw_rate must be"),
        (lambda m: m["codec"].update(draw_rate=6.0), "draw_rate must be"),
        (lambda m: m["codec"].update(draw_rate=True), "draw_rate must be"),
        (lambda m: m["codec"].update(draw_steps=0), "draw_steps must be"),
        (lambda m: m["codec"].update(draw_steps=1025), "draw_steps must be"),
        (lambda m: m["codec"].update(draw_steps="32"), "draw_steps must be"),
    ],
)
def test_codecs_that_this_version_does_not_have(cache_dir: Path, change, match: str):
    refused_manifest(cache_dir, change, match)


MOMENTS = {"num_features": 16, "moment_steps": 128}
DEVELOPMENT = (
    r"development version before the first release; build it again \(anneal cache build .*--overwrite"
)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: [m["codec"].pop(key) for key in DRAW_KEYS],  # version 1 of the drafts
        lambda m: (m.update(version=2), m["codec"].update(MOMENTS), [m["codec"].pop(k) for k in DRAW_KEYS]),
        lambda m: (m.update(version=3), m["codec"].update(MOMENTS)),
        lambda m: m.update(version=3),
        lambda m: m.update(version=2),
    ],
)
def test_caches_of_the_drafts_are_to_be_built_again(cache_dir: Path, tmp_path: Path, change):
    """In one line, by manifest and by shard."""
    refused_manifest(cache_dir, change, DEVELOPMENT)
    with pytest.raises(UnsupportedVersionError, match=DEVELOPMENT) as refused:
        TeacherCache(cache_dir)
    assert "\n" not in str(refused.value)
    table = table_of(cache_dir).slice(0, 2)
    settings = unseal(table.schema.metadata[b"anneal"], "metadata")
    change(settings)
    write_arrow(tmp_path / "x.arrow", table.replace_schema_metadata({"anneal": seal(settings)}))
    with pytest.raises(UnsupportedVersionError, match=DEVELOPMENT):
        reader_of(tmp_path / "x.arrow")


@pytest.mark.parametrize("rate", [0, 1])
def test_a_shard_with_another_rate_than_its_payloads(cache_dir: Path, tmp_path: Path, rate: int):
    """A possible setting, but not that of the payloads."""
    table = table_of(cache_dir).slice(0, 2)
    path = tmp_path / "x.arrow"
    settings = unseal(table.schema.metadata[b"anneal"], "metadata")
    write_arrow(path, table.replace_schema_metadata({"anneal": seal(settings)}))
    assert max(teacher.draws.counts.max(initial=0) for _, teacher in reader_of(path)) > 4
    settings["codec"].update(draw_rate=rate)
    write_arrow(path, table.replace_schema_metadata({"anneal": seal(settings)}))
    with pytest.raises(CorruptShardError):
        reader_of(path)


def test_a_shard_of_another_rate_belongs_to_another_cache(cache_dir: Path):
    manifest = edited(cache_dir, lambda m: m["codec"].update(draw_rate=7))
    (cache_dir / "manifest.json").write_bytes(manifest)
    with pytest.raises(FormatError, match="belongs to another cache"):
        TeacherCache(cache_dir)[0]


def test_full_validation_refuses_draws_inside_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Reading does not look for them: it would take longer than everything else."""
    head, tail = capture(np.zeros((1, 8)), 1.0, label_ids=np.array([1])), CodecConfig(draw_rate=4)
    row = TokenRow(np.arange(2), np.array([False, True]))
    for name, token, good in (("good", 5, True), ("bad", int(head.token_ids[0]), False)):
        drawn = TailDraws([0, 1], [token], head.logprobs, 4)
        with monkeypatch.context() as patch:
            patch.setattr(TopKLogprobs, "validate_draws", lambda self: None)
            with CacheWriter(tmp_path / name, identity={}, vocab_size=8, codec=tail) as writer:
                writer.append(row, replace(head, draws=drawn))
        cache = TeacherCache(tmp_path / name)
        assert cache[0].teacher.draws.token_ids.tolist() == [token]
        cache.validate()
        if good:
            cache.validate(full=True)
            continue
        with pytest.raises(
            CorruptShardError, match=r"shard-00000\.arrow, row 0: draws must be tokens of the"
        ):
            cache.validate(full=True)


def test_the_unchanged_manifest_is_accepted(cache_dir: Path):
    """So that the refusals above are due to their changes, and not to the editing."""
    assert Manifest.from_bytes(edited(cache_dir, lambda m: None)).codec.draw_rate == 6
    assert independent_reader.read_manifest(cache_dir)["version"] == 1


# --- manifests with a correct digest and hostile contents -------------------------------------------------


def edited(directory: Path, change) -> bytes:
    content = unseal((directory / "manifest.json").read_bytes(), "manifest")
    change(content)
    return seal(content, indent=1)


@pytest.mark.parametrize(
    "name",
    [
        "../x.arrow",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "",
        ".",
        "..",
        ".hidden",
        "a\0b",
        "a..b",
        "manifest.json",
        "x" * 129,
        7,
        None,
    ],
)
def test_names_cannot_leave_the_directory(cache_dir: Path, name: object):
    for change in (
        lambda m: m["shards"][0].update(name=name),
        lambda m: (
            m["files"].update({str(name): "0" * 64})
            if isinstance(name, str)
            else m["shards"][0].update(name=name)
        ),
    ):
        with pytest.raises(FormatError, match="plain name"):
            Manifest.from_bytes(edited(cache_dir, change))


def test_symbolic_links_pipes_and_directories_are_refused(cache_dir: Path, tmp_path: Path):
    path = shard_path(cache_dir)
    secret = tmp_path / "elsewhere.arrow"
    path.rename(secret)
    path.symlink_to(secret)
    with pytest.raises(FormatError, match="symbolic link"):
        TeacherCache(cache_dir)[0]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FormatError, match="regular"):
        TeacherCache(cache_dir)[0]
    path.unlink()
    path.mkdir()
    with pytest.raises(FormatError, match="regular"):
        TeacherCache(cache_dir)[0]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda m: m.update(version=4), UnsupportedVersionError),
        (lambda m: m.update(version=0), UnsupportedVersionError),
        (lambda m: m.update(version=1.0), UnsupportedVersionError),
        (lambda m: m.update(version=True), UnsupportedVersionError),
        (lambda m: m.update(format="other"), FormatError),
        (lambda m: m.update(tail_betas=[1.0]), UnsupportedVersionError),
        (lambda m: m["codec"].update(sqrt_steps=10**9), UnsupportedVersionError),
        (lambda m: m["codec"].update(entropy_coder="new"), UnsupportedVersionError),
        (lambda m: m.pop("positions"), FormatError),
        (lambda m: m.update(extra=1), FormatError),
        (lambda m: m.update(positions="some"), FormatError),
        (lambda m: m.update(min_prob=2), FormatError),
        (lambda m: m.update(min_prob="1"), FormatError),
        (lambda m: m.update(max_k=0), FormatError),
        (lambda m: m.update(max_k=10**9), FormatError),
        (lambda m: m.update(vocab_size=1 << 21), FormatError),
        (lambda m: m.update(vocab_size=2.0), FormatError),
        (lambda m: m.update(shards={}), FormatError),
        (lambda m: m.update(shards=[1]), FormatError),
        (lambda m: m["shards"].append(m["shards"][0]), FormatError),
        (lambda m: m["shards"][0].update(num_rows=-1), FormatError),
        (lambda m: m["shards"][0].update(num_rows=2**63), FormatError),
        (lambda m: m["shards"][0].update(num_rows=True), FormatError),
        (lambda m: m["shards"][0].update(sha256="0" * 63), FormatError),
        (lambda m: m["shards"][0].pop("num_tokens"), FormatError),
        (lambda m: m.update(files=[]), FormatError),
        (lambda m: m.update(identity=[]), FormatError),
    ],
)
def test_manifest_rules(cache_dir: Path, change, error: type[FormatError]):
    with pytest.raises(error):
        Manifest.from_bytes(edited(cache_dir, change))


def test_row_counts_must_agree(cache_dir: Path):
    (cache_dir / "manifest.json").write_bytes(edited(cache_dir, lambda m: m["shards"][0].update(num_rows=5)))
    with pytest.raises(CorruptShardError, match="must have 5 rows"):
        TeacherCache(cache_dir)[0]
    (cache_dir / "manifest.json").write_bytes(
        edited(cache_dir, lambda m: m["shards"][1].update(num_entries=1))
    )
    with pytest.raises(CorruptShardError, match=r"rows|num_entries"):
        TeacherCache(cache_dir).validate(full=True)


def test_row_counts_are_not_allocated(cache_dir: Path):
    (cache_dir / "manifest.json").write_bytes(
        edited(cache_dir, lambda m: m["shards"][0].update(num_rows=2**53 - 1))
    )
    with pytest.raises(CorruptShardError, match="must have 9007199254740991 rows"):
        TeacherCache(cache_dir).summary(full=True)


def test_a_lost_manifest_is_no_unfinished_build(cache_dir: Path):
    """To run the build again, as was advised, is refused: it finds files that are not of a build."""
    (cache_dir / "manifest.json").unlink()
    with pytest.raises(IncompleteCacheError, match=r"got shards without one in .*: an unfinished copy"):
        TeacherCache(cache_dir)
    (cache_dir / "_build").mkdir()
    with pytest.raises(IncompleteCacheError, match="run the same build command again"):
        TeacherCache(cache_dir)


def test_json_traps():
    def sealed(rest: bytes) -> bytes:
        return b'{"digest": "' + hashlib.sha256(rest).hexdigest().encode() + b'",\n' + rest

    assert unseal(sealed(b'"a": 1}'), "it") == {"a": 1}
    for rest in (
        b'"a": 1, "a": 2}',
        b'"a": NaN}',
        b'"a": Infinity}',
        b'"a": [-1e999]}',
        b'"a": ' + b"[" * 10**5 + b"}",
        b"",
        b"}}",
        b"\xff",
    ):
        with pytest.raises(FormatError):
            unseal(sealed(rest), "it")
    for data in (b"", b"{}", b"[]", b'{"digest": "00",\n}', sealed(b'"a": 1}')[:-1]):
        with pytest.raises(FormatError):
            unseal(data, "it")


# --- shards that are Arrow but not ours -------------------------------------------------------------------


def write_arrow(path: Path, table: pa.Table, **options: object) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema, **options) as writer:
        writer.write_table(table)


def reader_of(path: Path):
    from formats.disk.byte_source import open_store
    from formats.disk.shard import ShardReader

    reader = ShardReader(open_store(path.parent).open(path.name), path.name)
    return [reader.teacher(index) for index in range(len(reader))]


def table_of(directory: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(shard_path(directory)))).read_all().combine_chunks()


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
