"""Noise on weights: closed forms of the output head and of a quadratic, exact zeros, weights that come back."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import copy_model, noise
from torch import nn

from formats.cache import TeacherCache
from formats.errors import ConfigError
from trainer import evaluate
from trainer.probe.loaded_model import LoadedModel
from trainer.probe.models import named_models
from trainer.probe.noise import (
    NoiseCurve,
    NoisePoint,
    noise_curves,
    noise_like,
    perturbed,
    probe_noise,
    spreads,
)
from trainer.probe.noise_report import NoiseReport

GOLDEN = json.loads((Path(__file__).parents[2] / "golden_theory/head_trace.json").read_text())


@pytest.fixture(scope="module")
def loaded(tiny_llama_dir, llama_eval_cache) -> LoadedModel:
    return LoadedModel(tiny_llama_dir, {"held": str(llama_eval_cache)})


def head_trace(loaded: LoadedModel, cache_path: Path) -> float:
    """mean |h|^2 (1 - sum p^2) over the tokens that carry loss, in float64, with transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(loaded.model.name_or_path, dtype=torch.float64)
    total, count = 0.0, 0
    for row in TeacherCache(cache_path):
        ids = torch.as_tensor(row.input_ids[None].astype(np.int64))
        with torch.no_grad():
            hidden = model.model(input_ids=ids).last_hidden_state[0]
            p = torch.softmax(model.lm_head(hidden), -1)
        at = torch.as_tensor(np.flatnonzero(row.loss_mask) - 1)
        total += float((hidden[at].square().sum(-1) * (1 - p[at].square().sum(-1))).sum())
        count += len(at)
    return total / count


def test_golden_head() -> None:
    """The formula, and that another program's measurements agree with it: 0.07640 predicted, 0.07635 measured."""
    for row in GOLDEN["rows"]:
        predicted = 0.5 * (row["gamma"] * GOLDEN["sigma"]) ** 2 * GOLDEN["trace"]
        assert predicted == pytest.approx(row["predicted"], rel=1e-12)
        assert abs(row["measured"] - predicted) < 3 * row["se"]


def test_noise_on_the_output_head_costs_what_its_closed_form_says(loaded, llama_eval_cache) -> None:
    sigmas = spreads(loaded.model, only="lm_head")
    assert list(sigmas) == ["lm_head.weight"]
    (sigma,) = sigmas.values()
    assert sigma == loaded.model.config.initializer_range
    trace = head_trace(loaded, llama_eval_cache)
    gammas = [0.01, 0.1, 1.0]
    curve = noise_curves(loaded, sigmas, gammas=gammas, draws=12)["held"]
    for point in curve.points:
        predicted = 0.5 * (point.gamma * sigma) ** 2 * trace
        assert abs(point.delta_ce - predicted) < 3 * point.stderr + 2e-6, (
            point
        )  # float32 sums differ by some 1e-7
    assert curve.points[1].stderr < 0.2 * curve.points[1].delta_ce, "the check can fail"
    assert curve.points[2].delta_ce / curve.points[1].delta_ce == pytest.approx(100, rel=0.15)


def test_proposition_d1_on_a_quadratic() -> None:
    """E[L(theta + s e) - L] = 1/2 s^2 Tr H; with both signs the gradient has no part in it."""
    generator = np.random.default_rng(0)
    A = generator.normal(size=(6, 6))
    H, g = A @ A.T, generator.normal(size=6) * 10
    model = nn.Linear(6, 1, bias=False, dtype=torch.float64)

    def loss() -> float:
        x = model.weight.detach().numpy()[0]
        return float(0.5 * x @ H @ x + g @ x)

    base, deltas = loss(), []
    for draw in range(4000):
        pair = []
        for sign in (1.0, -1.0):
            with perturbed(model, {"weight": 0.3}, sign * 0.5, 0, draw):
                pair.append(loss())
        deltas.append(sum(pair) / 2 - base)
    error = np.std(deltas) / math.sqrt(len(deltas))
    assert abs(np.mean(deltas) - 0.5 * 0.15**2 * np.trace(H)) < 3 * error
    assert loss() == base


def test_no_noise_costs_exactly_nothing(loaded) -> None:
    curve = noise_curves(loaded, spreads(loaded.model), gammas=[0.0, 0.1], draws=2)["held"]
    assert curve.points[0].delta_ce == 0.0 and curve.points[0].stderr == 0.0
    assert curve.points[1].delta_ce != 0.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_come_back_bit_for_bit(tiny_llama_dir, llama_eval_cache, dtype) -> None:
    loaded = LoadedModel(tiny_llama_dir, {"held": str(llama_eval_cache)}, dtype=dtype, limit=2)
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    sigmas = spreads(loaded.model)
    with pytest.raises(RuntimeError, match="in the middle"), perturbed(loaded.model, sigmas, 0.5, 0, 0):
        moved = [n for n, p in loaded.model.named_parameters() if not torch.equal(p, before[n])]
        assert sorted(moved) == sorted(sigmas)
        raise RuntimeError("in the middle")
    for name, p in loaded.model.named_parameters():
        assert p.dtype == before[name].dtype and torch.equal(p, before[name]), name


