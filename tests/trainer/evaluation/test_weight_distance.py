"""Distances of weights: against all tensors at once in float64, and what merges and averages make of them."""

import json
import math
import shutil

import pytest
import torch
from caches import write_cache
from runs import copy_model, noise, settings
from safetensors.torch import load_file
from typer.testing import CliRunner

import cli
from formats.errors import ConfigError
from trainer import MergeConfig, merge, train, weight_distance
from trainer.result import weight_distance as sums


@pytest.fixture(scope="module")
def tuned(tiny_llama_dir, tmp_path_factory):
    return copy_model(tiny_llama_dir, tmp_path_factory.mktemp("distance") / "tuned", noise(0))


def by_hand(model, initial) -> tuple[float, float]:
    theta, theta0 = (load_file(path / "model.safetensors") for path in (model, initial))
    flat = [torch.cat([part[name].double().reshape(-1) for name in theta0]) for part in (theta, theta0)]
    return float((flat[0] - flat[1]).norm()), float(flat[1].norm())


def test_equals_all_tensors_at_once(tuned, tiny_llama_dir, monkeypatch, tmp_path):
    absolute, norm = by_hand(tuned, tiny_llama_dir)
    for size in (sums.SLICE, 7919):
        monkeypatch.setattr(sums, "SLICE", size)
        found = weight_distance(tuned, tiny_llama_dir)
        assert found.absolute == pytest.approx(absolute, rel=1e-12)
        assert found.relative == pytest.approx(absolute / norm, rel=1e-12)
    assert weight_distance(tuned, tuned).absolute == 0.0
    sharded = copy_model(tuned, tmp_path / "sharded", max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert weight_distance(sharded, tiny_llama_dir).absolute == pytest.approx(absolute, rel=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_wise_ft_has_alpha_times_the_distance(tuned, tiny_llama_dir, tmp_path, alpha):
    out = tmp_path / "merged"
    config = MergeConfig(
        tuned=[str(tuned)], initial=str(tiny_llama_dir), out=str(out), method="wise-ft", alpha=alpha
    )
    merge(config)
    found = weight_distance(out, tiny_llama_dir)
    assert found.absolute == pytest.approx(
        alpha * weight_distance(tuned, tiny_llama_dir).absolute, rel=1e-6, abs=1e-9
    )
    assert json.loads((out / "anneal.json").read_text())["distance"] == found.to_dict()


def test_sfa_of_one_period_has_what_beta_leaves_of_the_direct_distance(
    tiny_llama_dir, tmp_path, tmp_path_factory
):
    cache = write_cache(tmp_path / "cache", tiny_llama_dir, num_rows=8)
    for name, more in (("direct", ()), ("sfa", ("sfa.beta=0.3", "sfa.period=1"))):
        train(settings(cache, tiny_llama_dir, tmp_path / name, "kl_coef=0", *more))
    direct, sfa = (weight_distance(tmp_path / name, tiny_llama_dir) for name in ("direct", "sfa"))
    assert direct.absolute > 0.1
    assert sfa.absolute == pytest.approx(0.7 * direct.absolute, rel=1e-6)
    for name, found in (("direct", direct), ("sfa", sfa)):
        assert json.loads((tmp_path / name / "anneal.json").read_text())["distance"] == found.to_dict()


def test_what_has_no_distance_is_refused(tuned, tiny_llama_dir, tiny_qwen3_dir, tmp_path):
    with pytest.raises(ConfigError, match="must have the"):
        weight_distance(tiny_qwen3_dir, tiny_llama_dir)
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"whole models.*lora.merge"):
        weight_distance(tmp_path / "adapters", tiny_llama_dir)
    with pytest.raises(ConfigError, match=r"--distance-to must be a model directory.*got '/nowhere'"):
        weight_distance(tuned, "/nowhere", what="--distance-to")


def test_zero_weights_have_no_relative_distance(tuned, tiny_llama_dir, tmp_path):
    zero = copy_model(tiny_llama_dir, tmp_path / "zero", lambda name, tensor: 0 * tensor)
    found = weight_distance(tuned, zero)
    assert found.relative is None and math.isfinite(found.absolute) and "%" not in found.line()


def test_eval_shows_the_distance_when_asked(tuned, tiny_llama_dir, tmp_path):
    shutil.copytree(tiny_llama_dir, tmp_path / "base")
    cache = write_cache(tmp_path / "cache", tmp_path / "base", num_rows=2)
    command = ["eval", str(cache), "--model", str(tuned)]
    found = weight_distance(tuned, tiny_llama_dir)
    asked = CliRunner().invoke(cli.app, [*command, "--distance-to", str(tmp_path / "base")])
    assert asked.exit_code == 0, asked.output
    assert f"distance of the weights to {tmp_path / 'base'}: {found.line()}" in asked.stdout
    assert "KL to base" in asked.stdout and "calibration error" in asked.stdout
    silent = CliRunner().invoke(cli.app, [*command, "--no-kl", "--json"])
    (result,) = json.loads(silent.stdout)["caches"].values()
    assert "distance" not in json.loads(silent.stdout)
    assert result["kl"] is None and 0 < result["entropy"] < 7 and result["num_known"] == 0
