"""Damaged, foreign and hostile caches: a typed error or the identical rows, never anything else."""

import hashlib
import itertools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import independent_reader
import numpy as np
import pyarrow as pa
import pytest
from make_teachers import by_id, capture, plain_features, write_cache

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
from formats.errors import CorruptShardError, FormatError, UnsupportedVersionError
from formats.logprobs.features import FEATURES_FILE

LENGTHS = [6, 0, 11, 3, 1, 8]
OPTIONS = {"lengths": LENGTHS, "rows_per_shard": 4, "rows_per_batch": 2}
FEATURES = plain_features(31, 3)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A cache of each version."""
    directory = tmp_path_factory.mktemp("corruption")
    write_cache(directory / "1", vocab_size=31, **OPTIONS)
    write_cache(directory / "2", vocab_size=31, features=FEATURES, min_prob=0.05, **OPTIONS)
    write_cache(directory / "3", vocab_size=31, features=FEATURES, min_prob=0.05, draw_rate=6, **OPTIONS)
    return {version: directory / str(version) for version in (1, 2, 3)}


@pytest.fixture(params=[1, 2, 3], ids=["version 1", "version 2", "version 3"])
def cache_dir(originals: dict[int, Path], tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Every rule holds in all versions."""
    return Path(shutil.copytree(originals[request.param], tmp_path / "cache"))


@pytest.fixture
def old_dir(originals: dict[int, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals[1], tmp_path / "old"))


@pytest.fixture
def new_dir(originals: dict[int, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals[2], tmp_path / "new"))


@pytest.fixture
def drawn_dir(originals: dict[int, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals[3], tmp_path / "drawn"))


def contents(directory: Path) -> list[bytes]:
    """Everything that opening and reading a cache yields, as comparable bytes."""
    cache = TeacherCache(directory)
    seen = [json.dumps(cache.manifest.identity).encode(), cache.manifest.codec.to_dict().__repr__().encode()]
    if cache.features is not None:
        seen.append(cache.features.to_bytes())
    for row in cache:
        t = row.teacher
        arrays = (row.input_ids, row.loss_mask, *by_id(t), t.log_tail_nodes, t.tail_moments, *by_id(t.draws))
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


@pytest.mark.slow
def test_every_bit_of_header_and_footer(drawn_dir: Path):
    """Of version 3 only, whose settings have all keys: the container around them is the same."""
    path, expected = shard_path(drawn_dir), contents(drawn_dir)
    data = path.read_bytes()
    places = [*range(first_batch(data)), *range(footer_start(data), len(data))]
    for at in places:
        for bit in range(8):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            assert_noticed_or_harmless(drawn_dir, path, bytes(changed), expected)


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


# --- version 2: token features and tail moments -------------------------------------------------------------


def refused_by_both(directory: Path, error: type[FormatError], match: str) -> None:
    """By our reader with this error, and by the one that knows the page only."""
    with pytest.raises(error, match=match):
        TeacherCache(directory).validate()
    with pytest.raises(error, match=match):
        _ = TeacherCache(directory).features
    with pytest.raises((AssertionError, FileNotFoundError)):
        independent_reader.read_features(directory)


def replace_features(directory: Path, data: bytes, listed: bool) -> None:
    """Another features file; `listed` also makes the manifest agree with it."""
    (directory / FEATURES_FILE).write_bytes(data)
    if listed:
        digest = hashlib.sha256(data).hexdigest()
        manifest = edited(directory, lambda m: m["files"].update({FEATURES_FILE: digest}))
        (directory / "manifest.json").write_bytes(manifest)


def test_both_readers_accept_the_features(new_dir: Path):
    """Otherwise the refusals below would prove nothing."""
    replace_features(new_dir, bytes(93), listed=True)
    TeacherCache(new_dir).validate(full=True)
    assert independent_reader.read_features(new_dir) == [[0, 0, 0]] * 31


def test_features_that_are_missing(new_dir: Path):
    (new_dir / FEATURES_FILE).unlink()
    refused_by_both(new_dir, CorruptShardError, r"must contain token_features\.bin")


