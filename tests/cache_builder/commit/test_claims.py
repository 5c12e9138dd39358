"""Claims: one holder, taken over from the dead and the silent, never by comparing clocks."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cache_builder.commit.claims import (
    STALE_HEARTBEATS,
    Claims,
    died_here,
    live_local_owner,
    read_claim,
    this_process,
)


class Clock:
    """A monotonic clock that the test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def foreign(directory: Path, name: str, counter: int = 0, owner: str = "other machine") -> None:
    """A claim as another machine would leave it."""
    content = {
        "owner": owner,
        "counter": counter,
        "process": {"boot": "elsewhere", "namespace": "x", "pid": 1},
    }
    (directory / f"{name}.claim").write_text(json.dumps(content))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "claims"


def test_one_of_two_gets_it_and_the_other_after_release(directory: Path) -> None:
    with Claims(directory) as first, Claims(directory) as second:
        assert first.acquire("a") and not second.acquire("a") and second.acquire("b")
        assert first.acquire("a")  # again is fine
        first.release("a")
        assert second.acquire("a")
        first.release("a")  # not ours any more: must not free it
        assert not first.acquire("a")
    assert os.listdir(directory) == []


def test_many_threads_one_winner(directory: Path) -> None:
    workers = [Claims(directory) for _ in range(8)]
    for worker in workers:
        worker.__enter__()
    for round_number in range(20):
        barrier = threading.Barrier(8)
        won: list[Claims] = []

        def race(worker: Claims, name: str, barrier: threading.Barrier, won: list) -> None:
            barrier.wait()
            if worker.acquire(name):
                won.append(worker)

        threads = [
            threading.Thread(target=race, args=(worker, f"r{round_number}", barrier, won))
            for worker in workers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
    for worker in workers:
        worker.__exit__()


def test_a_silent_owner_is_overtaken_after_the_observers_own_interval(directory: Path) -> None:
    clock = Clock()
    with Claims(directory, 1.0, clock=clock) as claims:
        foreign(directory, "a")
        assert not claims.acquire("a")
        clock.now += STALE_HEARTBEATS - 0.1
        assert not claims.acquire("a")
        clock.now += 0.2
        assert claims.acquire("a")
        assert read_claim(directory / "a.claim")["owner"] == claims.owner


def test_a_renewed_claim_is_respected_for_ever(directory: Path) -> None:
    clock = Clock()
    with Claims(directory, 1.0, clock=clock) as claims:
        for counter in range(50):
            foreign(directory, "a", counter)
            assert not claims.acquire("a")
            clock.now += STALE_HEARTBEATS - 1


def test_file_times_mean_nothing(directory: Path) -> None:
    with Claims(directory, 1.0, clock=Clock()) as claims:
        for seconds in (0, 2**31, -(2**31)):
            foreign(directory, "a")
            os.utime(directory / "a.claim", (seconds, seconds))
            assert not claims.acquire("a")


@pytest.mark.parametrize("junk", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_torn_claim_goes_stale_like_any_other(directory: Path, junk: bytes) -> None:
    clock = Clock()
    with Claims(directory, 1.0, clock=clock) as claims:
        (directory / "a.claim").write_bytes(junk)
        assert not claims.acquire("a")
        clock.now += STALE_HEARTBEATS + 1
        assert claims.acquire("a")


def test_a_dead_process_of_this_machine_is_overtaken_at_once(directory: Path) -> None:
    script = (
        "import sys, os; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from cache_builder.commit.claims import Claims\n"
        "claims = Claims(Path(sys.argv[2])); claims.__enter__(); assert claims.acquire('a')\n"
        "print('held', flush=True); os.kill(os.getpid(), 9)"
    )
    root = str(Path(__file__).resolve().parents[3])
    result = subprocess.run(
        [sys.executable, "-c", script, root, str(directory)], capture_output=True, text=True
    )
    assert result.returncode == -9 and "held" in result.stdout
    with Claims(directory) as claims:
        assert claims.acquire("a")


def test_who_counts_as_dead() -> None:
    me = this_process()
    assert me and not died_here({"process": me})
    assert died_here({"process": {**me, "pid": 2**22 + 1}})
    assert died_here({"process": {**me, "started": me["started"] + 1}})  # the number was given out again
    assert not died_here({"process": {**me, "boot": "another", "pid": 2**22 + 1}})
    assert not died_here({"process": {**me, "namespace": "container", "pid": 2**22 + 1}})
    assert not died_here({}) and not died_here({"process": {}})


def test_the_heartbeat_renews_and_respects_a_takeover(directory: Path) -> None:
    with Claims(directory, 0.02) as claims:
        assert claims.acquire("a")
        before = read_claim(directory / "a.claim")["counter"]
        deadline = time.monotonic() + 20
        while read_claim(directory / "a.claim")["counter"] < before + 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        foreign(directory, "a", owner="thief")
        time.sleep(0.2)
        assert read_claim(directory / "a.claim")["owner"] == "thief"
        claims.release("a")
        assert read_claim(directory / "a.claim")["owner"] == "thief"


def test_a_file_system_without_hard_links(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*args: object, **kwargs: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    with Claims(directory) as first, Claims(directory) as second:
        assert first.acquire("a") and not second.acquire("a")


def test_a_live_local_owner_is_found(directory: Path) -> None:
    with Claims(directory) as claims:
        claims.acquire("a")
        assert live_local_owner(directory) is None  # ourselves
        child = subprocess.Popen(["sleep", "60"])
        try:
            stat = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            process = {**this_process(), "pid": child.pid, "started": int(stat[19])}
            (directory / "b.claim").write_text(json.dumps({"owner": "x", "counter": 0, "process": process}))
            assert live_local_owner(directory) == child.pid
        finally:
            child.kill()
            child.wait()
        assert live_local_owner(directory) is None
