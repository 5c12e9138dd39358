"""The ladder of pretraining: schedules that end at zero, restarts that change nothing, and what is read off it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import overtraining
import overtraining_ladder as ladder
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]

SCALE = ladder.Scale(tokens=(512, 1024), vocab_size=280, width=32, layers=1, context=16, batch=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of a ladder, text and tokenizer included."""
    folder = tmp_path_factory.mktemp("ladder")
    tokenizer = ladder.train_tokenizer(["the cat sat on the mat and that was that " * 20], SCALE.recipe)
    tokenizer.save_pretrained(folder / "tokenizer")
    np.save(folder / "TOKENS.npy", np.random.default_rng(0).integers(0, 280, 16 * 50, dtype=np.uint16))
    return folder


def test_every_rate_ends_at_zero() -> None:
    for num_steps in (20, 61, 1000):
        rates = [ladder.rate_of(step, num_steps) for step in range(num_steps + 1)]
        warmup = num_steps // 20
        assert rates[:warmup] == pytest.approx([(n + 1) / warmup for n in range(warmup)])
        assert rates[warmup:] == sorted(rates[warmup:], reverse=True) and rates[warmup] == 1
        assert rates[-1] == pytest.approx(0, abs=1e-12)
        assert rates[-2] < (math.pi / num_steps) ** 2


def test_longer_runs_begin_with_the_windows_of_shorter_ones(folder) -> None:
    tokens, _ = ladder.prepare(folder, SCALE)
    short = list(ladder.windows(tokens, SCALE, 0, 20))
    long = list(ladder.windows(tokens, SCALE, 0, 60))
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=False))
    assert all(
        torch.equal(a, b) for a, b in zip(ladder.windows(tokens, SCALE, 27, 60), long[27:], strict=True)
    )
    table = sorted(map(tuple, tokens.reshape(50, 16).tolist()))
    for number in (0, 1):  # 25 steps are a pass over 50 windows
        read = torch.cat(long[25 * number : 25 * number + 25])
        assert sorted(map(tuple, read.tolist())) == table
    assert not torch.equal(torch.cat(long[:25]), torch.cat(long[25:50]))


def test_a_run_that_was_stopped_ends_with_the_same_weights(folder, tmp_path) -> None:
    whole = ladder.pretrain(folder, 1024, SCALE)
    again = tmp_path / "again"
    (again / "tokenizer").mkdir(parents=True)
    for file in ("TOKENS.npy", *(f"tokenizer/{path.name}" for path in (folder / "tokenizer").iterdir())):
        (again / file).write_bytes((folder / file).read_bytes())
    assert ladder.pretrain(again, 1024, SCALE, stop_after=10) is None
    assert ladder.pretrain(again, 1024, SCALE, stop_after=9) is None
    continued = ladder.pretrain(again, 1024, SCALE)
    assert continued is not None and whole is not None
    weights, others = (load_file(path / "model.safetensors") for path in (whole, continued))
    assert weights.keys() == others.keys() and all(torch.equal(weights[k], others[k]) for k in weights)
    assert [path.name for path in (again / "models").iterdir()] == ["1.024K"]
    before = (continued / "model.safetensors").stat().st_mtime_ns
    ladder.pretrain(again, 1024, SCALE)
    assert (continued / "model.safetensors").stat().st_mtime_ns == before


def test_what_is_read_off_a_ladder() -> None:
    assert overtraining.turn_of([5.0, 4.0, 3.0]) is None
    assert overtraining.turn_of([5.0, 3.0, 4.0, 3.5]) == 1
    assert overtraining.rises_of([1.0, 2.0, 1.5, 1.5, 3.0]) == "2 of 4"
    points = [(0.0, 3.0), (0.2, 3.1), (0.4, 3.5), (0.3, 4.0)]
    assert overtraining.at_equal_learning(points, 0.3) == pytest.approx(3.3)
    assert overtraining.at_equal_learning(points, 0.2) == pytest.approx(3.1)
    assert overtraining.at_equal_learning(points, 0.41) is None
    assert overtraining.at_equal_learning([(0.0, 3.0), (-0.1, 3.2)], -0.05) is None, "nothing is learnt"


def test_lengths_of_a_ladder() -> None:
    assert overtraining.tokens_of("0.25:1") == (250_000, 500_000, 1_000_000)
    assert [ladder.name_of(n) for n in (250_000, 1_000_000, 64_000_000)] == ["250K", "1M", "64M"]
    for wrong in ("1", "2:1", "1:1", "0:1", "a:b"):
        with pytest.raises(ValueError):
            overtraining.tokens_of(wrong)


@pytest.mark.slow
def test_quick_ladder(tmp_path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/overtraining.py"), "--scale", "quick", "--out"]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["labels"] == ["8.192K", "16.384K"]
    assert len(found["tuned"]["runs"]) == 2 * len(overtraining.RATES) * len(overtraining.KL_COEFS)
    for label in found["labels"]:
        costs = [point["delta_ce"] for point in found["noise"][label]]
        assert costs == sorted(costs) and costs[0] > 0
    assert "turns at" in done.stdout and (tmp_path / "out/overtraining.png").read_bytes()[1:4] == b"PNG"
    again = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True)
    assert again.returncode == 0 and done.stdout.endswith(again.stdout)
    other = subprocess.run(
        [*command, str(tmp_path / "out"), "--scale", "small"], capture_output=True, text=True
    )
    assert other.returncode == 2 and "holds a ladder of another scale" in other.stderr
