"""The control of the board, `examples/real/two_models.py`, against the same run from a cache."""

import sys

import pytest
import torch
import two_models
from runs import settings
from safetensors.torch import load_file

from trainer import train


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_cache_of_everything_trains_what_two_models_train(
    llama_cache, tiny_llama_dir, tmp_path, monkeypatch, temperature
):
    overrides = (
        "training.max_steps=4",
        "training.logging_steps=1",
        f"temperature={temperature}",
        "kl_coef=2",
    )
    cached = tmp_path / "cached"
    ours = train(settings(llama_cache, tiny_llama_dir, cached, *overrides))
    reports = []

    def noted(config, **options):
        reports.append(train(config, **options))
        return reports[0]

    monkeypatch.setattr(two_models, "train", noted)
    monkeypatch.setattr(sys, "argv", ["two_models.py", str(cached), "--out", str(tmp_path / "live")])
    two_models.main()
    steps = [[entry for entry in report.log_history if "ce" in entry] for report in (ours, *reports)]
    assert len(steps[0]) == len(steps[1]) == 4
    for mine, theirs in zip(*steps, strict=True):
        assert mine["ce"] == pytest.approx(theirs["ce"], rel=1e-4)
        assert mine["kl"] == pytest.approx(theirs["kl"], rel=2e-2, abs=1e-6)
    initial = load_file(tiny_llama_dir / "model.safetensors")
    moved = [load_file(tmp_path / name / "model.safetensors") for name in ("cached", "live")]
    way = [torch.cat([(m[k] - initial[k]).double().flatten() for k in initial]) for m in moved]
    assert way[1].norm() > 0
    assert (way[0] - way[1]).norm() < 0.02 * way[1].norm()


def test_other_objectives_are_refused_by_name(llama_cache, tiny_llama_dir, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    train(settings(llama_cache, tiny_llama_dir, run, "kl_direction=reverse", "training.max_steps=1"))
    monkeypatch.setattr(sys, "argv", ["two_models.py", str(run), "--out", str(tmp_path / "live")])
    with pytest.raises(SystemExit) as stopped:
        two_models.main()
    assert stopped.value.code == 2 and not (tmp_path / "live").exists()
    assert "must be plain label annealing, got {'kl_direction': 'reverse'}" in capsys.readouterr().err
