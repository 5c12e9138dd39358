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


SENT_AT_A_FILE = """
import os, signal, sys
import cli
name, sent = sys.argv.pop(1), []
def opened(event, arguments):
    if event == "open" and name in str(arguments[0]) and not sent:
        sent.append(True)
        os.kill(os.getpid(), signal.SIGTERM)
sys.addaudithook(opened)
cli.main()
"""
"""`anneal`, which a SIGTERM meets when it opens the first file whose path holds a name."""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (".x.parquet.", ["cache", "export", "{cache}", "--parquet", "{out}/x.parquet"]),
        (
            ".m.merge.staging/README.md",
            ["merge", "{model}", "--initial", "{model}", "--method", "wise-ft", "--out", "{out}/m"],
        ),
        (
            ".json.",
            [
                *("compare", "{model}", "--source", "{cache}", "--target", "again={cache}"),
                "--work",
                "{out}/w",
            ],
        ),
    ],
    ids=["export", "merge", "compare"],
)
def test_sigterm_leaves_nothing_half_written(
    name: str, words: list[str], cache: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    known = {"cache": cache, "model": tiny_llama_dir, "out": tmp_path}
    command = [sys.executable, "-c", SENT_AT_A_FILE, name, *(word.format(**known) for word in words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 143, done.stderr
    assert done.stderr.splitlines()[-1].startswith("interrupted: nothing is left half-written")
    assert "Traceback" not in done.stderr
    left = [path.name for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]
    assert left == []


SENT_AT_THE_START = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
number, what, sent = int(sys.argv.pop(1)), sys.argv.pop(1), []
def seen(frame, event, argument):
    name = f"{frame.f_code.co_filename}:{frame.f_code.co_name}"
    if event == "call" and not sent and name.endswith(what):
        sent.append(True)
        os.kill(os.getpid(), number)
sys.setprofile(seen)
import cli
cli.main()
"""
"""`anneal`, which a signal meets when it calls the first function whose file and name end so."""


@pytest.mark.parametrize(
    ("number", "what"),
    [
        (signal.SIGINT, "commands/merge.py:<module>"),
        (signal.SIGINT, "typer/main.py:get_command"),
        (signal.SIGTERM, "typer/main.py:get_command"),
        (signal.SIGINT, ":parse_args"),
        (signal.SIGTERM, ":parse_args"),
    ],
)
def test_a_signal_at_the_very_start_is_one_line(number: int, what: str, tmp_path: Path) -> None:
    words = ["merge", str(tmp_path), "--initial", str(tmp_path), "--method", "wise-ft", "--out", "x"]
    command = [sys.executable, "-c", SENT_AT_THE_START, str(int(number)), what, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (
        done.stderr
        == "interrupted: nothing is left half-written; the same command goes on, or starts again\n"
    )
    assert done.returncode == 128 + number