def test_draws_are_the_same_by_seed(loaded) -> None:
    weight = loaded.model.lm_head.weight
    first = noise_like(weight, "a", 0, 0)
    assert torch.equal(first, noise_like(weight, "a", 0, 0))
    for other in (("b", 0, 0), ("a", 1, 0), ("a", 0, 1)):
        assert not torch.equal(first, noise_like(weight, *other))
    sigmas = spreads(loaded.model)
    one, two = (noise_curves(loaded, sigmas, gammas=[0.2], draws=2, seed=s)["held"].points[0] for s in (3, 3))
    assert one == two


def test_spreads(loaded, tiny_llama_dir, tmp_path) -> None:
    plain = spreads(loaded.model)
    assert all("norm" not in name for name in plain) and len(set(plain.values())) == 1
    untrained = copy_model(tiny_llama_dir, tmp_path / "init", lambda name, t: 3 * t if t.ndim > 1 else t)
    found = spreads(loaded.model, initial=untrained)
    for name, parameter in loaded.model.named_parameters():
        if name in found:
            assert found[name] == pytest.approx(
                3 * float(parameter.detach().double().std(correction=0)), rel=1e-6
            )
    assert all("norm" not in name for name in found), "gains that start at one have no spread"
    for options, message in (
        ({"only": "("}, "--only must be a regular"),
        ({"only": "nothing"}, "got none matching"),
    ):
        with pytest.raises(ConfigError, match=message):
            spreads(loaded.model, **options)


def curve_of(*pairs: tuple[float, float]) -> NoiseCurve:
    points = [NoisePoint(gamma=g, delta_ce=d, stderr=0.0, perplexity=1.0) for g, d in pairs]
    return NoiseCurve(ce=1.0, points=points)


def test_the_quadratic_and_where_it_breaks() -> None:
    curve = curve_of((0.1, 0.03), (0.2, 0.12), (0.4, 0.48), (0.8, 3.0))
    assert curve.curvature == pytest.approx(3.0) and curve.breaks_at == 0.8
    assert curve_of((0.1, 0.03), (0.2, 0.12)).breaks_at is None
    assert curve_of((0.0, 0.0)).curvature is None


def test_a_model_that_has_diverged_is_not_the_best() -> None:
    curves = {
        label: {"held": NoiseCurve(ce=ce, points=curve_of((0.1, 0.2)).points)}
        for label, ce in (("broken", math.nan), ("good", 3.0), ("worse", 4.0))
    }
    assert NoiseReport(curves=curves, draws=1).best("held") == {0.1: "good"}


def test_measuring_is_that_of_eval(loaded, tiny_llama_dir, llama_eval_cache) -> None:
    found = evaluate(tiny_llama_dir, {"held": llama_eval_cache}, kl=False)["held"]
    assert loaded.ce()["held"] == found["ce"]


def test_labels(tmp_path) -> None:
    words = ["a/b", "x=a/b@main", "c/d@step1000", "./dir"]
    assert named_models(words) == {
        "b": ("a/b", None), "x": ("a/b", "main"), "step1000": ("c/d", "step1000"), "dir": ("./dir", None)
    }  # fmt: skip
    with pytest.raises(ConfigError, match="different labels, got 'b' twice"):
        named_models(["a/b", "c/b"])
    with pytest.raises(ConfigError, match=r"got main of the directory .* \(MODEL\); remove it"):
        named_models([f"x={tmp_path}@main"])


def test_adapters_alone_are_refused(tiny_llama_dir, llama_eval_cache, tmp_path) -> None:
    """Noise on their factors is not noise on the weights."""
    (tmp_path / "adapter_config.json").write_text("{}")
    texts, asked = {"held": str(llama_eval_cache)}, {"gammas": [0.1], "draws": 1}
    line = f"must be a whole model, got adapters alone in {tmp_path}; train with lora.merge: true"
    with pytest.raises(ConfigError, match=f"^MODEL {line}"):
        probe_noise({"base": tiny_llama_dir, "tuned": tmp_path}, texts, **asked)
    with pytest.raises(ConfigError, match=f"^--init {line}"):
        probe_noise({"base": tiny_llama_dir}, texts, initial=tmp_path, **asked)


def test_the_command(anneal, tiny_llama_dir, llama_eval_cache, tmp_path) -> None:
    others = [copy_model(tiny_llama_dir, tmp_path / f"m{n}", noise(n, 0.05)) for n in (1, 2)]
    words = [
        "probe",
        "noise",
        tiny_llama_dir,
        *others,
        "--source",
        f"held={llama_eval_cache}",
        "--gamma",
        "0.1:0.4",
    ]
    code, out, err = anneal(*words, "--draws", 2, "--limit", 3, "--plot", tmp_path / "n.png")
    assert code == 0, err
    assert all(word in out for word in ("gamma 0.1", "gamma 0.4", "breaks at", "held: ", "pairs"))
    assert (tmp_path / "n.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = anneal(*words, "--draws", 2, "--limit", 3, "--json")
    found = json.loads(out)
    assert [model["label"] for model in found["models"]] == [tiny_llama_dir.name, "m1", "m2"] and len(
        found["best"]["held"]
    ) == 3
    for bad, message in (
        (["--gamma", "x"], "--gamma takes A:B"),
        (["--gamma=-1"], "strengths of at least 0"),
        (["--gamma", "0.1:inf"], "--gamma takes A:B"),
        (["--gamma", "0.1,0.2,0.1"], "--gamma must name each strength once"),
    ):
        code, out, err = anneal(*words, *bad)
        assert (code, out) == (1, "") and message in err and err.count("\n") == 1
