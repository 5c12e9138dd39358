"""Shares by hand and against published rows; the front; what has no share."""

import math

import pytest
from paper_tables import RETENTION, retention_points, text_metrics

from formats.errors import ConfigError
from trainer.comparison.metric import Metric
from trainer.comparison.standing import Point, beats, front_of, standings

ACC = Metric(side="source", name="piqa", kind="task", measure="acc,none", higher_is_better=True)
BITS = Metric(side="source", name="news", kind="task", measure="bits_per_byte,none", higher_is_better=False)
TARGET = Metric(side="target", name="new", kind="text", measure="perplexity", higher_is_better=False)


def test_shares_of_the_rows_in_the_documentation():
    found, unmoved = standings(retention_points(), text_metrics(), initial="tiny-base", direct="kl-0")
    assert unmoved == []
    kept = {label: round(found[label].gain_kept, 3) for label in ("kl-1", "kl-4", "kl-16", "wise-0.25")}
    assert kept == {"kl-1": 0.936, "kl-4": 0.652, "kl-16": 0.430, "wise-0.25": 0.385}
    avoided = [round(found[label].forgetting_avoided, 3) for label in ("kl-1", "kl-4", "kl-16")]
    assert avoided == [0.620, 0.876, 0.921]
    for label, (source, target) in RETENTION.items():
        assert found[label].source_loss == pytest.approx(source / 25.31 - 1)
        assert found[label].gains["target:text"] == pytest.approx(math.log(486.89 / target))
    assert (found["kl-0"].gain_kept, found["kl-0"].forgetting_avoided) == (1, 0)
    assert (found["tiny-base"].gain_kept, found["tiny-base"].forgetting_avoided) == (0, 1)


def points(**rows: tuple[float, float, float]) -> list[Point]:
    keys = (ACC.key, BITS.key, TARGET.key)
    return [Point(label=label, values=dict(zip(keys, row, strict=True))) for label, row in rows.items()]


def test_several_sources_are_the_mean_of_their_own_shares():
    rows = points(base=(0.80, 1.00, math.e**2), direct=(0.70, 1.10, math.e), tuned=(0.78, 1.02, math.e**1.5))
    found, _ = standings(rows, (ACC, BITS, TARGET), initial="base", direct="direct")
    tuned = found["tuned"]
    assert tuned.shares == pytest.approx({ACC.key: 0.8, BITS.key: 0.8, TARGET.key: 0.5})
    assert tuned.forgetting_avoided == pytest.approx(0.8) and tuned.gain_kept == pytest.approx(0.5)
    assert tuned.source_loss == pytest.approx((0.02 / 0.80 + 0.02) / 2)
    assert tuned.gains[BITS.key] == pytest.approx(-0.02)


def test_what_direct_did_not_forget_has_no_share():
    rows = points(base=(0.80, 1.00, 4.0), direct=(0.80, 1.10, 2.0), tuned=(0.79, 1.05, 3.0))
    found, unmoved = standings(rows, (ACC, BITS, TARGET), initial="base", direct="direct")
    assert unmoved == [ACC] and ACC.key not in found["tuned"].shares
    assert found["tuned"].forgetting_avoided == pytest.approx(0.5)  # of the other one alone
    noisy = [Point(label=p.label, values=p.values, errors={BITS.key: 0.2}) for p in rows]
    found, unmoved = standings(noisy, (ACC, BITS, TARGET), initial="base", direct="direct")
    assert unmoved == [ACC, BITS] and found["tuned"].forgetting_avoided is None
    found, unmoved = standings(rows, (ACC, BITS, TARGET), initial="base")
    assert unmoved == [] and found["tuned"].gain_kept is None and found["direct"].gain == 1


def test_a_model_that_diverged_stands_nowhere():
    rows = points(base=(0.8, 1.0, 4.0), lost=(0.8, 1.0, math.inf), other=(0.8, math.nan, 3.0))
    found, _ = standings(rows, (ACC, BITS, TARGET), initial="base")
    assert list(found) == ["base"]
    with pytest.raises(ConfigError, match="initial model must have finite"):
        standings(rows, (ACC, BITS, TARGET), initial="lost")
    with pytest.raises(ConfigError, match="direct fine-tuning must have finite"):
        standings(rows, (ACC, BITS, TARGET), initial="base", direct="lost")


def test_incomplete_points_are_refused():
    rows = points(base=(0.8, 1.0, 4.0))
    with pytest.raises(ConfigError, match="one of the models, got 'nobody'"):
        standings(rows, (ACC,), initial="nobody")
    with pytest.raises(ConfigError, match="no target:new for 'bare'"):
        standings(
            [*rows, Point(label="bare", values={ACC.key: 1.0, BITS.key: 1.0})],
            (ACC, BITS, TARGET),
            initial="base",
        )
    with pytest.raises(ConfigError, match="'base' twice"):
        standings([*rows, *rows], (ACC,), initial="base")


def test_nothing_to_lose():
    assert ACC.loss(0.1, 0.0) is None and ACC.loss(0.4, 0.5) == pytest.approx(0.2)
    assert TARGET.loss(11.0, 10.0) == pytest.approx(0.1)
    correlation = Metric(side="source", name="cola", kind="task", measure="mcc,none", higher_is_better=True)
    assert correlation.loss(0.05, -0.1) == pytest.approx(-1.5)  # better than before, and nothing lost
    assert correlation.loss(-0.15, -0.1) == pytest.approx(0.5) and correlation.loss(-0.1, -0.1) == 0
    for metric, value in ((ACC, 0.3), (BITS, 1.7), (TARGET, 12.5)):
        assert metric.value(metric.score(value)) == pytest.approx(value)


def test_the_front_against_all_pairs():
    import random

    generator = random.Random(0)
    cloud = {str(n): (generator.randrange(12) / 4, generator.randrange(12) / 4) for n in range(60)}
    slow = [
        label
        for label, (lost, gained) in cloud.items()
        if not any(
            beats({"lost": -a, "gained": b}, {"lost": -lost, "gained": gained}) for a, b in cloud.values()
        )
    ]
    fast = front_of(cloud)
    assert sorted(fast) == sorted(slow) and len(fast) > len({cloud[label] for label in fast})
