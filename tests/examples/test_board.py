"""`examples/real/board.py`: what it names is there, what it asks of `anneal`, and that a run without a result does not
end it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import board
import draw_distance
import pytest
import yaml

from trainer.sweep.config import SweepConfig, sweep_from_dict, sweep_from_options
from trainer.sweep.merges import plan_merges
from trainer.sweep.plan import plan_runs

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / "examples" / "real"

PROTOCOLS = (*board.PROTOCOLS, "maths_cpu", "methods_cpu", "methods_low_rate_cpu", "abstracts_cpu")


def protocol(name: str) -> SweepConfig:
    plan = yaml.safe_load((REAL / f"{name}.yaml").read_text())
    return sweep_from_dict({**plan, "out": "out"})


def strings(value: Any) -> set[str]:
    """Every text inside nested lists and mappings."""
    if isinstance(value, dict):
        return set().union(*map(strings, value.values()))
    if isinstance(value, list):
        return set().union(*map(strings, value))
    return {value} if isinstance(value, str) else set()


def test_the_tasks_that_it_scores_have_files() -> None:
    wanted = [board.LEARNT, *board.KEPT.values()]
    assert [name for name in wanted if not (REAL / "tasks" / f"{name}.yaml").is_file()] == []


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_cache_of_a_protocol_is_built_by_the_board(name: str) -> None:
    scale = "cpu" if name.endswith("_cpu") else "gpu"
    built = {f"caches/{cache}" for cache in (*board.ROWS[scale], *board.OWN_TEXT[scale])}
    plan = yaml.safe_load((REAL / f"{name}.yaml").read_text())
    named = {text for text in strings(plan) if text.startswith("caches/")}
    assert len(named) >= 4 and named <= built


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_merge_of_a_protocol_has_its_runs(name: str) -> None:
    config = protocol(name)
    runs = plan_runs(config)
    assert runs and len(plan_merges(config, runs)) >= len(config.merges)


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name.endswith("_cpu")])
def test_a_protocol_names_the_section_that_shows_it(name: str) -> None:
    comment = (REAL / f"{name}.yaml").read_text().partition("base:")[0].replace("\n# ", " ")
    (section,) = re.findall(r'docs/results\.md shows under "(.+?)"', comment)
    assert f"\n## {section}\n" in (ROOT / "docs" / "results.md").read_text()


def test_runs_that_are_scored_or_repeated_are_in_a_protocol() -> None:
    names = [run.name for protocol_name in ("maths", "methods") for run in plan_runs(protocol(protocol_name))]
    plain = {re.sub(r",(lr|seed)=[^+,]*", "", name) for name in names}
    assert set(board.SCORED) <= plain, plain
    assert any(board.CACHED.fullmatch(name) for name in names)


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
    training = yaml.safe_load((tmp_path / f"{protocol}.yaml").read_text())["base"]["training"]
    steps = -1 if protocol == "epochs" else board.TRAINING[scale]["max_steps"]
    assert training["max_steps"] == steps and ("num_train_epochs" in training) == (protocol == "epochs")
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


def test_the_board_draws_what_a_sweep_wrote(tmp_path):
    """Runs that differ in strength are joined, and the mean distance over the source texts is what is shown."""
    names = (
        "direct,lr=1e-4",
        "kl_coef=4,lr=1e-4",
        "kl_coef=1,lr=1e-4",
        "direct,lr=1e-4+wise-ft,alpha=0.5",
        "odd",
    )
    models = [
        {
            "label": name,
            "gain_kept": 0.9,
            "source": {"news": {"kl": 0.1 * number}, "chat": {"kl": 0.3 * number}},
        }
        for number, name in enumerate(("model", *names))
    ]
    sweep = {"comparison": {"initial": "model", "models": models}}
    found, families = draw_distance.points(sweep)
    assert found["initial model"]["source"] == 0.0 and found["direct fine-tuning"]["source"] == pytest.approx(
        0.2
    )
    assert families["label annealing, kl_coef"] == [
        "label annealing, kl_coef 1",
        "label annealing, kl_coef 4",
    ]
    assert "odd" in found and len(found) == len(models)
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    command = [sys.executable, draw_distance.__file__, tmp_path / "sweep.json", tmp_path / "picture.svg"]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (tmp_path / "picture.svg").read_text().startswith("<?xml")
