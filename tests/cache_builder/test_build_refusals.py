"""What a build refuses: another command, a place that is taken, an engine or a disk that fails."""

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from deterministic_build import (
    SeededTeacher,
    Stop,
    build,
    contents,
    make_config,
    make_source,
    stop_at,
)

from cache_builder.build import BuildError
from cache_builder.commit.signals import BuildInterrupted
from cache_builder.tools.dry_run import plan_build
from formats.errors import (
    AnnealError,
    ConfigError,
    CorpusError,
    IdentityMismatchError,
)

DIFFERENT = [
    ({"min_prob": 1e-3}, "--min-prob: 0.01 there, 0.001 now"),
    ({"max_k": 9}, "--max-k: 8 there, 9 now"),
    ({"positions": "all"}, "--positions: loss there, all now"),
    ({"max_length": 25}, "--max-length: 24 there, 25 now"),
]


def build_or_stop(out: Path, *, finished: bool) -> None:
    """Leave a finished cache, or a build that stopped on its way."""
    if finished:
        build(out)
    else:
        with pytest.raises(Stop):
            build(out, step=stop_at("claimed 2"))


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(("change", "words"), DIFFERENT)
def test_another_command_into_the_same_directory_is_refused(tmp_path, finished, change, words) -> None:
    build_or_stop(tmp_path / "c", finished=finished)
    before = contents(tmp_path / "c")
    with pytest.raises(ConfigError) as caught:
        build(tmp_path / "c", source=make_source(60, **change))
    assert words in str(caught.value) and "--overwrite" in str(caught.value) and "\n" not in str(caught.value)
    assert contents(tmp_path / "c") == before


def test_another_corpus_or_shard_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        build(tmp_path / "c", step=stop_at("claimed 2"))
    with pytest.raises(ConfigError, match="corpus contents"):
        build(tmp_path / "c", source=make_source(60, seed=1))
    with pytest.raises(ConfigError, match="rows_per_shard: 10 there, 7 now"):
        build(tmp_path / "c", source=make_source(60, rows_per_shard=7))


def test_another_engine_cannot_continue_a_build(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        build(tmp_path / "c", step=stop_at("claimed 2"))
    with pytest.raises(IdentityMismatchError, match="engine_version: 1 there, 2 now"):
        build(tmp_path / "c", teacher=lambda: SeededTeacher(version="2"))
    build(tmp_path / "c")


@pytest.mark.parametrize("finished", [False, True])
def test_overwrite_discards_the_cache_and_spares_the_rest(tmp_path: Path, finished: bool) -> None:
    build_or_stop(tmp_path / "c", finished=finished)
    (tmp_path / "c" / "notes of mine.txt").write_text("keep")
    other = make_source(30, seed=5)
    build(tmp_path / "c", source=other, overwrite=True)
    build(tmp_path / "fresh", source=other)
    kept = contents(tmp_path / "c")
    assert kept.pop("notes of mine.txt") and kept == contents(tmp_path / "fresh")


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("refused", ["a record", "the shards"])
def test_what_overwrite_is_refused_for_does_not_cost_what_is_there(tmp_path, finished, refused) -> None:
    """A record far down the corpus, and shards that the new plan has not, were found after the old cache was gone."""
    build_or_stop(tmp_path / "c", finished=finished)
    before = contents(tmp_path / "c")
    other, shards = make_source(30, seed=5), None
    if refused == "a record":

        def open_rows():
            yield from make_source(30, seed=5).open_rows()
            raise CorpusError("record 31 must be text, got 3")

        other = replace(other, open_rows=open_rows)
    else:
        shards = (500, 600)
    with pytest.raises((CorpusError, ConfigError), match=r"record 31|--shards must begin within"):
        build(tmp_path / "c", source=other, overwrite=True, shards=shards)
    assert contents(tmp_path / "c") == before


def test_an_interrupted_check_before_overwriting_says_that_the_cache_is_there(tmp_path: Path) -> None:
    build(tmp_path / "c")
    before = contents(tmp_path / "c")

    def open_rows():
        signal.raise_signal(signal.SIGINT)
        yield from make_source(30, seed=5).open_rows()

    other = replace(make_source(30, seed=5), open_rows=open_rows)
    with pytest.raises(BuildInterrupted) as stopped:
        build(tmp_path / "c", source=other, overwrite=True)
    assert stopped.value.message == "interrupted: the cache that was there is there still"
    assert contents(tmp_path / "c") == before


def test_a_cache_that_cannot_be_discarded_is_not_taken_for_the_new_one(tmp_path: Path) -> None:
    """As on a read-only disk, where the old cache was reported as built."""
    build(tmp_path / "c")
    (tmp_path / "c" / "_build").write_text("")  # a file, where the discard begins with a directory
    before = contents(tmp_path / "c")
    with pytest.raises(BuildError, match="failed: File exists; the cache that was there is there still"):
        build(tmp_path / "c", source=make_source(30, seed=5), overwrite=True)
    assert contents(tmp_path / "c") == before


def test_an_interrupted_discard_is_completed_by_any_command(tmp_path: Path, monkeypatch) -> None:
    from cache_builder.commit import build_directory

    build(tmp_path / "c")
    real, calls = os.unlink, []

    def fail(path, *args, **kwargs):
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(path, *args, **kwargs)

    monkeypatch.setattr(build_directory.os, "unlink", fail)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "c", source=make_source(30, seed=5), overwrite=True)
    monkeypatch.undo()
    build(tmp_path / "c", source=make_source(30, seed=5))
    build(tmp_path / "fresh", source=make_source(30, seed=5))
    assert contents(tmp_path / "c") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["foreign", "foreign manifest", "file", "shards without a plan"])
