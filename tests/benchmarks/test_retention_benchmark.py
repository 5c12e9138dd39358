"""The comparison of retention methods runs as printed, and its table and picture hold every method."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("direct", "LoRA", "L2", "EWC", "SFA", "replay", "label annealing", "label annealing + replay")
MERGED = ("WiSE-FT", "task arithmetic", "TIES")


@pytest.mark.slow
def test_quick_comparison(tmp_path):
    out = tmp_path / "retention"
    command = [sys.executable, str(ROOT / "benchmarks" / "retention.py"), "--quick"]
    command += ["--engine", "transformers", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "results.json").read_text())["models"]
    table = done.stdout.split("| method |")[1]
    for family in (*FAMILIES, *MERGED):
        rows = [entry for entry in found.values() if entry["family"] == family]
        assert rows and f"| {family} | " in table
        # Every model has moved, and none is lost.
        assert all(1e-6 < row["source"]["kl"] < 1 for row in rows), family
    assert found["initial"]["source"]["kl"] < 1e-3
    assert "Pareto front" in done.stdout and "need not carry over to a large one" in done.stdout
    assert (out / "retention.png").read_bytes().startswith(b"\x89PNG")
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "cat.jpg").touch()
    refused = subprocess.run([*command[:-1], str(stranger)], capture_output=True, text=True)
    assert refused.returncode == 2 and "--out must be new" in refused.stderr
