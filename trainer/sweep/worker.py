"""A piece of a sweep's work in a process of its own: settings come in as a line of JSON on stdin, the outcome goes out
on stdout.

The process is stopped by SIGTERM as `anneal train` is, and stops in the same way when stdin ends: then the sweep that
started it is gone, and nobody would read the outcome. What the run says goes to stderr.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from formats.disk.durable import locked
from formats.errors import AnnealError, one_line
from formats.interruption import raise_on_sigterm
from formats.quiet import quiet_imports

LOCKED_SECONDS = 600.0
"""How long a run waits for another process in its directory: one whose sweep was killed stops after its step."""


def run_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train with these settings; what became of it, as plain values.

    Returns:
        `{"done": true}`, `{"interrupted": SIGNAL}`, or `{"error": LINE, "kind": CLASS}`.
    """
    from trainer.config_file import config_from_dict
    from trainer.run import train

    wait_for_lock(Path(settings["out"]))
    try:
        report = train(config_from_dict(settings))
    except (AnnealError, OSError, RuntimeError, MemoryError, ImportError) as error:
        return {"error": one_line(error, None), "kind": type(error).__name__}
    return {"interrupted": report.interrupted_by} if report.interrupted_by else {"done": True}


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Merge and measure a share of the models."""
    from trainer.sweep.shares import measure_share

    return measure_share(settings)


WORKS = {"train": run_settings, "measure": measure}
"""What a process can be told to do."""


def wait_for_lock(directory: Path) -> None:
    """Wait until no other process trains in a run's directory, or the time is over."""
    until = time.monotonic() + LOCKED_SECONDS
    while directory.is_dir() and time.monotonic() < until:
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            if locked(descriptor):
                return
        finally:
            os.close(descriptor)
        time.sleep(0.5)


def stop_when_stdin_ends() -> None:
    """Send this process a SIGTERM when the one that started it is gone."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def read_line() -> str:
    """The first line on stdin, and nothing beyond it."""
    found = bytearray()
    while (letter := os.read(0, 1)) not in (b"", b"\n"):
        found += letter
    return found.decode()


def take_stdout() -> TextIO:
    """Where the outcome goes: whatever libraries print on stdout goes to stderr from here on."""
    outcome = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    quiet_imports()
    return outcome


def main() -> None:
    """Entry point of the process."""
    outcome = take_stdout()
    order = json.loads(read_line())
    stop_when_stdin_ends()
    raise_on_sigterm()  # before a run has its first step, and after its last one
    try:
        found = WORKS[order["work"]](order["settings"])
    except KeyboardInterrupt:
        found = {"interrupted": "SIGTERM"}
    print(json.dumps(found), file=outcome, flush=True)
    if "error" in found:
        print(f"error: {found['error']}", file=sys.stderr, flush=True)