def test_every_bit_of_the_features(new_dir: Path):
    data = FEATURES.to_bytes()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << (bit % 8)
        replace_features(new_dir, bytes(changed), listed=False)
        with pytest.raises(CorruptShardError, match="SHA-256"):
            _ = TeacherCache(new_dir).features


@pytest.mark.parametrize("length", [0, 1, 90, 92])
@pytest.mark.parametrize("listed", [False, True])
def test_features_that_are_cut(new_dir: Path, length: int, listed: bool):
    replace_features(new_dir, FEATURES.to_bytes()[:length], listed)
    refused_by_both(new_dir, CorruptShardError, "31 x 3 bytes" if listed else "SHA-256")


@pytest.mark.parametrize("listed", [False, True])
def test_features_that_are_too_long(new_dir: Path, listed: bool):
    replace_features(new_dir, FEATURES.to_bytes() + bytes(3), listed)
    with pytest.raises(FormatError, match="at most 93 bytes"):
        _ = TeacherCache(new_dir).features
    with pytest.raises(FormatError):
        TeacherCache(new_dir).validate()
    with pytest.raises(AssertionError):
        independent_reader.read_features(new_dir)


@pytest.mark.parametrize("at", [0, 40, 92])
def test_features_below_the_least_code(new_dir: Path, at: int):
    data = bytearray(FEATURES.to_bytes())
    data[at] = 0x80
    replace_features(new_dir, bytes(data), listed=True)
    refused_by_both(new_dir, CorruptShardError, "from -127 to 127")


def test_features_behind_a_symbolic_link(new_dir: Path, tmp_path: Path):
    (new_dir / FEATURES_FILE).rename(tmp_path / "elsewhere.bin")
    (new_dir / FEATURES_FILE).symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(FormatError, match="symbolic link"):
        _ = TeacherCache(new_dir).features


KEYS = {"num_features": 3, "moment_steps": 64}
LISTED = {FEATURES_FILE: hashlib.sha256(FEATURES.to_bytes()).hexdigest()}


def refused_manifest(directory: Path, change, match: str) -> None:
    data = edited(directory, change)
    (directory / FEATURES_FILE).write_bytes(FEATURES.to_bytes())  # the manifest alone is at fault
    with pytest.raises(FormatError, match=match):
        Manifest.from_bytes(data)
    (directory / "manifest.json").write_bytes(data)
    with pytest.raises(AssertionError):
        independent_reader.read_manifest(directory)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.update(version=2), "must have the keys"),
        (lambda m: (m.update(version=2), m["files"].update(LISTED)), "must have the keys"),
        (lambda m: m["codec"].update(KEYS), "must have the keys"),
        (lambda m: m["codec"].update(KEYS | {"num_features": 0}), "must have the keys"),
        (lambda m: (m["codec"].update(KEYS), m["files"].update(LISTED)), "must have the keys"),
        (lambda m: m["files"].update(LISTED), "if and only if"),
        (lambda m: (m.update(version=2), m["codec"].update(KEYS)), "if and only if"),
    ],
)
def test_version_1_has_no_moments(old_dir: Path, change, match: str):
    refused_manifest(old_dir, change, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.update(version=1), "must have the keys"),
        (lambda m: m["codec"].pop("num_features"), "must have the keys"),
        (lambda m: m["codec"].pop("moment_steps"), "must have the keys"),
        (lambda m: [m["codec"].pop(key) for key in KEYS], "must have the keys"),
        (lambda m: m["codec"].update(num_features=0), "at least 1"),
        (lambda m: (m["codec"].update(num_features=0), m["files"].pop(FEATURES_FILE)), "at least 1"),
        (lambda m: m["codec"].update(num_features=65), "num_features must be"),
        (lambda m: m["codec"].update(num_features=-1), "num_features must be"),
        (lambda m: m["codec"].update(num_features=True), "num_features must be"),
        (lambda m: m["codec"].update(num_features=3.0), "num_features must be"),
        (lambda m: m["codec"].update(moment_steps=0), "moment_steps must be"),
        (lambda m: m["codec"].update(moment_steps=4097), "moment_steps must be"),
        (lambda m: m["codec"].update(moment_steps="64"), "moment_steps must be"),
        (lambda m: m["files"].pop(FEATURES_FILE), "if and only if"),
        (lambda m: m.update(files={}), "if and only if"),
    ],
)
def test_version_2_has_moments_and_their_features(new_dir: Path, change, match: str):
    refused_manifest(new_dir, change, match)


