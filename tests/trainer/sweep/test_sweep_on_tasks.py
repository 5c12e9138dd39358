"""A sweep whose target is a task: what it reads are the results of its own settings."""

from dataclasses import replace
from pathlib import Path

import pytest
from bench_tasks import write_forty
from caches import write_cache
from pool_here import InThisProcess
from runs import QUICK

from formats.errors import ConfigError
from trainer.sweep.compared import bench_settings
from trainer.sweep.config import SweepConfig, sweep_from_options
from trainer.sweep.sweep import run_sweep

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def ask(llama_cache, tiny_llama_dir, tmp_path_factory):
    """A sweep of direct fine-tuning alone on the task `forty`, with these settings of the benchmark."""
    folder = tmp_path_factory.mktemp("tasks")
    source = str(write_cache(folder / "source", tiny_llama_dir, num_rows=3))
    common = ["backend=transformers", "dtype=float32", f"task_dirs={write_forty(folder / 'forty')}"]

    def asked(out: Path, *bench: str, target: str = "forty") -> SweepConfig:
        return sweep_from_options(
            str(llama_cache),
            model=str(tiny_llama_dir),
            out=str(out),
            overrides=QUICK,
            source={"source": source},
            target={"task": target},
            bench=[*common, *bench],
        )

    return asked


def test_the_results_of_a_sweep_are_those_of_its_own_settings(ask, tmp_path):
    for bench, items, shots in (
        (["limit=12"], 12, 0),
        (["limit=8"], 8, 0),
        (["limit=8", "num_fewshot=1"], 8, 1),
    ):
        report = run_sweep(ask(tmp_path / "out", *bench), pool=InThisProcess())
        details = report.comparison.line("direct").cells["target:task"].details
        assert (details["num_items"], details["settings"]["num_fewshot"]) == (items, shots)


def test_shots_of_a_word_are_the_benchmarks(ask, tmp_path):
    assert bench_settings(ask(tmp_path, target="forty:2:acc")).tasks == ("forty:2",)
    twice = replace(ask(tmp_path, target="forty:2"), source={"source": "forty:1"})
    with pytest.raises(ConfigError, match="a task is run in one way per command"):
        bench_settings(twice)
