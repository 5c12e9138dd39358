"""`compare`: numbers are `evaluate`'s, methods are read off directories, bad input refused."""

import json
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from caches import write_cache
from recorded_progress import RecordedProgress
from runs import copy_model, noise

from formats.errors import ConfigError, FormatError, IdentityMismatchError
from trainer import compare, evaluate, select
from trainer.comparison.compare import cell_of, find_direct
from trainer.comparison.metric import Metric
from trainer.comparison.reading import Reading
from trainer.evaluation.recorded_method import method_of


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


def test_every_number_is_that_of_evaluate(sweep, texts, tiny_llama_dir, tmp_path):
    seen = RecordedProgress()
    found = compare(sweep, **texts, initial={"base": tiny_llama_dir}, progress=seen, work=tmp_path)
    assert [model.label for model in found.models] == ["base", "kl-4", "kl-1"]
    expected = {name: evaluate(path, texts) for name, path in {"base": tiny_llama_dir, **sweep}.items()}
    for model in found.models:
        for side in ("source", "target"):
            cell = model.cells[f"{side}:{side}"]
            assert {key: cell.details[key] for key in expected[model.label][side]} == expected[model.label][
                side
            ]
            assert cell.value == pytest.approx(expected[model.label][side]["perplexity"], rel=1e-12)
    initial, moved = expected["base"]["source"], expected["kl-1"]["source"]
    assert initial["kl"] < 1e-6 < moved["kl"]
    assert found.points[2].label == "kl-1" and found.points[2].distance == moved["kl"]
    standing = found.standing("kl-1")
    assert standing.source_loss == pytest.approx(moved["perplexity"] / initial["perplexity"] - 1)
    assert standing.gains["source:source"] == pytest.approx(initial["ce"] - moved["ce"])
    assert seen.phases == [
        (f"{label}: {text}", 3, 3) for label in ("base", "kl-4", "kl-1") for text in ("source", "target")
    ]
    again = RecordedProgress()
    other = compare(
        {"kl-1": sweep["kl-1"]}, **texts, initial={"base": tiny_llama_dir}, progress=again, work=tmp_path
    )
    assert again.phases == [] and other.line("kl-1") == found.line("kl-1")
    limited = compare({"a": sweep["kl-1"]}, **texts, limit=1, work=tmp_path)
    details = limited.models[0].cells["source:source"].details
    alone = evaluate(sweep["kl-1"], texts, limit=1)["source"]
    assert {key: details[key] for key in alone} == alone
    assert limited.initial is None and limited.standing("a") is None


