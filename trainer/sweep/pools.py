"""Processes that train the runs of a sweep and measure its models: one after another, or several at a time.

Every run has a process of its own: memory of one run is gone when the next one starts, a run that the system kills
takes nothing with it, and the first lines of the run are the same as those of `anneal train`.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

HOME = Path(__file__).resolve().parents[2]
"""Where the packages are, for the path of the processes."""
PROGRAM = "from trainer.sweep.worker import main; main()"
ENDED = "Process"
"""Kind of the outcome of a process that ended without one."""
Outcome = dict[str, Any]
"""As `worker.run_settings` returns it."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run for a pool."""

    name: str
    settings: Mapping[str, Any]
    """Of `anneal train`, with `out`; or what `work` takes."""
    log: Path
    """The file to which the run's own lines are added."""
    work: str = "train"
    """What the process does: a key of `worker.WORKS`."""


class Pool(Protocol):
    """Something that runs jobs."""

    @property
    def parallel(self) -> int:
        """How many at a time."""

    def run(
        self, jobs: Sequence[Job], started: Callable[[Job], None], ended: Callable[[Job, Outcome], None]
    ) -> None:
        """Run all jobs; both functions are called in this thread."""

    def stop(self) -> None:
        """Have what runs saved and end; may be called from a signal's handler."""

    def kill(self) -> None:
        """End what runs at once."""


def start_process(program: str, environment: Mapping[str, str], **options: Any) -> subprocess.Popen[Any]:
    """Python with this program, in a session of its own: Ctrl-C reaches its parent alone, which passes it on once.

    Args:
        program: source text; it finds our packages.
        environment: added to that of this process.
        options: further ones of `subprocess.Popen`.
    """
    path = os.pathsep.join(filter(None, [str(HOME), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-P", "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **environment, "PYTHONPATH": path},
        start_new_session=True,
        **options,
    )


class Process:
    """One run in a process of its own."""

    def __init__(self, job: Job, environment: Mapping[str, str], directory: str | None = None) -> None:
        self._job = job
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with open(job.log, "ab") as log:
            self._process = start_process(PROGRAM, environment, stderr=log, cwd=directory)

    def wait(self) -> Outcome:
        """What became of the run."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            order = {"work": self._job.work, "settings": dict(self._job.settings)}
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        text = process.stdout.read().decode(errors="replace").strip()
        code = process.wait()
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        if text:
            found: Outcome = json.loads(text.splitlines()[-1])
            return found
        what = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return {"error": f"the run's process ended with {what}; see {self._job.log}", "kind": ENDED}

    def send(self, number: int) -> None:
        """A signal, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)


class LocalPool:
    """Processes on this machine.

    Args:
        parallel: runs at a time, each with one of the GPUs, if there are any. From two on, the threads of the CPU are
            divided between them.
    """

    def __init__(self, parallel: int = 1) -> None:
        self.parallel = parallel
        self._running: set[Process] = set()
        self._stopping = threading.Event()

    def run(
        self, jobs: Sequence[Job], started: Callable[[Job], None], ended: Callable[[Job, Outcome], None]
    ) -> None:
        slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(self.parallel):
            slots.put(slot)
        begun: SimpleQueue[Job] = SimpleQueue()

        def work(job: Job) -> Outcome | None:
            if self._stopping.is_set():
                return None
            slot = slots.get()
            try:
                begun.put(job)
                process = Process(job, self.environment(slot))
                self._running.add(process)
                if self._stopping.is_set():
                    process.send(signal.SIGTERM)
                try:
                    return process.wait()
                finally:
                    self._running.discard(process)
            finally:
                slots.put(slot)

        with ThreadPoolExecutor(self.parallel) as threads:
            waiting: dict[Future[Outcome | None], Job] = {threads.submit(work, job): job for job in jobs}
            while waiting:
                finished, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                while not begun.empty():
                    started(begun.get())
                for future in finished:
                    job, outcome = waiting.pop(future), future.result()
                    if outcome is not None:
                        ended(job, outcome)

    def stop(self) -> None:
        self._stopping.set()
        for process in list(self._running):
            process.send(signal.SIGTERM)

    def kill(self) -> None:
        for process in list(self._running):
            process.send(signal.SIGKILL)

    def environment(self, slot: int) -> dict[str, str]:
        """What the processes of a slot find in their environment, beside what is there."""
        found = {}
        if self.parallel > 1:
            found["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.parallel))
        # One of them also where runs do not share: a process that sees several is refused.
        if gpus := visible_gpus():
            found["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        return found


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that this process may use."""
    import torch

    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return [str(number) for number in range(count)]
    names = given.split(",")
    # Of several parts of cards (MIG) a process sees the first alone, and counts one.
    return names if count and names[0].startswith("MIG-") else names[:count]
