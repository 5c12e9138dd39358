"""Building, building again, building something else: the promises of one undisturbed process."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from deterministic_build import (
    SeededTeacher,
    Stop,
    build,
    contents,
    logits_of,
    make_config,
    make_rows,
    make_source,
    reduce_exactly,
    stop_at,
)

from cache_builder.build import build_cache
from cache_builder.config import BuildConfig
from cache_builder.tools.dry_run import plan_build
from formats.cache import TeacherCache
from formats.errors import (
    AnnealError,
    ConfigError,
    CorpusError,
    IncompleteCacheError,
)
from formats.logprobs.ragged import segment_of
from formats.progress import Progress


def test_every_row_of_the_corpus_is_in_the_cache_once_and_in_order(tmp_path: Path) -> None:
    report = build(tmp_path / "c")
    cache = TeacherCache(tmp_path / "c")
    cache.validate(full=True)
    expected = list(make_rows(60))
    assert [row.key for row in cache.rows()] == [row.key for row in expected]
    assert report.complete and not report.was_complete
    assert (report.num_rows, report.num_shards, report.num_shards_done) == (60, 6, 6)
    assert report.num_tokens == sum(len(row) for row in expected) == report.num_tokens_captured
    assert report.num_positions == sum(len(row.positions("loss")) for row in expected)
    assert report.num_bytes == sum(p.stat().st_size for p in (tmp_path / "c").glob("shard-*"))


def test_the_cache_holds_what_the_teacher_said(tmp_path: Path) -> None:
    build(tmp_path / "c")
    for row in TeacherCache(tmp_path / "c").rows():
        expected = reduce_exactly(logits_of(row.input_ids)[row.positions], 1e-2, 8)
        got = row.teacher
        np.testing.assert_array_equal(got.offsets, expected.offsets)
        # By position and id: the order within a head carries no meaning.
        orders = [np.lexsort((t.token_ids, segment_of(t.offsets))) for t in (got, expected)]
        np.testing.assert_array_equal(got.token_ids[orders[0]], expected.token_ids[orders[1]])
        np.testing.assert_allclose(got.logprobs[orders[0]], expected.logprobs[orders[1]], atol=0.05)
        np.testing.assert_allclose(got.log_tail_nodes, expected.log_tail_nodes, atol=0.05)


def test_a_finished_cache_holds_nothing_else(tmp_path: Path) -> None:
    build(tmp_path / "c")
    shards = [f"shard-{i:05d}.arrow" for i in range(6)]
    assert sorted(os.listdir(tmp_path / "c")) == sorted(["manifest.json", "tokenizer.json", *shards])
    assert TeacherCache(tmp_path / "c").file("tokenizer.json") == b'{"version": "1.0"}'


def test_the_identity_joins_what_was_asked_for_and_what_the_engine_said(tmp_path: Path) -> None:
    build(tmp_path / "c")
    identity = TeacherCache(tmp_path / "c").identity
    assert identity.teacher["weights"] == "a" * 64 and identity.teacher["dtype"] == "float64"
    assert identity.preprocessing["min_prob"] == 1e-2


def test_two_builds_have_the_same_bytes(tmp_path: Path) -> None:
    build(tmp_path / "a")
    build(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_finished_build_run_again_does_nothing(tmp_path: Path) -> None:
    build(tmp_path / "c")
    before = contents(tmp_path / "c"), (tmp_path / "c" / "manifest.json").stat().st_mtime_ns

    class Never(SeededTeacher):
        def __init__(self) -> None:
            raise AssertionError("the engine was started")

    report = build(tmp_path / "c", teacher=Never)
    assert report.was_complete and "complete" in report.text() and "nothing to do" in report.text()
    assert (contents(tmp_path / "c"), (tmp_path / "c" / "manifest.json").stat().st_mtime_ns) == before


def test_an_unfinished_build_cannot_be_opened_and_says_how_far_it_is(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        build(tmp_path / "c", step=stop_at("claimed 2"))
    with pytest.raises(IncompleteCacheError, match=r"2 of 6 shards.*same build command again"):
        TeacherCache(tmp_path / "c")


def test_temporary_files_of_a_killed_process_are_cleared(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        build(tmp_path / "c", step=stop_at("claimed 2"))
    for name in (".manifest.json.0123456789ab.tmp", ".tokenizer.json.0123456789ab.tmp"):
        (tmp_path / "c" / name).write_text("torn")
    (tmp_path / "c" / ".mine").write_text("keep")
    build(tmp_path / "c")
    assert [name for name in os.listdir(tmp_path / "c") if name.startswith(".")] == [".mine"]


def test_the_engine_is_closed_after_success_and_after_failure(tmp_path: Path) -> None:
    made: list[SeededTeacher] = []

    def make():
        made.append(SeededTeacher())
        return made[-1]

    with pytest.raises(Stop):
        build(tmp_path / "c", teacher=make, step=stop_at("claimed 2"))
    build(tmp_path / "c", teacher=make)
    assert [teacher.closed for teacher in made] == [True, True]


def test_a_shard_damaged_before_the_manifest_is_captured_again(tmp_path: Path) -> None:
    build(tmp_path / "fresh")
    with pytest.raises(Stop):
        build(tmp_path / "c", step=stop_at("claimed 4"))
    victim = tmp_path / "c" / "shard-00001.arrow"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    build(tmp_path / "c")
    assert contents(tmp_path / "c") == contents(tmp_path / "fresh")


def test_staged_rows_that_changed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        build(tmp_path / "c", step=stop_at("claimed 2"))
    staged = tmp_path / "c" / "_build" / "rows-00004.arrow"
    staged.write_bytes(staged.read_bytes()[:-1] + b"!")
    with pytest.raises(AnnealError, match="staged rows must match the plan"):
        build(tmp_path / "c")


def test_moving_an_unfinished_or_finished_build_changes_nothing(tmp_path: Path) -> None:
    build(tmp_path / "fresh")
    with pytest.raises(Stop):
        build(tmp_path / "c", step=stop_at("claimed 3"))
    shutil.move(tmp_path / "c", tmp_path / "moved")
    assert build(tmp_path / "moved").num_rows_captured == 30
    assert contents(tmp_path / "moved") == contents(tmp_path / "fresh")


def test_shards_of_a_range_and_the_last_one_finishes(tmp_path: Path) -> None:
    build(tmp_path / "fresh")
    first = build(tmp_path / "c", shards=(4, 99))
    assert not first.complete and first.num_shards_done == 2 and "2 of 6 shards" in first.text()
    assert not build(tmp_path / "c", shards=(0, 2)).complete
    assert build(tmp_path / "c", shards=(2, 4)).complete
    assert contents(tmp_path / "c") == contents(tmp_path / "fresh")
    with pytest.raises(ConfigError, match="within the 6 shards"):
        build(tmp_path / "d", shards=(6, 7))


def test_a_dry_run_counts_exactly_and_writes_nothing(tmp_path: Path) -> None:
    source = make_source(60)
    report = plan_build(make_config(tmp_path / "c"), source=source)
    built = build(tmp_path / "d", source=source)
    assert (report.num_rows, report.num_tokens, report.num_positions, report.num_shards) == (
        built.num_rows,
        built.num_tokens,
        built.num_positions,
        built.num_shards,
    )
    assert not (tmp_path / "c").exists() and "tokens" in report.text()
    json.dumps(report.to_dict())
    with pytest.raises(CorpusError):
        plan_build(make_config(tmp_path / "c"), source=make_source(0))


@pytest.mark.parametrize(("shards", "what"), [(None, "a finished cache"), ((0, 2), "an unfinished build")])
def test_a_dry_run_refuses_a_directory_of_other_settings(
    tmp_path: Path, shards: tuple[int, int] | None, what: str
) -> None:
    out, other = tmp_path / "c", make_source(60, seed=1)
    build(out, shards=shards)
    before = contents(out)
    with pytest.raises(ConfigError, match=f"holds {what} with other settings"):
        plan_build(make_config(out), source=other)
    assert plan_build(make_config(out, overwrite=True), source=other).num_rows == 60
    assert plan_build(make_config(out), source=make_source(60)).num_rows == 60
    assert contents(out) == before


def test_progress_hears_every_row_once(tmp_path: Path) -> None:
    class Counter(Progress):
        def __init__(self) -> None:
            self.phases: dict[str, int] = {}

        def start(self, what, total, done=0):
            self.now = what
            self.phases[what] = done

        def advance(self, num_rows, num_tokens=0):
            self.phases[self.now] += num_rows

    counter = Counter()
    build_cache(
        make_config(tmp_path / "c"),
        counter,
        source=make_source(60),
        make_teacher=lambda config, source: SeededTeacher(),
    )
    assert counter.phases == {"tokenise": 60, "capture": 60}


def test_config_is_immutable() -> None:
    config = BuildConfig(corpus="a", model="b", out="c")
    with pytest.raises(AttributeError):
        config.max_k = 3  # type: ignore[misc]
