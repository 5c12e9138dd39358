"""Claims: which worker is busy with which shard, in a directory that several machines share.

A claim is a file made exclusively, holding its owner's random name and a counter that the owner's heartbeat
thread raises. Clocks are never compared: an observer takes a claim over when its contents have not changed
for `stale_after` seconds *of the observer's own monotonic clock*, or at once when it was made on this machine
by a process that is gone.

Claims only save work. Two workers that both believe to hold a shard both capture it, and `commit_exclusive`
lets one of them win; so a lost race, a paused machine or a slow network file system can never harm a cache.
"""

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cache_builder.commit.signals import shielded
from formats.disk.durable import TEMPORARY_SUFFIX

STALE_HEARTBEATS = 12
"""Heartbeats that may be missed: network file systems show a file up to a minute late."""


def this_process() -> dict[str, Any]:
    """What identifies a process on its machine for as long as the machine runs; empty where /proc is
    missing."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"boot": boot, "namespace": os.readlink("/proc/self/ns/pid"), **_process(os.getpid())}
    except (OSError, ValueError, IndexError):
        return {}


def _process(pid: int) -> dict[str, int]:
    # Field 22 of /proc/PID/stat, counted after the command name, is the start time: pids are reused, pairs
    # are not.
    stat = Path(f"/proc/{pid}/stat").read_text()
    return {"pid": pid, "started": int(stat.rpartition(")")[2].split()[19])}


def died_here(claim: dict[str, Any]) -> bool:
    """Whether the claim's owner was a process of this machine (and namespace) that no longer exists."""
    owner, me = claim.get("process") or {}, this_process()
    if not me or any(owner.get(key) != me[key] for key in ("boot", "namespace")):
        return False
    try:
        state = Path(f"/proc/{owner['pid']}/stat").read_text().rpartition(")")[2].split()[0]
        return _process(owner["pid"])["started"] != owner["started"] or state in "ZX"
    except FileNotFoundError:
        return True
    except (OSError, ValueError, KeyError, IndexError):
        return False


def live_local_owner(directory: Path) -> int | None:
    """Process id of another live process of this machine that holds a claim in `directory`, if there is
    one."""
    me = this_process()
    for path in directory.glob("*.claim"):
        claim = read_claim(path) or {}
        owner = claim.get("process") or {}
        here = bool(me) and all(owner.get(key) == me[key] for key in ("boot", "namespace"))
        if here and owner.get("pid") != me["pid"] and not died_here(claim):
            return int(owner["pid"])
    return None


def is_worked_on(directory: Path) -> bool:
    """Whether `directory` holds a claim of a process that may be alive, here or on another machine."""
    claims = (read_claim(path) for path in directory.glob("*.claim"))
    return any(claim is not None and not died_here(claim) for claim in claims)


def read_claim(path: Path) -> dict[str, Any] | None:
    """The claim; None when it vanished; empty when it is torn (it then goes stale like any other)."""
    try:
        content = json.loads(path.read_bytes())
        return content if isinstance(content, dict) else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}


class Claims:
    """The claims of one worker. Use as a context manager: the heartbeat thread runs inside."""

    def __init__(
        self, directory: Path, heartbeat_seconds: float = 10.0, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.owner = uuid.uuid4().hex
        self._directory = directory
        self._heartbeat = heartbeat_seconds
        self._stale_after = STALE_HEARTBEATS * heartbeat_seconds
        self._clock = clock
        self._counter = 0
        self._held: set[str] = set()
        self._seen: dict[str, tuple[Any, float]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="anneal-claims", daemon=True)

    def __enter__(self) -> "Claims":
        self._directory.mkdir(exist_ok=True)  # not its parents: a finished build must not come back to life
        with shielded():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with shielded():
            self._stop.set()
            self._thread.join()
            for name in list(self._held):
                self.release(name)

    def acquire(self, name: str) -> bool:
        """Try to claim `name`; True when it is ours now. Never waits."""
        path = self._path(name)
        with shielded(), self._lock:
            if name in self._held:
                return True
            try:
                self._write(path, exclusive=True)
            except FileExistsError:
                claim = read_claim(path)
                if claim is not None and not (died_here(claim) or self._is_stale(name, claim)):
                    return False
                # Two observers may both take over; the file shows the last of them, and the other gives way.
                self._write(path, exclusive=False)
                if (read_claim(path) or {}).get("owner") != self.owner:
                    return False
            self._held.add(name)
            self._seen.pop(name, None)
            return True

    def release(self, name: str) -> None:
        """Give the claim up; harmless when it was taken over."""
        with shielded(), self._lock:
            self._held.discard(name)
            path = self._path(name)
            if (read_claim(path) or {}).get("owner") == self.owner:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.claim"

    def _is_stale(self, name: str, claim: dict[str, Any]) -> bool:
        state, now = (claim.get("owner"), claim.get("counter")), self._clock()
        before = self._seen.get(name)
        if before is None or before[0] != state:
            self._seen[name] = (state, now)
            return False
        return now - before[1] > self._stale_after

    def _write(self, path: Path, *, exclusive: bool) -> None:
        # Not flushed to the disk: after a power cut all owners are gone anyway.
        content = {"owner": self.owner, "counter": self._counter, "process": this_process()}
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY_SUFFIX}")
        temporary.write_text(json.dumps(content))
        try:
            if not exclusive:
                os.replace(temporary, path)
                return
            try:
                os.link(temporary, path)
            except FileExistsError:
                raise
            except OSError:  # no hard links on this file system
                with open(path, "x") as file:
                    file.write(json.dumps(content))
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat):
            with self._lock:
                self._counter += 1
                for name in list(self._held):
                    path = self._path(name)
                    # A claim that cannot be renewed goes stale, which costs work and nothing else.
                    with contextlib.suppress(OSError):
                        if (read_claim(path) or {}).get("owner") == self.owner:
                            self._write(path, exclusive=False)