def test_a_directory_that_holds_something_else_is_never_touched(tmp_path, kind: str, overwrite: bool) -> None:
    out = tmp_path / "c"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        name = {"foreign": "thesis.tex", "foreign manifest": "manifest.json"}.get(kind, "shard-00000.arrow")
        (out / name).write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="--out must be"):
        build(out, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_an_output_that_cannot_be_written_stops_before_the_engine(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    class Never(SeededTeacher):
        def __init__(self) -> None:
            raise AssertionError("the engine was started")

    with pytest.raises(ConfigError, match="--out must be"):
        build(tmp_path / "file" / "c", teacher=Never)
    with pytest.raises(ConfigError, match="--out must be a directory that can be written"):
        build(Path("/proc/nothing/here"), teacher=Never)


def test_bad_input_leaves_the_place_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="got none in 0 rows"):
        build(tmp_path / "deep" / "c", num_rows=0)
    assert not (tmp_path / "deep" / "c").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError):
        build(tmp_path / "empty", num_rows=0)
    assert os.listdir(tmp_path / "empty") == []


def test_shards_beyond_the_plan_leave_the_place_as_it_was(tmp_path: Path) -> None:
    """They left an unfinished build, which refused other settings; the dry run said nothing."""
    for out in (tmp_path / "c", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match=r"within the 6 shards of the plan, got 6:9"):
            build(out, shards=(6, 9))
        with pytest.raises(ConfigError, match=r"within the 6 shards of the plan, got 6:9"):
            plan_build(make_config(out, shards=(6, 9)), source=make_source(60))
    assert os.listdir(tmp_path) == ["empty"] and os.listdir(tmp_path / "empty") == []
    build(tmp_path / "c", shards=(0, 2))
    before = contents(tmp_path / "c")
    with pytest.raises(ConfigError, match="within the 6 shards"):
        build(tmp_path / "c", shards=(6, 9))
    assert contents(tmp_path / "c") == before


def test_an_engine_that_does_not_start_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    def broken():
        raise RuntimeError("first line\nout of memory")

    with pytest.raises(AnnealError, match="the engine must start, got RuntimeError: out of memory"):
        build(tmp_path / "c", teacher=broken)
    assert not (tmp_path / "c").exists()


def test_an_engine_that_does_not_start_leaves_the_work_of_others(tmp_path: Path) -> None:
    """The command that planned cleared up behind its failed engine, and pulled the build away from under a second one
    that was in its first shard."""
    captures, failed = threading.Event(), threading.Event()
    reports = []

    def waiting() -> SeededTeacher:
        captures.set()
        assert failed.wait(60)
        return SeededTeacher()

    other = threading.Thread(target=lambda: reports.append(build(tmp_path / "c", teacher=waiting)))

    def broken() -> SeededTeacher:
        other.start()
        assert captures.wait(60)
        raise RuntimeError("out of memory")

    with pytest.raises(AnnealError, match="out of memory"):
        build(tmp_path / "c", teacher=broken)
    failed.set()
    other.join()
    build(tmp_path / "fresh")
    assert reports and reports[0].complete and contents(tmp_path / "c") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("fault", ["short", "nan", "too few rows"])
def test_a_teacher_that_breaks_its_contract_is_refused(tmp_path: Path, fault: str) -> None:
    class Broken(SeededTeacher):
        def prefill(self, rows):
            for number, topk in enumerate(super().prefill(rows)):
                if number == 3 and fault == "short":
                    yield topk.slice(0, len(topk) - 1)
                elif number == 3 and fault == "nan":
                    topk.logprobs[0] = np.nan
                    yield topk
                elif number == 3:
                    return
                else:
                    yield topk

    with pytest.raises(ValueError) as caught:
        build(tmp_path / "c", teacher=Broken)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "c").glob("shard-*"))
    report = build(tmp_path / "c")
    build(tmp_path / "fresh")
    assert report.complete and contents(tmp_path / "c") == contents(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"min_prob": 1.0}, "min_prob must be at least 0 and below 1"),
        ({"max_k": 0}, "max_k must be a whole number of at least 1"),
        ({"max_length": 1}, "max_length must be a whole number of at least 2"),
        (
            {"min_prob": 0, "max_k": 4096},
            "min_prob must be at least 2.45e-05 where max_k is above 825, got 0 and",
        ),
        ({"limit": 0}, "limit"),
        ({"engine": "tgi"}, "engine must be one of vllm, transformers"),
        ({"positions": "some"}, "positions must be one of"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"shards": (3, 3)}, "shards must be first:last"),
        ({"corpus": ""}, "corpus must be given"),
        (
            {"out": "s3://bucket/cache"},
            "--out must be a directory on this machine, got the address s3://bucket",
        ),
        ({"rows_per_shard": 0}, "rows_per_shard"),
        ({"heartbeat_seconds": 0.0}, "heartbeat_seconds"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_config(**{"out": tmp_path, **change})


def test_a_failing_disk_is_one_line_with_the_state(tmp_path: Path, monkeypatch) -> None:
    import errno

    real = os.link
    calls = []

    def link(source, target, **kwargs):
        if str(target).endswith(".arrow"):
            calls.append(target)
            if len(calls) == 3:
                raise OSError(errno.ENOSPC, "No space left on device", str(target))
        real(source, target, **kwargs)

    def rename(source, target, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(BuildError) as caught:
        build(tmp_path / "c")
    monkeypatch.undo()
    assert "No space left on device" in str(caught.value) and "of 6 shards" in str(caught.value)
    assert build(tmp_path / "c").complete
