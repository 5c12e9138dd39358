"""The engine's processes: gone after close, and gone after their owner was killed outright."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from process_tree import engine_processes, running_owner, wait_until_gone

from cache_builder import TeacherConfig, VLLMTeacher
from cache_builder.teachers.protocol import TeacherError
from formats.disk.token_row import TokenRow
from formats.engine.processes import processes_of

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

OWNER = """
import sys, time
from cache_builder import TeacherConfig, VLLMTeacher

def main():
    teacher = VLLMTeacher(TeacherConfig(model=sys.argv[1], max_length=64))
    print("ready", flush=True)
    sys.stdin.readline()
    teacher.close()
    teacher.close()
    print("closed", flush=True)
    sys.stdin.readline()

if __name__ == "__main__":
    main()
"""


EARLY = """
import multiprocessing, os, time
from cache_builder.teachers.vllm_plugin import end_with_parent
from formats.engine.environment import PARENT_VARIABLE

def late(owner):
    while os.getppid() == owner:
        time.sleep(0.05)
    end_with_parent()
    time.sleep(600)

if __name__ == "__main__":
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    process = multiprocessing.get_context("spawn").Process(target=late, args=(os.getpid(),))
    process.start()
    print(process.pid, flush=True)
    process.join()
"""


@pytest.fixture
def owner(tiny_llama_dir, tmp_path):
    with running_owner(tmp_path / "owner.py", OWNER, str(tiny_llama_dir)) as process:
        yield process


def test_close_ends_the_engine(owner):
    engine = engine_processes(owner.pid)
    assert engine, "an engine process, and on a CPU a worker"
    print(file=owner.stdin, flush=True)
    assert owner.stdout.readline() == "closed\n"
    assert wait_until_gone(engine, 30) == []


def test_an_engine_does_not_outlive_a_killed_owner(owner):
    engine = engine_processes(owner.pid)
    assert engine, "an engine process, and on a CPU a worker"
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert wait_until_gone(engine, 60) == []


def test_a_process_whose_owner_was_killed_before_it_loads_the_plugin_ends_too(tmp_path):
    script = tmp_path / "owner.py"
    script.write_text(EARLY)
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    left = wait_until_gone([child], 60)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def test_an_engine_that_is_killed_is_an_error_and_no_wait_for_ever(tiny_llama_dir):
    teacher = VLLMTeacher(TeacherConfig(model=str(tiny_llama_dir), max_length=64))
    rows = [TokenRow(np.arange(3, 40), np.arange(37) > 0) for _ in range(4)]
    try:
        assert len(list(teacher.prefill(rows))) == 4
        results = teacher.prefill(rows * 500)
        next(results)
        os.kill(processes_of(teacher._engine)[0].pid, signal.SIGKILL)
        with pytest.raises(TeacherError, match="ended by SIGKILL, as the system does where memory runs out"):
            list(results)
    finally:
        teacher.close()


def test_an_engine_that_fails_says_why(tiny_llama_dir, monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # it would win over the setting below
    config = TeacherConfig(
        model=str(tiny_llama_dir), max_length=64, engine_args={"kv_cache_memory_bytes": 10}
    )
    with pytest.raises(TeacherError, match="engine must start, got: ValueError: No available memory"):
        VLLMTeacher(config)
