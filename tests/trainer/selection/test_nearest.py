"""The rule that takes the model nearest to the initial one."""

import math

import pytest
from paper_tables import text_metrics

from formats.errors import ConfigError
from trainer.comparison.standing import Point
from trainer.selection.rules import Rule
from trainer.selection.selection import Selection, select_points

ROWS = {
    # source perplexity, target perplexity, distance
    "base": (10.0, 20.0, 0.0),
    "direct": (12.0, 10.0, 0.40),
    "surer": (9.0, 10.5, 0.30),
    "near": (10.1, 10.6, 0.05),
    "timid": (10.0, 16.0, 0.01),
    "burst": (math.inf, 10.0, math.nan),
}


def selected(rule: str, rows: dict[str, tuple[float, float, float | None]] | None = None) -> Selection:
    metrics = text_metrics()
    points = [
        Point(label=label, values=dict(zip((m.key for m in metrics), row[:2], strict=True)), distance=row[2])
        for label, row in (rows or ROWS).items()
    ]
    return select_points(points, metrics, initial="base", direct="direct", rule=Rule.parse(rule))


def test_the_nearest_of_those_that_keep_the_gain() -> None:
    """`surer` has a lower perplexity than the initial model on the source: less lost, and six times as far."""
    found = selected("keep-gain:0.9")
    assert found.recommended == "surer" and found.picks["nearest:0.9"].label == "near"
    assert found.picks["nearest:0.9"].passed == ("near", "surer", "direct")
    assert selected("nearest:0.9").recommended == "near"
    assert selected("nearest:0.3").recommended == "timid"
    assert selected("nearest:1").recommended == "direct"


def test_a_model_that_another_one_beats_on_every_metric_can_be_the_nearest() -> None:
    """`near` loses more and gains less than `surer`, so no other rule may take it."""
    assert "near" not in selected("keep-gain:0.9").picks["keep-gain:0.9"].passed


def test_both_rules_of_a_share_have_the_one_that_is_asked_for() -> None:
    assert set(selected("keep-gain:0.8").picks) == {"paper", "keep-gain:0.8", "budget:2%", "nearest:0.8"}
    assert set(selected("nearest:0.7").picks) == {"paper", "keep-gain:0.7", "budget:2%", "nearest:0.7"}
    assert set(selected("budget:5%").picks) == {"paper", "keep-gain:0.9", "budget:5%", "nearest:0.9"}


def test_the_distance_is_shown_and_told() -> None:
    found = selected("nearest:0.9")
    assert "KL on source" in found.text() and "0.0500" in found.text()
    assert found.to_dict()["points"]["near"]["distance"] == 0.05
    assert found.to_dict()["picks"]["nearest:0.9"]["distance"] == 0.05


def test_without_distances_the_rule_is_silent_or_refused() -> None:
    rows = {label: (*row[:2], None) for label, row in ROWS.items()}
    found = selected("keep-gain:0.9", rows)
    assert set(found.picks) == {"paper", "keep-gain:0.9", "budget:2%"} and "KL on source" not in found.text()
    with pytest.raises(ConfigError, match=r"nearest:0\.9 needs the KL to the initial model on a source text"):
        selected("nearest:0.9", rows)


def test_one_model_without_a_distance_leaves_the_rule_without_a_pick() -> None:
    rows = {**ROWS, "near": (10.1, 10.6, None)}
    assert selected("paper", rows).picks["nearest:0.9"].label is None
    assert "needs the KL of every model" in selected("paper", rows).text()
    with pytest.raises(ConfigError, match="needs the KL"):
        selected("nearest:0.9", rows)


@pytest.mark.parametrize("text", ["nearest", "nearest:0", "nearest:1.5", "nearest:"])
def test_a_share_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="or nearest:SHARE, got"):
        Rule.parse(text)
