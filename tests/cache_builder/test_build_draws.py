"""Builds of a real model with tail draws: from the settings to the stored tokens, and without them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from deterministic_build import SeededTeacher, Stop, contents, make_config, make_source, stop_at
from tiny_models import write_corpus

from cache_builder import BuildConfig, build_cache, estimate_cache, plan_build
from cache_builder.teachers.engines import make_teacher
from cache_builder.teachers.protocol import TeacherConfig
from cache_builder.tools.deviation import compare
from formats.cache import TeacherCache
from formats.capture_settings import CaptureSettings
from formats.errors import ConfigError


@pytest.fixture(scope="module")
def config(tiny_llama_dir: Path, tmp_path_factory) -> BuildConfig:
    """Small shards, so that there are several; everything that is stored by the defaults."""
    directory = tmp_path_factory.mktemp("default-build")
    return BuildConfig(
        corpus=str(write_corpus(directory / "text.jsonl")),
        model=str(tiny_llama_dir),
        out=str(directory / "cache"),
        engine="transformers",
        max_length=64,
        rows_per_shard=4,
    )


@pytest.fixture(scope="module")
def cache(config: BuildConfig) -> TeacherCache:
    assert build_cache(config).complete
    return TeacherCache(config.out)


def manifest_of(cache: TeacherCache) -> dict:
    return json.loads((Path(cache.path) / "manifest.json").read_text())


def test_a_cache_has_draws_unless_told_otherwise(config: BuildConfig, cache: TeacherCache) -> None:
    cache.validate(full=True)
    assert config.draw_rate == CaptureSettings.draw_rate == 8
    assert manifest_of(cache)["version"] == 1 and manifest_of(cache)["codec"]["draw_rate"] == 8
    counts = np.concatenate([row.teacher.draws.counts for row in cache.rows()])
    expected = np.concatenate([8 * np.exp(row.teacher.log_tail(4 / 3)) for row in cache.rows()])
    assert counts.mean() > 5 and (np.abs(counts - expected) < 1 + 0.01 * expected).all()


def test_stored_draws_are_those_of_the_teacher(cache: TeacherCache, tiny_llama_dir: Path) -> None:
    settings = TeacherConfig(
        model=str(tiny_llama_dir),
        capture=cache.manifest.capture,
        max_length=64,
    )
    teacher = make_teacher("transformers", settings)
    rows = list(cache.rows())
    for row, again in zip(rows, teacher.prefill([row.tokens for row in rows]), strict=True):
        found = compare(row.teacher, again)
        assert len(found.draws) == found.num_draws == len(again.draws.token_ids)
        assert len(found.draws) == 0 or found.draws.max() <= 0.5 / cache.manifest.codec.draw_steps + 1e-5
    teacher.close()


def test_none_changes_nothing_else(config: BuildConfig, cache: TeacherCache, tmp_path: Path) -> None:
    build_cache(replace(config, out=str(tmp_path / "c"), draw_rate=0))
    plain = TeacherCache(tmp_path / "c")
    assert manifest_of(plain)["version"] == 1 and manifest_of(plain)["codec"]["draw_rate"] == 0
    for one, other in zip(plain.rows(), cache.rows(), strict=True):
        assert one.key == other.key and one.teacher.draws.rate == len(one.teacher.draws.token_ids) == 0
        # Entries are stored by rank, and draws have a say in the ranks.
        a, b = one.teacher.sorted(), other.teacher.sorted()
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
        np.testing.assert_array_equal(one.teacher.log_tail_nodes, other.teacher.log_tail_nodes)


def test_as_many_as_asked_for(config: BuildConfig, cache: TeacherCache, tmp_path: Path) -> None:
    build_cache(replace(config, out=str(tmp_path / "c"), draw_rate=64))
    more = TeacherCache(tmp_path / "c")
    many, few = (sum(len(row.teacher.draws.token_ids) for row in c.rows()) for c in (more, cache))
    assert many == pytest.approx(8 * few, rel=0.02)


@pytest.mark.parametrize("name", ["planned", "committed 0", "tokenizer"])
def test_a_stopped_build_ends_with_the_same_bytes(
    config: BuildConfig, cache: TeacherCache, tmp_path: Path, name: str
) -> None:
    unfinished = replace(config, out=str(tmp_path / "c"))
    with pytest.raises(Stop):
        build_cache(unfinished, step=stop_at(name))
    assert build_cache(unfinished).complete
    assert contents(tmp_path / "c") == contents(Path(cache.path))


@pytest.mark.parametrize(
    ("asked", "words"), [(3, "--tail-draws: 8 there, 3 now"), (0, "--tail-draws: 8 there, 0 now")]
)
def test_another_rate_into_the_same_directory_is_refused(
    config: BuildConfig, cache: TeacherCache, tmp_path: Path, asked: int, words: str
) -> None:
    unfinished = replace(config, out=str(tmp_path / "c"))
    with pytest.raises(Stop):
        build_cache(unfinished, step=stop_at("committed 0"))
    for held in (unfinished, config):
        before = contents(Path(held.out))
        with pytest.raises(ConfigError) as caught:
            build_cache(replace(held, draw_rate=asked))
        assert words in str(caught.value) and "--overwrite" in str(caught.value)
        assert "\n" not in str(caught.value) and contents(Path(held.out)) == before
    assert build_cache(replace(config, draw_rate=8)).was_complete, "8 is what the default was"


@pytest.mark.parametrize("rate", [-1, 65, 8.0, True, "8"])
def test_a_rate_that_cannot_be_is_one_line(config: BuildConfig, rate) -> None:
    with pytest.raises(
        ConfigError, match=rf"draw_rate \(--tail-draws\) must be a whole number from 0 to 64, got {rate!r}"
    ):
        replace(config, draw_rate=rate)


def test_a_teacher_that_does_not_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tail draws must have rate 8, got 0") as caught:
        build_cache(
            make_config(tmp_path / "c", draw_rate=8),
            source=make_source(30, draw_rate=8),
            make_teacher=lambda config, source: SeededTeacher(),
        )
    assert "\n" not in str(caught.value) and not list((tmp_path / "c").glob("shard-*"))


def test_a_dry_run_counts_the_draws(config: BuildConfig, tmp_path: Path) -> None:
    planned = [plan_build(replace(config, out=str(tmp_path / "c"), draw_rate=rate)) for rate in (0, 8, 16)]
    sizes = [plan.estimated_bytes / planned[0].num_positions for plan in planned]
    assert 20 < sizes[1] - sizes[0] < 40 and sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], abs=1)
    assert not (tmp_path / "c").exists()


def test_an_estimate_of_a_real_model(config: BuildConfig, cache: TeacherCache) -> None:
    """The table's line at the settings of the build weighs what the build's draws weigh."""
    reports = [
        estimate_cache(
            replace(config, draw_rate=rate), rows=100, min_probs=(config.min_prob,), tail_draws=(rate,)
        )
        for rate in (0, 8)
    ]
    (plain,), (line,) = (report.estimates for report in reports)
    num_draws = sum(len(row.teacher.draws.token_ids) for row in cache.rows())
    assert 1.5 < (line.total_bytes - plain.total_bytes) / num_draws < 3.5, "bytes per draw"
    assert (line.missed_mean, line.entries_per_position) == (plain.missed_mean, plain.entries_per_position)
    built = sum(shard.num_bytes for shard in cache.manifest.shards)
    assert 0.7 * built < line.total_bytes < built, "one shard instead of three has one header"
