"""A default that a command shows is the one of the setting that it sets: typed there, or told in the help."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, get_args

import pytest

from cache_builder import BuildConfig, GenerationConfig, estimate_cache, verify_cache
from commands.bench import bench_command
from commands.cache_build import cache_build, cache_estimate
from commands.cache_tools import cache_verify
from commands.chain import chain_command
from commands.compare import compare_command, select_command
from commands.evaluate import eval_command
from commands.merge import merge_command
from commands.restore import restore_command
from commands.sweep import sweep_command
from commands.train import train_command
from trainer import BenchSettings, TrainConfig, compare, evaluate, select
from trainer.chain.config import ChainConfig
from trainer.merging.fisher import ROWS
from trainer.merging.settings import DEFAULTS
from trainer.restore.config import RestoreConfig
from trainer.sweep.config import SweepConfig

TOLD = re.compile(r"\[default: ([^ ,\]]+)\]")
RENAMED = {"tail_draws": "draw_rate", "generate_temperature": "temperature"}

OF_MERGING = {name: value for found in DEFAULTS.values() for name, value in found.items()} | {
    "fisher_rows": ROWS
}
"""Rows are the default of texts: they are not recorded where a merge has none."""


def defaults_of(home: Callable[..., Any] | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(home, Mapping):
        return dict(home)
    return {name: found.default for name, found in inspect.signature(home).parameters.items()}


def shown_by(command: Callable[..., Any]) -> dict[str, str]:
    """Option -> its default as text, for those that show one word."""
    found = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if parameter.default is not inspect.Parameter.empty and parameter.default is not None:
            found[name] = str(parameter.default)
        elif told := TOLD.search(str(getattr(get_args(parameter.annotation)[-1], "help", ""))):
            found[name] = told[1]
    return found


@pytest.mark.parametrize(
    ("command", "home", "least"),
    [
        (bench_command, BenchSettings, 5),
        (cache_build, BuildConfig, 7),
        (cache_build, GenerationConfig, 1),
        (cache_estimate, BuildConfig, 6),
        (cache_estimate, estimate_cache, 3),
        (cache_verify, verify_cache, 2),
        (chain_command, ChainConfig, 3),
        (compare_command, compare, 1),
        (select_command, select, 1),
        (eval_command, evaluate, 2),
        (merge_command, OF_MERGING, 5),
        (restore_command, RestoreConfig, 2),
        (sweep_command, SweepConfig, 4),
        (train_command, TrainConfig, 3),
    ],
)
def test_a_default_stands_where_its_setting_is(command, home, least):
    theirs = defaults_of(home)
    shown = {RENAMED.get(name, name): text for name, text in shown_by(command).items()}
    both = {
        name: text for name, text in shown.items() if theirs.get(name) not in (None, inspect.Parameter.empty)
    }
    assert len(both) >= least, both
    for name, text in both.items():
        home_text = str(theirs[name])
        same = text == home_text or (text.replace(".", "").isdigit() and float(text) == theirs[name])
        assert same, f"{name}: {text} is shown, {home_text} holds"
