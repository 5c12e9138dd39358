"""What examples/real/board.py asks of `anneal`, and that one run without a result does not end it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trainer.sweep.config import sweep_from_options

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "real"))

import board


@pytest.mark.parametrize(
    ("protocol", "scale", "dtype"),
    [
        *((protocol, "gpu", "bfloat16") for protocol in board.PROTOCOLS),
        ("maths", "cpu", "float32"),
        ("abstracts", "cpu", "float32"),
    ],
)
def test_a_scale_decides_steps_and_the_dtype_of_evaluation(protocol, scale, dtype, tmp_path):
    commands = []

    def noted(command, cwd, **options):
        commands.append(command)
        (cwd / command[command.index("--out") + 1]).mkdir()
        (cwd / command[command.index("--out") + 1] / "sweep.json").write_text("{}")
        return subprocess.CompletedProcess(command, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(board.subprocess, "run", noted)
        board.Board(tmp_path, scale).sweep(protocol)
    asked = sweep_from_options(str(tmp_path / f"{protocol}.yaml"), out=str(tmp_path / "out"))
    assert asked.eval_dtype == dtype
    assert (
        yaml.safe_load((tmp_path / f"{protocol}.yaml").read_text())["base"]["training"]["max_steps"]
        == (board.TRAINING[scale]["max_steps"])
    )
    assert len(commands) == 1


@pytest.mark.parametrize("finished", (True, False))
def test_a_run_without_a_result_does_not_end_the_board(finished, tmp_path, monkeypatch):
    table = tmp_path / "maths" / "sweep.json"
    table.parent.mkdir()
    table.write_text("of an earlier call")

    def failing(command, **options):
        if finished:
            table.write_text("{}")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(board.subprocess, "run", failing)
    made = board.Board(tmp_path, "gpu")
    if finished:
        made.sweep("maths")
        assert made.incomplete == ["maths"] and (tmp_path / "maths.json").read_text() == "{}"
    else:
        with pytest.raises(SystemExit, match="exit code 1"):
            made.sweep("maths")


def test_models_that_share_a_card_are_scored_without_taking_all_of_it(tmp_path, monkeypatch):
    for name in ("direct,lr=1e-4", "kl_coef=1,lr=1e-4"):
        (tmp_path / "maths" / "runs" / name).mkdir(parents=True)
    (tmp_path / "maths" / "merges").mkdir()
    commands = []

    def noted(command, **options):
        commands.append(command[3:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(board.subprocess, "run", noted)
    board.Board(tmp_path, "gpu").score(10)
    *scored, compared = commands
    assert len(scored) == 3 and compared[0] == "compare"
    for words in scored:
        assert words[words.index("--backend") + 1] == "transformers" and "--batch-size" in words
