"""Merging keeps every row once, names what differs, and starts again after an interruption."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from deterministic_build import (
    SeededTeacher,
    contents,
    make_config,
    make_rows,
    make_source,
)

from cache_builder.build import build_cache
from cache_builder.commit import build_directory
from cache_builder.tools import merge_caches as merge_module
from cache_builder.tools.merge_caches import merge_caches
from formats import CacheWriter, TailDraws, TokenRow, TopKLogprobs
from formats.cache import TeacherCache
from formats.codec.config import CodecConfig
from formats.errors import ConfigError, FormatError, IdentityMismatchError
from formats.logprobs.ragged import segment_of
from formats.logprobs.tail_function import TAIL_BETAS


def build(
    out: Path, *, rows: int = 40, seed: int = 0, teacher=SeededTeacher, source=None, **settings
) -> Path:
    build_cache(
        make_config(out),
        source=source or make_source(rows, seed=seed, **settings),
        make_teacher=lambda config, source: teacher(),
    )
    return out


def test_disjoint_caches_are_joined_byte_for_byte(tmp_path: Path) -> None:
    a, b = build(tmp_path / "a"), build(tmp_path / "b", rows=25, seed=1)
    report = merge_caches([a, b], tmp_path / "c")
    merged = TeacherCache(tmp_path / "c")
    merged.validate(full=True)
    keys = [row.key for row in [*make_rows(40, 0), *make_rows(25, 1)]]
    assert [row.key for row in merged.rows()] == keys
    assert (report.num_rows, report.num_duplicates, report.num_copied, report.num_rewritten) == (65, 0, 7, 0)
    hashes = [s.sha256 for path in (a, b) for s in TeacherCache(path).manifest.shards]
    assert [shard.sha256 for shard in merged.manifest.shards] == hashes
    assert not (tmp_path / "c" / "_build").exists()
    assert merged.file("tokenizer.json") == TeacherCache(a).file("tokenizer.json")


def test_rows_that_came_before_are_left_out(tmp_path: Path) -> None:
    """The second cache holds the first 15 rows of the first and 10 of its own, in its first shards."""
    a = build(tmp_path / "a")
    source = make_source(25, seed=1)
    mixed = [*list(make_rows(40, 0))[:15], *make_rows(10, 1)]
    from dataclasses import replace

    b = build(tmp_path / "b", source=replace(source, open_rows=lambda: iter(mixed)))
    report = merge_caches([a, b], tmp_path / "c")
    merged = TeacherCache(tmp_path / "c")
    merged.validate(full=True)
    expected = [row.key for row in [*make_rows(40, 0), *make_rows(10, 1)]]
    assert [row.key for row in merged.rows()] == expected
    # Shard 0 of b holds only duplicates, shard 1 is half duplicates and written anew, shard 2 is copied.
    assert (report.num_duplicates, report.num_copied, report.num_rewritten) == (15, 5, 1)
    original = TeacherCache(b)
    for row in merged.rows(40):
        before = original[original.index_of(row.key)].teacher.sorted()
        after = row.teacher.sorted()
        np.testing.assert_array_equal(after.offsets, before.offsets)
        np.testing.assert_allclose(after.logprobs, before.logprobs, atol=0.02)


def test_the_identity_lists_the_corpora(tmp_path: Path) -> None:
    a, b = build(tmp_path / "a"), build(tmp_path / "b", seed=1)
    merge_caches([a, b], tmp_path / "c")
    one, merged = TeacherCache(a).identity, TeacherCache(tmp_path / "c").identity
    assert merged.teacher == one.teacher and merged.tokenizer == one.tokenizer
    assert [part["fingerprint"] for part in merged.corpus["merged"]] == [
        TeacherCache(path).identity.corpus["fingerprint"] for path in (a, b)
    ]
    assert merged.digest() != one.digest()
    merge_caches([b, a], tmp_path / "d")
    assert TeacherCache(tmp_path / "d").identity.digest() != merged.digest()


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"min_prob": 2e-2}, r"min_prob: 0\.01 and 0\.02"), ({"max_length": 30}, "max_length: 24 and 30")],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, settings: dict, words: str) -> None:
    a, b = build(tmp_path / "a"), build(tmp_path / "b", seed=1, **settings)
    with pytest.raises(IdentityMismatchError, match=words):
        merge_caches([a, b], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_another_engine_version_or_codec_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    a = build(tmp_path / "a")
    b = build(tmp_path / "b", seed=1, teacher=lambda: SeededTeacher(version="2"))
    with pytest.raises(IdentityMismatchError, match=r"engine_version: '1' and '2'"):
        merge_caches([a, b], tmp_path / "c")
    source = make_source(20, seed=2)
    codec = {**CodecConfig().to_dict(), "zstd_level": 5}
    other = build(tmp_path / "d", source=replace(source, settings=replace(source.settings, codec=codec)))
    with pytest.raises(IdentityMismatchError, match=r"codec\.zstd_level"):
        merge_caches([a, other], tmp_path / "c")


def build_with_draws(out: Path, *, rows=None, draw_rate: int = 8, **options) -> Path:
    from dataclasses import replace

    source = make_source(draw_rate=draw_rate, **options)
    build_cache(
        make_config(out),
        source=replace(source, open_rows=lambda: iter(rows)) if rows else source,
        make_teacher=lambda config, source: SeededTeacher(draw_rate=draw_rate),
    )
    return out


def test_caches_with_draws_keep_them(tmp_path: Path) -> None:
    """The second cache shares seven rows with the first: its first shard is written anew."""
    a = build_with_draws(tmp_path / "a")
    rows = [*list(make_rows(60, 0))[:7], *make_rows(20, 1)]
    b = build_with_draws(tmp_path / "b", rows=rows, seed=1)
    report = merge_caches([a, b], tmp_path / "c")
    assert (report.num_duplicates, report.num_rewritten) == (7, 1)
    merged = TeacherCache(tmp_path / "c")
    merged.validate(full=True)
    originals = [TeacherCache(a), TeacherCache(b)]
    for index, row in enumerate(merged.rows()):
        original = originals[index >= 60]
        before = original[original.index_of(row.key)].teacher
        after, before = row.teacher.draws, before.draws
        assert after.counts.tolist() == before.counts.tolist() and after.rate == 8
        # By position and id: a rewritten shard has another table of ranks.
        orders = [np.lexsort((d.token_ids, segment_of(d.offsets))) for d in (after, before)]
        np.testing.assert_array_equal(after.token_ids[orders[0]], before.token_ids[orders[1]])
        np.testing.assert_array_equal(after.logprobs[orders[0]], before.logprobs[orders[1]])


def test_another_rate_of_draws_is_refused_by_name(tmp_path: Path) -> None:
    a = build_with_draws(tmp_path / "a")
    for rate, words in ((4, "8 and 4"), (0, "8 and 0")):
        b = build_with_draws(tmp_path / f"b{rate}", seed=1, draw_rate=rate)
        with pytest.raises(IdentityMismatchError, match=rf"codec\.draw_rate: {words}") as caught:
            merge_caches([a, b], tmp_path / "c")
        assert "\n" not in str(caught.value) and not (tmp_path / "c").exists()


def test_bad_calls(tmp_path: Path) -> None:
    a, b = build(tmp_path / "a"), build(tmp_path / "b", seed=1)
    with pytest.raises(ConfigError, match="at least two"):
        merge_caches([a], tmp_path / "c")
    with pytest.raises(ConfigError, match="new or empty"):
        merge_caches([a, b], a)
    with pytest.raises(ConfigError, match="local directories"):
        merge_caches([a, "s3://bucket/cache"], tmp_path / "c")
    with pytest.raises(ConfigError, match="got the address s3://bucket/cache"):
        merge_caches([a, b], "s3://bucket/cache")
    with pytest.raises(FormatError):
        merge_caches([a, tmp_path / "nothing"], tmp_path / "c")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("")
    with pytest.raises(ConfigError, match="--out must be"):
        merge_caches([a, b], tmp_path / "mine")


def test_an_interrupted_merge_starts_again(tmp_path: Path, monkeypatch) -> None:
    a, b = build(tmp_path / "a"), build(tmp_path / "b", seed=1)
    merge_caches([a, b], tmp_path / "fresh")
    real, calls = build_directory.commit_exclusive, []

    def stop(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(build_directory, "commit_exclusive", stop)
    with pytest.raises(KeyboardInterrupt):
        merge_caches([a, b], tmp_path / "c")
    monkeypatch.undo()
    with pytest.raises(FormatError):
        TeacherCache(tmp_path / "c")
    merge_caches([a, b], tmp_path / "c")
    assert contents(tmp_path / "c") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("what", ["mkdir", "replace", "link", "unlink", "rmdir"])
def test_a_merge_that_is_killed_at_any_step_starts_again(tmp_path: Path, monkeypatch, what: str) -> None:
    """The process dies at its n-th call of a kind, before it or just behind it, for every n."""
    a, b = build(tmp_path / "a"), build(tmp_path / "b", seed=1)
    merge_caches([a, b], tmp_path / "whole")
    real, died = getattr(os, what), 0
    for last, behind in itertools.product(range(1, 100), (False, True)):
        out, calls = tmp_path / f"{last}-{behind}", itertools.count(1)

        def dies(*args, _last=last, _behind=behind, _calls=calls, **options):
            number = next(_calls)
            if number > _last or (number == _last and not _behind):
                raise KeyboardInterrupt
            made = real(*args, **options)
            if number == _last:
                raise KeyboardInterrupt
            return made

        with monkeypatch.context() as patched:
            patched.setattr(os, what, dies)
            try:
                merge_caches([a, b], out)
                break
            except KeyboardInterrupt:
                died += 1
        if (out / "manifest.json").exists() and not (out / "_build" / "merge").exists():
            with pytest.raises(ConfigError, match="which holds a cache"):  # it was complete
                merge_caches([a, b], out)
        else:
            merge_caches([a, b], out)
            assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / "whole"))
        assert contents(out) == contents(tmp_path / "whole")
    assert died > 0


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch) -> None:
    a, b = build(tmp_path / "a"), build(tmp_path / "b", seed=1)

    def full(*args):
        raise OSError(28, "No space left on device", "shard")

    monkeypatch.setattr(merge_module.shutil, "copyfile", full)
    with pytest.raises(ValueError, match=r"write .*c, got No space left on device at shard"):
        merge_caches([a, b], tmp_path / "c")
    assert not (tmp_path / "c").exists()
    monkeypatch.undo()
    merge_caches([a, b], tmp_path / "c")


def test_a_damaged_part_is_noticed(tmp_path: Path) -> None:
    a, b = build(tmp_path / "a"), build(tmp_path / "b", seed=1)
    victim = b / "shard-00001.arrow"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "c", tmp_path / "empty"):
        with pytest.raises(ValueError, match="shard-00001"):
            merge_caches([a, b], out)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "empty"] and os.listdir(tmp_path / "empty") == []


def test_a_flat_teacher_is_inspected_and_merged(tmp_path: Path) -> None:
    """99 equally likely tokens all round the same way: they are stored with 2.6 % too much, which loading divides away.
    What was read is stored again then, by `inspect` for its table of parts and by `merge` for what it keeps."""
    caches = []
    codec = CodecConfig()
    for name, rows in (("a", [1, 2]), ("b", [2, 3])):
        caches.append(tmp_path / name)
        with CacheWriter(caches[-1], identity={}, vocab_size=99, positions="all", codec=codec) as writer:
            for number in rows:
                row = TokenRow(np.arange(5) * number, np.arange(5) > 0)
                flat = np.full(4 * 99, -np.log(99))
                nodes = np.full((4, len(TAIL_BETAS)), -np.inf)
                everything, none = np.tile(np.arange(99), 4), TailDraws.none(4)
                writer.append(
                    row, TopKLogprobs(np.arange(5) * 99, everything, flat, nodes, 99, none, flat[:4])
                )
    assert merge_caches(caches, tmp_path / "c").num_rewritten == 1
    merged = TeacherCache(tmp_path / "c")
    merged.validate(full=True)
    assert len(merged) == 3
    for index, (cache, at) in enumerate([(0, 0), (0, 1), (1, 1)]):
        stored, read = TeacherCache(caches[cache])[at].teacher, merged[index].teacher
        assert np.exp(stored.log_partition(1.0)) == pytest.approx(1.026, abs=1e-3)
        assert np.array_equal(np.sort(read.token_ids), np.sort(stored.token_ids))
        assert np.array_equal(read.logprobs, stored.logprobs)
        assert np.array_equal(read.log_tail_nodes, stored.log_tail_nodes)
    assert merged.summary()["payload_parts"]["probabilities"]["bytes_per_position"] > 0
