"""The estimate's figures are those of a build at that setting, and the recommendation follows its rule."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from deterministic_build import (
    SeededTeacher,
    logits_of,
    make_config,
    make_rows,
    make_source,
)

from cache_builder.build import build_cache
from cache_builder.tools.estimate import MAX_MISSED_MASS, estimate_cache
from formats.errors import ConfigError, CorpusError


def estimate(tmp_path: Path, num_rows: int = 50, draw_rate: int = 0, **options):
    return estimate_cache(
        make_config(tmp_path / "never", max_k=12, min_prob=1e-2, tail_draws=draw_rate),
        source=make_source(num_rows),
        make_teacher=lambda config, source: SeededTeacher(
            min_prob=config.min_prob,
            max_k=config.max_k,
            draw_rate=config.draw_rate,
        ),
        **options,
    )


def test_counts_are_of_the_whole_corpus_and_nothing_is_written(tmp_path: Path) -> None:
    report = estimate(tmp_path, rows=7)
    rows = list(make_rows(50))
    assert (report.num_rows, report.num_tokens) == (50, sum(len(row) for row in rows))
    assert report.num_positions == sum(len(row.positions()) for row in rows)
    assert report.num_sampled_rows == 7 and list(tmp_path.iterdir()) == []
    json.dumps(report.to_dict())
    assert "recommended" in report.text()


def test_a_sample_of_everything_has_the_size_of_the_build(tmp_path: Path) -> None:
    report = estimate(tmp_path, rows=50)
    (line,) = [e for e in report.estimates if e.min_prob == 1e-2]
    built = build_cache(
        make_config(tmp_path / "c"),
        source=make_source(50, rows_per_shard=50, max_k=12),
        make_teacher=lambda config, source: SeededTeacher(min_prob=1e-2, max_k=12),
    )
    assert line.total_bytes == pytest.approx(built.num_bytes, rel=0.02)


def test_draws_count(tmp_path: Path) -> None:
    """Of a tighter setting the entries that join the tail are drawn from like those that were there."""
    plain, report = estimate(tmp_path, rows=50), estimate(tmp_path, rows=50, draw_rate=8)
    for before, after in zip(plain.estimates, report.estimates, strict=True):
        assert after.bytes_per_token > before.bytes_per_token + 1
        assert (after.missed_mean, after.kl_mean) == (before.missed_mean, before.kl_mean)
    for line in report.estimates[-2:]:
        built = build_cache(
            make_config(tmp_path / "c", overwrite=True),
            source=make_source(50, rows_per_shard=50, max_k=12, min_prob=line.min_prob, draw_rate=8),
            make_teacher=lambda config, source, line=line: SeededTeacher(
                min_prob=line.min_prob, max_k=12, draw_rate=8
            ),
        )
        assert line.total_bytes == pytest.approx(built.num_bytes, rel=0.03)


def test_missed_mass_is_what_the_logits_say(tmp_path: Path) -> None:
    report = estimate(tmp_path, rows=50)
    for line in report.estimates:
        missed, entries = [], []
        for row in make_rows(50):
            for logits in logits_of(row.input_ids)[row.positions()]:
                p = np.sort(np.exp(logits - np.logaddexp.reduce(logits)))[::-1]
                size = max(1, min(12, int((p >= line.min_prob).sum())))
                missed.append(1 - p[:size].sum())
                entries.append(size)
        assert line.missed_mean == pytest.approx(np.mean(missed), abs=1e-4)
        assert line.entries_per_position == pytest.approx(np.mean(entries), rel=1e-2)
        assert -1e-7 <= line.kl_mean < 0.01


def test_a_tighter_setting_is_smaller_and_misses_more(tmp_path: Path) -> None:
    lines = estimate(tmp_path, rows=50).estimates
    for before, after in pairwise(lines):
        assert after.min_prob > before.min_prob
        assert after.entries_per_position <= before.entries_per_position
        assert after.missed_mean >= before.missed_mean


def test_the_recommendation_is_the_smallest_that_keeps_enough(tmp_path: Path) -> None:
    report = estimate(tmp_path, rows=50)
    good = [e for e in report.estimates if e.missed_mean <= MAX_MISSED_MASS]
    best = report.estimates[report.recommended]
    assert best == min(good, key=lambda e: e.bytes_per_token) if good else best == report.estimates[0]


def test_bad_calls(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rows must be"):
        estimate(tmp_path, rows=0)
    with pytest.raises(CorpusError):
        estimate(tmp_path, num_rows=0)