DRAW_KEYS = {"draw_rate": 6, "draw_steps": 32}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.update(version=3), "must have the keys"),
        (lambda m: m["codec"].update(DRAW_KEYS), "must have the keys"),
        (lambda m: m["codec"].update(DRAW_KEYS | {"draw_rate": 0}), "must have the keys"),
        (lambda m: m["codec"].update(draw_steps=32), "must have the keys"),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_versions_1_and_2_have_no_draws(old_dir: Path, new_dir: Path, version: int, change, match: str):
    refused_manifest(old_dir if version == 1 else new_dir, change, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.update(version=2), "must have the keys"),
        (lambda m: m.update(version=1), "must have the keys"),
        (lambda m: m["codec"].pop("draw_rate"), "must have the keys"),
        (lambda m: m["codec"].pop("draw_steps"), "must have the keys"),
        (lambda m: m["codec"].pop("num_features"), "must have the keys"),
        (lambda m: [m["codec"].pop(key) for key in DRAW_KEYS], "must have the keys"),
        (lambda m: m["codec"].update(draw_rate=0), "draw_rate must be at least 1"),
        (lambda m: m["codec"].update(draw_rate=65), "draw_rate must be"),
        (lambda m: m["codec"].update(draw_rate=-1), "draw_rate must be"),
        (lambda m: m["codec"].update(draw_rate=6.0), "draw_rate must be"),
        (lambda m: m["codec"].update(draw_rate=True), "draw_rate must be"),
        (lambda m: m["codec"].update(draw_steps=0), "draw_steps must be"),
        (lambda m: m["codec"].update(draw_steps=1025), "draw_steps must be"),
        (lambda m: m["codec"].update(draw_steps="32"), "draw_steps must be"),
        (lambda m: m["codec"].update(num_features=65), "num_features must be"),
        (lambda m: m["codec"].update(num_features=0), "if and only if"),
        (lambda m: m["files"].pop(FEATURES_FILE), "if and only if"),
    ],
)
def test_version_3_has_draws(drawn_dir: Path, change, match: str):
    refused_manifest(drawn_dir, change, match)


def test_version_3_may_do_without_moments(drawn_dir: Path):
    def change(m: dict) -> None:
        m["codec"].update(num_features=0)
        m["files"].pop(FEATURES_FILE)

    data = edited(drawn_dir, change)
    assert Manifest.from_bytes(data).codec.format_version == 3
    (drawn_dir / "manifest.json").write_bytes(data)
    assert independent_reader.read_manifest(drawn_dir)["version"] == 3


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda m: m.update(version=2), UnsupportedVersionError),
        (lambda m: m["codec"].update(draw_rate=0), UnsupportedVersionError),
        (lambda m: [m["codec"].pop(key) for key in DRAW_KEYS], UnsupportedVersionError),
        # These are possible settings, but not those of the payloads.
        (lambda m: m["codec"].update(draw_rate=1), CorruptShardError),
        (lambda m: m["codec"].update(num_features=2), CorruptShardError),
        (lambda m: (m.update(version=2), [m["codec"].pop(key) for key in DRAW_KEYS]), CorruptShardError),
    ],
)
def test_shards_with_draws_follow_the_same_rules(drawn_dir: Path, tmp_path: Path, change, error):
    table = table_of(drawn_dir).slice(0, 2)
    path = tmp_path / "x.arrow"
    settings = unseal(table.schema.metadata[b"anneal"], "metadata")
    write_arrow(path, table.replace_schema_metadata({"anneal": seal(settings)}))
    assert max(teacher.draws.counts.max(initial=0) for _, teacher in reader_of(path)) > 4
    change(settings)
    write_arrow(path, table.replace_schema_metadata({"anneal": seal(settings)}))
    with pytest.raises(error):
        reader_of(path)


