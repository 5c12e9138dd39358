"""A command that a signal ends says how far it came and exits with the signal's code."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("number", "exit_code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_a_stopped_build_is_one_line_and_goes_on(
    number: int, exit_code: int, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"Row {n} of many. " * 60}) + "\n" for n in range(3000)))
    words = ["cache", "build", corpus, "--model", tiny_llama_dir, "--out", tmp_path / "cache"]
    command = [sys.executable, "-m", "cli", *map(str, words), "--engine", "transformers"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("capture: "):
            break
    process.send_signal(number)
    _, message = process.communicate(timeout=300)
    assert process.returncode == exit_code, message
    last = message.strip().splitlines()[-1]
    assert re.fullmatch(
        r"interrupted: \d+ of \d+ shards are on the disk; run the same command again to go on", last
    )
    assert "Traceback" not in message and not (tmp_path / "cache" / "manifest.json").exists()
