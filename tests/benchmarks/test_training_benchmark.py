"""The benchmark of the loss runs as printed, and its two sides compute the same loss."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "training.py"


@pytest.mark.slow
def test_loss_benchmark(tmp_path):
    """1,024 rows over 16,000 tokens: the dense side needs several tensors of 64 MiB, ours one chunk."""
    raw = tmp_path / "raw.json"
    command = [sys.executable, str(SCRIPT), "--only", "loss", "--rounds", "1", "--num-kept", "16"]
    command += ["--loss-vocab", "16000", "--loss-hidden", "32", "--loss-rows", "1024", "--dense-rows", "1024"]
    done = subprocess.run([*command, "--json", str(raw)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Peak memory at 1,024 rows, fused / dense" in done.stdout
    found = json.loads(raw.read_text())["loss"]
    assert found["bucket"]["loss"] == pytest.approx(found["dense"]["loss"], rel=1e-3)
    assert found["fused"]["peak_bytes"] < found["dense"]["peak_bytes"]
