"""Killed, starved and raced builds end with the bytes of an undisturbed one. `benchmarks/faults.py` runs many
more."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deterministic_build import contents
from fault_trials import run_apart

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /proc")


def require_clean(result: dict[str, Any], at_least: int) -> None:
    assert result["trials"] >= at_least, result
    bad = {name: result[name] for name in ("rows_lost", "rows_doubled", "files_different", "unclean")}
    assert not any(bad.values()), result["details"]


@pytest.mark.parametrize("threads", [1, 3])
def test_killed_at_every_step_of_the_protocol(threads: int) -> None:
    result = run_apart("every step", threads=threads)
    require_clean(result, at_least=30)


@pytest.mark.slow
def test_killed_at_random_moments() -> None:
    result = run_apart("random kills", num_kills=15)
    require_clean(result, at_least=5)
    assert result["killed"] >= 15


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_at_random_moments(number: int) -> None:
    require_clean(run_apart("random kills", num_kills=4, number=number, threads=3), at_least=2)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 3])
def test_operations_that_fail(threads: int) -> None:
    result = run_apart("failing calls", stride=9, codes=(errno.ENOSPC,), threads=threads)
    require_clean(result, at_least=15)
    assert {"failed write", "failed fsync", "failed replace", "failed link"} <= set(result)


def test_eight_writers_at_once() -> None:
    require_clean(run_apart("concurrent writers", num_trials=2), at_least=2)


def test_writers_that_die_beside_others() -> None:
    require_clean(run_apart("concurrent writers", num_trials=2, kill=4, seed=1), at_least=2)


def test_clocks_that_jump() -> None:
    require_clean(run_apart("jumping clock"), at_least=2)


def test_full_disk() -> None:
    require_clean(run_apart("full disk"), at_least=3)


ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import os, sys, time
sys.path[:0] = [{root!r}, {root!r} + "/tests/helpers"]
from pathlib import Path
from deterministic_build import SeededTeacher, make_config, make_source
from cache_builder.build import build_cache
from cache_builder.commit.signals import BuildInterrupted

def step(name):
    os.write(1, (name + "\\n").encode())  # one call: two threads come by here, and print() writes the end apart
    if name == "claimed 3" and {stop}:
        for _ in range(6000):  # the signal ends it; one that comes just before a long sleep is heard after it
            time.sleep(0.1)

try:
    build_cache(
        make_config(Path({out!r})), source=make_source(60),
        make_teacher=lambda config, source: SeededTeacher(),
        step=step,
    )
except BuildInterrupted as stop:
    print(stop, file=sys.stderr)
    sys.exit(stop.exit_code)
"""


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_build_says_so_and_resumes(tmp_path: Path, number: int, exit_code: int) -> None:
    script = SCRIPT.format(root=str(ROOT), out=str(tmp_path / "c"), stop=True)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "claimed 3":  # shard 2 was handed over: it must be committed, shard 3 dropped
            break
    process.send_signal(number)
    _, message = process.communicate()
    assert process.returncode == exit_code
    assert message.strip().splitlines()[-1] == (
        "interrupted: 3 of 6 shards are on the disk; run the same command again to go on"
    )
    assert sorted(p.name for p in (tmp_path / "c").glob("shard-*")) == [
        f"shard-{i:05d}.arrow" for i in range(3)
    ]
    assert not list((tmp_path / "c" / "_build" / "partial").iterdir())
    assert not list((tmp_path / "c" / "_build" / "claims").iterdir())

    def run(out: Path) -> None:
        subprocess.run(
            [sys.executable, "-c", SCRIPT.format(root=str(ROOT), out=str(out), stop=False)],
            check=True,
            capture_output=True,
        )

    run(tmp_path / "c")
    run(tmp_path / "fresh")
    assert contents(tmp_path / "c") == contents(tmp_path / "fresh")


MEMORY = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests/helpers"]
from dataclasses import replace
from pathlib import Path
import numpy as np
from deterministic_build import SeededTeacher, make_config, make_source
from cache_builder.commit import shard_committer
from cache_builder.build import build_cache

shard_committer.QUEUE_BYTES = 1 << 20  # this teacher outruns any writer

class Flat(SeededTeacher):
    def prefill(self, rows):
        rows = list(rows)
        first = list(super().prefill(rows[:1]))[0]
        for row in rows:
            topk = first.take([0] * len(row.positions("loss")))
            labels = np.full(len(topk), -9.0, np.float32)
            positions, entries = topk.kept_labels(row.label_ids("loss"))
            labels[positions] = topk.logprobs[entries]
            yield replace(topk, label_logprobs=labels)

build_cache(
    make_config(Path({out!r})), source=make_source({num_rows}, rows_per_shard=50),
    make_teacher=lambda config, source: Flat(),
)
peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(peak[0].split()[1])
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:

    def peak_kilobytes(num_rows: int) -> int:
        script = MEMORY.format(root=str(ROOT), out=str(tmp_path / str(num_rows)), num_rows=num_rows)
        result = subprocess.run(
            [sys.executable, "-c", script],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"},
        )
        return int(result.stdout.split()[-1])

    short, long = peak_kilobytes(300), peak_kilobytes(3000)
    # Ten times the rows may cost what the plan keeps per shard, not what the rows hold.
    assert long - short < 3_000, (short, long)