def test_a_killed_comparison_goes_on_where_it_was(sweep, texts, tiny_llama_dir, tmp_path):
    class Killed(RecordedProgress):
        def start(self, what, total, done=0, *, unit="row"):
            if what == "kl-4: target":
                raise KeyboardInterrupt
            super().start(what, total, done, unit=unit)

    known = {"initial": {"base": tiny_llama_dir}, "work": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        compare(sweep, **texts, **known, progress=Killed())
    again = RecordedProgress()
    found = compare(sweep, **texts, **known, progress=again)
    assert [what for what, *_ in again.phases] == ["kl-4: target", "kl-1: source", "kl-1: target"]
    assert (
        found.to_dict()
        == compare(sweep, **texts, initial={"base": tiny_llama_dir}, work=tmp_path / "x").to_dict()
    )


@pytest.mark.parametrize("when", ["kl-4: source", "kl-1: source", "kl-1: target"])
def test_a_model_that_is_replaced_meanwhile_is_refused_and_not_remembered(
    sweep, texts, tiny_llama_dir, tmp_path, when
):
    models = {label: shutil.copytree(path, tmp_path / label) for label, path in sweep.items()}
    other = copy_model(tiny_llama_dir, tmp_path / "other", noise(7, 0.5))

    class Replaces(RecordedProgress):
        def start(self, what, total, done=0, *, unit="row"):
            if what == when:
                shutil.copy(other / "model.safetensors", models["kl-1"])
            super().start(what, total, done, unit=unit)

    work = tmp_path / "work"
    with pytest.raises(
        IdentityMismatchError, match=r"must stay as it is while it is compared, got other weights in .*kl-1"
    ):
        compare(models, **texts, initial={"base": tiny_llama_dir}, progress=Replaces(), work=work)
    shutil.copy(sweep["kl-1"] / "model.safetensors", models["kl-1"])
    again = compare(models, **texts, initial={"base": tiny_llama_dir}, work=work)
    expected = evaluate(sweep["kl-1"], texts)
    for side in ("source", "target"):
        cell = again.line("kl-1").cells[f"{side}:{side}"]
        assert cell.value == pytest.approx(expected[side]["perplexity"], rel=1e-9)


def test_rows_add_up_and_give_the_interval(sweep, texts, tiny_llama_dir, tmp_path):
    """Sums over rows against the whole, and each row against an evaluation of that row alone."""
    whole = evaluate(sweep["kl-1"], texts, per_row=True)["source"]
    plain = evaluate(sweep["kl-1"], texts)["source"]
    assert {key: whole[key] for key in plain} == plain
    assert sum(whole["row_tokens"]) == plain["num_tokens"]
    assert sum(whole["row_ce"]) == pytest.approx(plain["ce"] * plain["num_tokens"], rel=1e-6)
    alone = evaluate(sweep["kl-1"], texts, per_row=True, limit=1)["source"]
    assert alone["row_ce"][0] == pytest.approx(whole["row_ce"][0], rel=1e-5)
    assert alone["ce"] * alone["num_tokens"] == pytest.approx(whole["row_ce"][0], rel=1e-5)
    found = compare(sweep, **texts, initial={"base": tiny_llama_dir}, work=tmp_path)
    difference = found.line("kl-1").cells["source:source"].difference
    assert difference.difference == pytest.approx(found.standing("kl-1").gains["source:source"], rel=1e-5)
    assert difference.interval[0] <= difference.difference <= difference.interval[1]
    assert difference.num_items == sum(tokens > 0 for tokens in whole["row_tokens"])


def test_seeds_are_one_line(sweep, texts, tiny_llama_dir, tmp_path):
    models = {}
    for seed in range(3):
        path = copy_model(tiny_llama_dir, tmp_path / f"direct-s{seed}", noise(seed, 0.3))
        models[path.name] = as_run(path, kl_coef=0, training={"seed": seed})
    found = compare({**sweep, **models}, **texts, initial={"base": tiny_llama_dir})
    assert [model.label for model in found.models] == ["base", "kl-4", "kl-1", "direct"]
    assert found.direct == "direct" and found.notes == ()
    line = found.line("direct-s1")
    assert line.label == "direct" and line.num_seeds == 3 and line.members == tuple(models)
    ces = np.array([evaluate(path, texts)["source"]["ce"] for path in models.values()])
    cell = line.cells["source:source"]
    assert cell.value == pytest.approx(math.exp(ces.mean()))
    assert cell.spread == pytest.approx(ces.std(ddof=1) * cell.value)
    assert line.point(found.metrics).spreads["source:source"] == pytest.approx(ces.std(ddof=1))
    assert found.standing("direct").forgetting_avoided == pytest.approx(0)
    assert "direct (3 seeds)" in found.text() and " +-" in found.text()
    apart = compare({**sweep, **models}, **texts, initial={"base": tiny_llama_dir}, group=False)
    assert [model.num_seeds for model in apart.models] == [1] * 6 and apart.direct is None
    assert "direct-s0, direct-s1, direct-s2 all say so" in apart.notes[0]
    named = compare(models, **texts, initial={"base": tiny_llama_dir}, direct="direct-s2", group=False)
    assert named.direct == "direct-s2"
    chosen = select(found, "paper")
    assert chosen.direct == "direct" and chosen.noise is not None


def test_several_texts_of_a_side(sweep, texts, tiny_llama_dir, tmp_path):
    other = write_cache(tmp_path / "other", tiny_llama_dir, num_rows=3, seed=9)
    found = compare(
        sweep,
        source={"first": texts["source"], "second": other},
        target=[texts["target"]],
        initial={"base": tiny_llama_dir},
        direct="kl-1",
    )
    assert [metric.key for metric in found.metrics] == ["source:first", "source:second", "target:target"]
    standing = found.standing("kl-4")
    initial, moved = (evaluate(path, [other])["other"] for path in (tiny_llama_dir, sweep["kl-4"]))
    assert standing.losses["source:second"] == pytest.approx(moved["perplexity"] / initial["perplexity"] - 1)
    assert standing.source_loss == pytest.approx(sum(standing.losses.values()) / 2)
    found.page(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("<figure") == 3  # the whole, and two pairs


def test_no_text_is_lost_by_what_it_is_called(sweep, texts):
    sides = {
        "source": {"target text": texts["source"], "text": texts["target"]},
        "target": {"text": texts["target"]},
    }
    seen = RecordedProgress()
    found = compare({"a": sweep["kl-4"]}, **sides, limit=2, progress=seen)
    assert [metric.key for metric in found.metrics] == ["source:target text", "source:text", "target:text"]
    values = {key: cell.value for key, cell in found.models[0].cells.items()}
    assert values["source:target text"] != values["source:text"] == values["target:text"]
    assert len(seen.phases) == len(set(seen.phases)) == 2  # one text is read once


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kl_coef": 0}, "direct fine-tuning"),
        ({"kl_coef": 1, "kl_on": "target"}, "label annealing kl_coef 1 + kl_on target"),
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
        ({"kl_coef": 1, "fake_quantize": "int4:32"}, "label annealing kl_coef 1 + fake_quantize int4:32"),
        (
            {"kl_coef": 1, "caches": [{"path": "old", "loss": "ce", "weight": 0.1}]},
            "label annealing kl_coef 1 + replay weight 0.1",
        ),
    ],
)
def test_methods_of_runs(tmp_path, settings, expected):
    method = method_of(as_run(tmp_path, **settings))
    assert method is not None and method.text() == expected


