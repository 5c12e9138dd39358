"""vLLM's processes under `anneal bench`: one that is killed is said, and none outlives the command."""

import contextlib
import os
import signal

import pytest
from bench_tasks import TINY_BASE, write_forty
from process_tree import engine_processes, running_owner, wait_until_gone

from formats.engine.processes import processes_of
from formats.errors import ConfigError
from trainer import BenchSettings, bench_models
from trainer.bench import bench
from trainer.bench.backends import Backend, running_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

OWNER = """
import sys
from pathlib import Path
from trainer import BenchSettings
from trainer.bench.backends import Backend, running_model

if __name__ == "__main__":
    with running_model(Path(sys.argv[1]), Backend("vllm", "float32", ""), BenchSettings(tasks=("forty",))):
        print("ready", flush=True)
        sys.stdin.readline()
"""


def test_an_engine_that_is_killed_ends_the_task_in_one_line(tmp_path, monkeypatch) -> None:
    @contextlib.contextmanager
    def killed_at_its_first_step(*given):
        with running_model(*given) as model:
            engine = model.model.llm_engine
            real = engine.step

            def step():
                if processes_of(engine)[0].is_alive():
                    os.kill(processes_of(engine)[0].pid, signal.SIGKILL)
                return real()

            engine.step = step
            yield model

    monkeypatch.setattr(bench, "running_model", killed_at_its_first_step)
    folder = write_forty(tmp_path / "tasks")
    settings = BenchSettings(
        tasks=("forty",), task_dirs=(str(folder),), backend="vllm", dtype="float32", out=str(tmp_path / "out")
    )
    with pytest.raises(ConfigError, match="must keep running, but its process was ended by SIGKILL"):
        bench_models({"tiny": TINY_BASE}, settings)


def test_no_engine_outlives_a_command_that_is_killed(tmp_path) -> None:
    with running_owner(tmp_path / "owner.py", OWNER, str(TINY_BASE)) as owner:
        engine = engine_processes(owner.pid)
        assert engine, "an engine process, and on a CPU a worker"
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert wait_until_gone(engine, 60) == []


def test_an_engine_that_cannot_start_says_why(monkeypatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # it would win over the setting below
    settings = BenchSettings(tasks=("forty",), engine_args={"kv_cache_memory_bytes": 10})
    with (
        pytest.raises(ConfigError, match=r"must run .*, got ValueError: No available memory"),
        running_model(TINY_BASE, Backend("vllm", "float32", ""), settings),
    ):
        pass
