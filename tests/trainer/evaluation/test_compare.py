"""`compare`: numbers are `evaluate`'s, methods are read off directories, bad input refused."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from caches import write_cache
from recorded_progress import RecordedProgress
from runs import copy_model, noise

from formats.errors import ConfigError, FormatError, IdentityMismatchError
from trainer import compare, evaluate
from trainer.evaluation.compare import ComparedModel, Comparison
from trainer.evaluation.recorded_method import AppliedMethod, method_of


@pytest.fixture(scope="module")
def texts(tiny_llama_dir, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    return {
        name: write_cache(folder / name, tiny_llama_dir, num_rows=3, seed=seed)
        for name, seed in (("source", 1), ("target", 2))
    }


@pytest.fixture(scope="module")
def sweep(tiny_llama_dir, tmp_path_factory) -> dict[str, Path]:
    """Two models away from the initial one, as if `anneal train` had left them."""
    folder = tmp_path_factory.mktemp("sweep")
    found = {}
    for number, kl_coef in enumerate((4, 1)):
        path = copy_model(tiny_llama_dir, folder / f"kl-{kl_coef}", noise(number, 0.01 * (number + 1)))
        found[path.name] = as_run(path, kl_coef=kl_coef)
    return found


def as_run(path: Path, **settings) -> Path:
    """The directory with the record of a training run of these settings."""
    path.mkdir(exist_ok=True)
    plain = {"cache": "c", "model": "m", "out": str(path), **settings}
    (path / "anneal.yaml").write_text(yaml.safe_dump(plain))
    (path / "anneal.json").write_text(json.dumps({"cache": "1234"}))
    return path


def as_merge(path: Path, method: str, tuned: str = "aa", **strengths) -> Path:
    path.mkdir(exist_ok=True)
    merge = {"method": method, "tuned": [{"name": "t", "weights": tuned}], **strengths}
    (path / "anneal.json").write_text(json.dumps({"merge": merge}))
    return path


def test_every_number_is_that_of_evaluate(sweep, texts, tiny_llama_dir):
    seen = RecordedProgress()
    found = compare(sweep, **texts, initial={"base": tiny_llama_dir}, progress=seen)
    assert [model.label for model in found.models] == ["base", "kl-4", "kl-1"]
    expected = {name: evaluate(path, texts) for name, path in {"base": tiny_llama_dir, **sweep}.items()}
    for model in found.models:
        assert model.results == expected[model.label]
    initial, moved = expected["base"]["source"], expected["kl-1"]["source"]
    assert initial["kl"] < 1e-6 < moved["kl"]
    change = found.change(found.models[2], "source")
    assert change == pytest.approx(
        100 * (moved["perplexity"] - initial["perplexity"]) / initial["perplexity"]
    )
    assert seen.phases == [
        (f"{label}: {text}", 3, 3) for label in ("base", "kl-4", "kl-1") for text in ("source", "target")
    ]
    limited = compare({"a": sweep["kl-1"]}, **texts, limit=1)
    assert limited.models[0].results == evaluate(sweep["kl-1"], texts, limit=1)
    assert limited.initial is None and limited.change(limited.models[0], "source") is None


def hand_made(*lines: tuple[str, float, float, float | None], initial: str | None = "base") -> Comparison:
    """(label, source perplexity, target perplexity, kl_coef) per model."""

    def result(perplexity: float) -> dict:
        return {"ce": math.log(perplexity), "perplexity": perplexity, "kl": 0.25, "num_tokens": 7}

    models = [
        ComparedModel(
            label=label,
            path=f"runs/{label}",
            method=None if kl is None else AppliedMethod((("label annealing", {"kl_coef": kl}),)),
            results={"source": result(source), "target": result(target)},
        )
        for label, source, target, kl in lines
    ]
    return Comparison(caches={"source": "s", "target": "t"}, initial=initial, models=tuple(models))


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
    assert lines[1] == ["*", "base", "initial", "model", "10.00", "20.00", "0.2500", "0.2500"]
    assert lines[2][:2] == ["*", "kl-4"] and lines[2][2:5] == ["label", "annealing", "kl_coef"]
    assert lines[2][5:] == ["4", "10.50", "+5.0%", "12.00", "-40.0%", "0.2500", "0.2500"]
    assert lines[3][:2] == ["*", "kl-1"] and lines[3][6:8] == ["11.00", "+10.0%"]
    assert lines[4] == ["worse", "-", "12.00", "+20.0%", "13.00", "-35.0%", "0.2500", "0.2500"]
    assert (
        lines[5][0] == "lost"
        and lines[6][:1] == ["nan"]
        and "inf" in lines[6]
        and "%" not in " ".join(lines[6])
    )
    assert "change" in text and "change" not in hand_made(*LINES, initial=None).text()


def test_the_dict_is_json_and_its_keys_are_stable():
    found = json.loads(json.dumps(hand_made(*LINES).to_dict(), allow_nan=False))
    assert sorted(found) == ["caches", "initial", "models"]
    for model in found["models"]:
        assert sorted(model) == [
            "change_percent", "front", "label", "method", "model", "source", "strengths", "target",
        ]  # fmt: skip
    assert [model["label"] for model in found["models"] if model["front"]] == ["base", "kl-4", "kl-1"]
    assert found["models"][1]["change_percent"] == {"source": pytest.approx(5), "target": pytest.approx(-40)}
    assert found["models"][5]["source"]["perplexity"] is None


def test_the_picture_joins_models_of_one_method_and_leaves_out_what_has_diverged(tmp_path, monkeypatch):
    from trainer.evaluation import compare as compare_module

    calls = []
    draw = compare_module.plot_tradeoff
    monkeypatch.setattr(
        compare_module, "plot_tradeoff", lambda *a, **k: calls.append((a, k)) or draw(*a, **k)
    )
    path = hand_made(*LINES).plot(tmp_path / "p.png")
    assert path.read_bytes().startswith(b"\x89PNG") and [p.name for p in tmp_path.iterdir()] == ["p.png"]
    (points, _), options = calls[0]
    assert list(points) == ["base", "kl-4", "kl-1", "worse", "lost"]
    assert options == {"initial": "base", "families": {"label annealing": ["kl-1", "kl-4"]}}
    with pytest.raises(ConfigError, match="at least one model"):
        hand_made(LINES[5], initial=None).plot(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kl_coef": 0}, "direct fine-tuning"),
        ({"kl_coef": 4}, "label annealing kl_coef 4"),
        ({"kl_budget": 0.02}, "label annealing kl_budget 0.02"),
        ({"kl_coef": 0.1, "ce_weight": "dft"}, "label annealing kl_coef 0.1 + ce_weight dft"),
        (
            {"kl_target": "masked", "label_smoothing": 0.1},
            "label annealing kl_coef 1 + kl_target masked + label smoothing label_smoothing 0.1",
        ),
        ({"kl_coef": 1, "temperature": 2}, "label annealing kl_coef 1 temperature 2"),
        ({"kl_coef": 1, "kl_direction": "reverse"}, "label annealing (reverse KL) kl_coef 1"),
        ({"kl_coef": 0, "l2": {"coef": 0.1}}, "L2 coef 0.1"),
        ({"kl_coef": 0, "ewc": {"coef": 1000, "cache": "k"}}, "EWC coef 1000"),
        ({"kl_coef": 0, "sfa": {"beta": 0.25}}, "SFA beta 0.25 period 0.25"),
        ({"kl_coef": 0, "lora": {"r": 16}}, "LoRA r 16"),
        (
            {"kl_coef": 1, "caches": [{"path": "old", "loss": "ce", "weight": 0.1}]},
            "label annealing kl_coef 1 + replay weight 0.1",
        ),
    ],
)
def test_methods_of_runs(tmp_path, settings, expected):
    method = method_of(as_run(tmp_path, **settings))
    assert method is not None and method.text() == expected


def test_methods_of_merges_and_of_what_says_nothing(tmp_path, tiny_llama_dir):
    merged = method_of(as_merge(tmp_path / "m", "ties", scale=1.0, density=0.2))
    assert merged is not None and merged.text() == "TIES scale 1 density 0.2"
    assert method_of(tiny_llama_dir) is None
    for name, text in (
        ("a", "{"),
        ("b", "[]"),
        ("c", '{"merge": 3}'),
        ("d", '{"merge": {"method": "ties"}}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "anneal.json").write_text(text)
        assert method_of(tmp_path / name) is None
    newer = as_run(tmp_path / "newer", kl_coef=1, from_the_future=True)
    assert method_of(newer) is None


def test_bad_input_is_refused_before_anything_is_evaluated(
    sweep, texts, tiny_llama_dir, tiny_qwen3_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr("trainer.evaluation.compare.evaluate", None)
    good = {"kl-1": sweep["kl-1"]}
    with pytest.raises(ConfigError, match="at least one model"):
        compare({}, **texts)
    with pytest.raises(ConfigError, match="different labels, got 'kl-1'"):
        compare(good, **texts, initial={"kl-1": tiny_llama_dir})
    with pytest.raises(ConfigError, match=r"^MODEL must be a model directory"):
        compare({**good, "gone": tmp_path / "gone"}, **texts)
    with pytest.raises(FormatError, match="gone"):
        compare(good, source=texts["source"], target=tmp_path / "gone")
    unfinished = as_run(tmp_path / "unfinished", kl_coef=1)
    with pytest.raises(
        ConfigError, match=r"MODEL must be a finished model, got no config.json in .*unfinished"
    ):
        compare({**good, "unfinished": unfinished}, **texts)
    with pytest.raises(IdentityMismatchError, match="model weights"):
        compare(good, **texts, initial={"base": tiny_qwen3_dir})
    foreign = write_cache(tmp_path / "foreign", tiny_qwen3_dir, num_rows=2)
    with pytest.raises(IdentityMismatchError, match="--source and --target must be caches of one initial"):
        compare(good, source=texts["source"], target=foreign)
    related = shutil.copytree(sweep["kl-1"], tmp_path / "related")
    (related / "anneal.json").write_text('{"identity": {"teacher": {"weights": "ffff"}}}')
    with pytest.raises(IdentityMismatchError, match="trained from ffff"):
        compare({**good, "related": related}, **texts)


def test_a_model_that_diverged_does_not_spoil_the_others(sweep, texts, tiny_llama_dir, tmp_path):
    broken = copy_model(tiny_llama_dir, tmp_path / "nan", lambda name, tensor: tensor * torch.nan)
    found = compare({"nan": broken, **sweep}, **texts, limit=1)
    assert "nan" not in found.front and found.front
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.plot(tmp_path / "p.png").is_file()


def test_the_second_stage_of_two_reads_caches_of_the_first(sweep, tiny_llama_dir, tmp_path):
    """A model that records its own initial model is the initial model of the next stage."""
    stage = shutil.copytree(sweep["kl-1"], tmp_path / "stage")
    (stage / "anneal.json").write_text('{"identity": {"teacher": {"weights": "ffff"}}}')
    cache = write_cache(tmp_path / "cache", stage, num_rows=2)
    found = compare({"next": sweep["kl-4"]}, source=cache, target=cache, initial={"stage": stage})
    kls = [model.results["source"]["kl"] for model in found.models]
    assert kls[0] < 1e-6 < kls[1]


def test_models_leave_the_memory_one_by_one(sweep, texts, monkeypatch):
    import weakref

    from trainer.evaluation import evaluate as evaluate_module

    alive: list = []
    load = evaluate_module.load_model

    def loading(*args, **options):
        assert not [reference for reference in alive if reference() is not None]
        model = load(*args, **options)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(evaluate_module, "load_model", loading)
    compare(sweep, **texts, limit=1)
    assert len(alive) == 2