def test_shares_relate_to_an_adapter_only_where_nothing_else_is_direct_and_say_so(tmp_path):
    runs = {
        "plain": as_run(tmp_path / "plain", kl_coef=0),
        "adapter": as_run(tmp_path / "adapter", kl_coef=0, lora={"r": 16}),
        "annealed": as_run(tmp_path / "annealed", kl_coef=1),
    }
    groups = {label: [label] for label in runs}
    assert find_direct(None, groups, runs, None) == ("plain", [])
    del groups["plain"]
    assert find_direct(None, groups, runs, None) == ("adapter", ["shares relate to adapter: LoRA r 16"])


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
    monkeypatch.setattr("trainer.comparison.text_readings.evaluate", None)
    good = {"kl-1": sweep["kl-1"]}
    with pytest.raises(ConfigError, match="at least one model"):
        compare({}, **texts)
    with pytest.raises(ConfigError, match="different labels, got 'kl-1'"):
        compare(good, **texts, initial={"kl-1": tiny_llama_dir})
    with pytest.raises(ConfigError, match=r"^MODEL must be a model directory"):
        compare({**good, "gone": tmp_path / "gone"}, **texts)
    with pytest.raises(FormatError, match="gone"):
        compare(good, source=texts["source"], target=tmp_path / "gone")
    with pytest.raises(ConfigError, match="--direct must be one of the models, got 'kl-9'"):
        compare(good, **texts, direct="kl-9")
    with pytest.raises(ConfigError, match="--target must have different names, got 'target' twice"):
        compare(good, source=texts["source"], target=[texts["target"], texts["target"]])
    with pytest.raises(ConfigError, match="--source needs at least one cache or task"):
        compare(good, source=[], target=texts["target"])
    with pytest.raises(FormatError, match=r"got no bench.json in .*kl-1; run anneal bench"):
        compare(good, source="piqa", target=texts["target"])
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


def test_direct_fine_tuning_that_diverged_leaves_a_table(sweep, texts, tiny_llama_dir, tmp_path):
    broken = as_run(
        copy_model(tiny_llama_dir, tmp_path / "nan", lambda name, tensor: tensor * torch.nan), kl_coef=0
    )
    options = {**texts, "initial": {"base": tiny_llama_dir}, "limit": 1}
    found = compare({"plain": broken, **sweep}, **options)
    assert found.direct is None and "plain has diverged; name another one with --direct" in found.text()
    json.dumps(found.to_dict(), allow_nan=False)
    with pytest.raises(ConfigError, match="direct fine-tuning must have finite values"):
        compare({"plain": broken, **sweep}, **options, direct="plain").text()


def test_a_seed_that_diverged_leaves_the_spread_unknown():
    metric = Metric(side="source", name="s", kind="text", measure="perplexity", higher_is_better=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cell = cell_of(metric, [Reading(value=value) for value in (10.0, 11.0, math.inf)], None)
    assert cell.value == math.inf and cell.spread is None


def test_the_second_stage_of_two_reads_caches_of_the_first(sweep, tiny_llama_dir, tmp_path):
    """A model that records its own initial model is the initial model of the next stage."""
    stage = shutil.copytree(sweep["kl-1"], tmp_path / "stage")
    (stage / "anneal.json").write_text('{"identity": {"teacher": {"weights": "ffff"}}}')
    cache = write_cache(tmp_path / "cache", stage, num_rows=2)
    found = compare(
        {"next": sweep["kl-4"]}, source=cache, target=cache, initial={"stage": stage}, work=tmp_path
    )
    kls = [found.kl_on_target(model) for model in found.models]
    assert kls[0] < 1e-6 < kls[1]


def test_models_leave_the_memory_one_by_one(sweep, texts, monkeypatch, tmp_path):
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
    compare(sweep, **texts, limit=1, work=tmp_path)
    assert len(alive) == 2
