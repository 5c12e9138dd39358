"""The processes below one of ours, read from /proc, and whether they are still there."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Process ids below `pid`, from /proc."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    found, frontier = [], {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier}
        found += sorted(frontier)
    return found


def alive(pids: list[int]) -> list[int]:
    def running(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    return [pid for pid in pids if running(pid)]


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.2)
    return alive(pids)


def engine_processes(pid: int) -> list[int]:
    """Those descendants that hold the engine; Python's resource tracker ends by itself, later."""
    kept = []
    for child in descendants(pid):
        command = Path(f"/proc/{child}/cmdline").read_bytes()
        if b"resource_tracker" not in command:
            kept.append(child)
    return kept


@contextlib.contextmanager
def running_owner(script: Path, program: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A program that owns an engine, once it has printed `ready`; nothing of it is left behind the block."""
    script.write_text(program)
    owner = subprocess.Popen(
        [sys.executable, str(script), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    started: list[int] = []
    try:
        assert owner.stdout is not None and owner.stdout.readline() == "ready\n"
        started = descendants(owner.pid)
        yield owner
    finally:
        for pid in alive([*started, *descendants(owner.pid)]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        owner.kill()
        owner.wait()
