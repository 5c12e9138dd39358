"""A comparison by hand, in each form in which it is shown."""

import json
import math

import pytest

from formats.errors import ConfigError
from trainer.comparison.comparison import Comparison
from trainer.comparison.lines import Cell, ComparedModel
from trainer.comparison.metric import Metric
from trainer.evaluation.recorded_method import AppliedMethod


def hand_made(*lines: tuple[str, float, float, float | None], initial: str | None = "base") -> Comparison:
    """(label, source perplexity, target perplexity, kl_coef) per model."""
    metrics = tuple(
        Metric(side=side, name=name, kind="text", measure="perplexity", higher_is_better=False)
        for side, name in (("source", "news"), ("target", "law"))
    )
    models = [
        ComparedModel(
            label=label,
            members=(label,),
            paths=(f"runs/{label}",),
            method=None if kl is None else AppliedMethod((("label annealing", {"kl_coef": kl}),)),
            cells={
                metric.key: Cell(value=math.inf if math.isnan(value) else value, details={"kl": 0.25})
                for metric, value in zip(metrics, (source, target), strict=True)
            },
        )
        for label, source, target, kl in lines
    ]
    direct = "kl-1" if initial else None
    return Comparison(metrics=metrics, initial=initial, direct=direct, models=tuple(models))


LINES = [
    ("base", 10.0, 20.0, None),
    ("kl-4", 10.5, 12.0, 4.0),
    ("kl-1", 11.0, 11.0, 1.0),
    ("worse", 12.0, 13.0, None),
    ("lost", 11.0, 21.0, None),
    ("nan", math.nan, math.nan, 0.1),
]


def test_the_table_by_hand():
    text = hand_made(*LINES).text()
    lines = [line.split() for line in text.splitlines()]
    assert lines[0][:4] == ["source", "news", "target", "law"]
    assert lines[1] == [
        "model",
        "method",
        "ppl",
        "nats",
        "ppl",
        "nats",
        "kept",
        "avoided",
        "lost",
        "target",
    ]
    assert lines[2] == ["*", "base", "initial", "model", "10.00", "20.00", "0.2500"]
    assert lines[3][:6] == ["*", "kl-4", "label", "annealing", "kl_coef", "4"]
    # ln(20 / 12) / ln(20 / 11) = 0.854; 1 - ln(1.05) / ln(1.1) = 0.488
    assert lines[3][6:] == ["10.50", "-0.049", "12.00", "+0.511", "85%", "49%", "5.0%", "0.2500"]
    assert lines[4][6:] == ["11.00", "-0.095", "11.00", "+0.598", "100%", "0%", "10.0%", "0.2500"]
    assert lines[5] == ["worse", "-", "12.00", "-0.182", "13.00", "+0.431", "72%", "-91%", "20.0%", "0.2500"]
    assert lines[6][0] == "lost" and lines[6][5] == "-0.049"
    assert lines[7][:1] == ["nan"] and lines[7].count("inf") == 2 and "%" not in " ".join(lines[7])
    bare = hand_made(*LINES, initial=None).text()
    assert "nats" in text and "nats" not in bare and "avoided" not in bare
    assert "no interval for source news, target law" in text


def test_the_dict_is_json_and_its_keys_are_stable():
    found = json.loads(json.dumps(hand_made(*LINES).to_dict(), allow_nan=False))
    assert sorted(found) == ["direct", "format", "front", "initial", "kl_law", "metrics", "models", "notes"]
    for model in found["models"]:
        assert sorted(model) == [
            "forgetting_avoided", "front", "gain", "gain_kept", "kl_on_target", "label", "method", "models",
            "num_seeds", "source", "source_loss", "still_right", "strengths", "target",
        ]  # fmt: skip
        assert list(model["source"]) == ["news"] and list(model["target"]) == ["law"]
        assert {
            "value",
            "score",
            "gain",
            "gain_interval",
            "share",
            "loss",
            "flips",
            "perplexity",
            "ce",
            "kl",
        } <= set(model["source"]["news"])
    assert [model["label"] for model in found["models"] if model["front"]] == ["base", "kl-4", "kl-1"]
    assert found["models"][1]["source_loss"] == pytest.approx(0.05)
    assert found["models"][1]["gain_kept"] == pytest.approx(math.log(20 / 12) / math.log(20 / 11))
    assert found["models"][5]["source"]["news"]["perplexity"] is None
    assert found["kl_law"] is not None  # equal KLs, four models


def test_the_picture_joins_models_of_one_method_and_leaves_out_what_has_diverged(tmp_path, monkeypatch):
    from trainer.comparison import picture

    calls = []
    draw = picture.plot_tradeoff
    monkeypatch.setattr(picture, "plot_tradeoff", lambda *a, **k: calls.append((a, k)) or draw(*a, **k))
    path = hand_made(*LINES).plot(tmp_path / "p.png")
    assert path.read_bytes().startswith(b"\x89PNG") and [p.name for p in tmp_path.iterdir()] == ["p.png"]
    (points, _), options = calls[0]
    assert list(points) == ["base", "kl-4", "kl-1", "worse", "lost"]
    assert points["kl-4"] == {"source": 10.5, "target": 12.0}
    assert options["initial"] == "base" and options["families"] == {"label annealing": ["kl-1", "kl-4"]}
    assert options["higher_is_better"] == {"source": False, "target": False}
    with pytest.raises(ConfigError, match="at least one model"):
        hand_made(LINES[5], initial=None).plot(tmp_path / "none.png")