def test_a_shard_of_another_rate_belongs_to_another_cache(drawn_dir: Path):
    manifest = edited(drawn_dir, lambda m: m["codec"].update(draw_rate=7))
    (drawn_dir / "manifest.json").write_bytes(manifest)
    with pytest.raises(FormatError, match="belongs to another cache"):
        TeacherCache(drawn_dir)[0]


def test_full_validation_refuses_draws_inside_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Reading does not look for them: it would take longer than everything else."""
    head, tail = capture(np.zeros((1, 8)), 1.0), CodecConfig(draw_rate=4)
    row = TokenRow(np.arange(2), np.array([False, True]))
    for name, token, good in (("good", 5, True), ("bad", int(head.token_ids[0]), False)):
        drawn = TailDraws([0, 1], [token], head.logprobs, 4)
        with monkeypatch.context() as patch:
            patch.setattr(TopKLogprobs, "validate_draws", lambda self: None)
            with CacheWriter(tmp_path / name, identity={}, vocab_size=8, codec=tail) as writer:
                writer.append(row, replace(head, tail_draws=drawn))
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


def test_the_unchanged_manifests_are_accepted(old_dir: Path, new_dir: Path, drawn_dir: Path):
    """So that the refusals above are due to their changes, and not to the editing."""
    for directory, version in ((old_dir, 1), (new_dir, 2), (drawn_dir, 3)):
        manifest = Manifest.from_bytes(edited(directory, lambda m: None))
        assert manifest.codec.format_version == version
        assert independent_reader.read_manifest(directory)["version"] == version


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda m: m.update(version=1), UnsupportedVersionError),
        (lambda m: m["codec"].pop("num_features"), UnsupportedVersionError),
        (lambda m: m["codec"].update(num_features=0), UnsupportedVersionError),
        (lambda m: [m["codec"].pop(key) for key in KEYS], UnsupportedVersionError),
        # These are possible settings, but not those of the payloads.
        (lambda m: m["codec"].update(num_features=2), CorruptShardError),
        (lambda m: m["codec"].update(num_features=4), CorruptShardError),
        (lambda m: (m.update(version=1), [m["codec"].pop(key) for key in KEYS]), CorruptShardError),
    ],
)
def test_shards_follow_the_same_rules(new_dir: Path, tmp_path: Path, change, error: type[FormatError]):
    table = table_of(new_dir).slice(0, 2)
    path = tmp_path / "x.arrow"
    settings = unseal(table.schema.metadata[b"anneal"], "metadata")
    write_arrow(path, table.replace_schema_metadata({"anneal": seal(settings)}))
    assert len(reader_of(path)) == 2
    change(settings)
    write_arrow(path, table.replace_schema_metadata({"anneal": seal(settings)}))
    with pytest.raises(error):
        reader_of(path)


def test_shards_of_another_version_belong_to_another_cache(old_dir: Path, new_dir: Path, drawn_dir: Path):
    for target, source in itertools.permutations((old_dir, new_dir, drawn_dir), 2):
        original, foreign = shard_path(target).read_bytes(), shard_path(source).read_bytes()
        shard_path(target).write_bytes(foreign)
        size = {"num_bytes": len(foreign)}
        manifest = edited(target, lambda m, size=size: m["shards"][0].update(size))
        (target / "manifest.json").write_bytes(manifest)
        with pytest.raises(FormatError, match="belongs to another cache"):
            TeacherCache(target).validate()
        shard_path(target).write_bytes(original)


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
        (lambda m: m.update(version=float(m["version"])), UnsupportedVersionError),
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


def test_json_traps():
    def sealed(rest: bytes) -> bytes:
        return b'{"digest": "' + hashlib.sha256(rest).hexdigest().encode() + b'",\n' + rest

    assert unseal(sealed(b'"a": 1}'), "it") == {"a": 1}
    for rest in (
        b'"a": 1, "a": 2}',
        b'"a": NaN}',
        b'"a": Infinity}',
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
