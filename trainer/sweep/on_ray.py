"""`--ray [ADDRESS]`: the runs of a sweep on a Ray cluster, one per GPU.

A task of the cluster starts the same process as `LocalPool` and waits for it, on the GPU that Ray gave it. All machines
must see the sweep's directory, the caches and the model under the same paths.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from formats.errors import ConfigError, one_line
from formats.ray_cluster import connected, machines_of
from trainer.sweep.pools import ENDED, Job, Outcome, Process


@dataclass(frozen=True, kw_only=True)
class Slots:
    """How many runs at a time, and what each takes from the cluster."""

    parallel: int
    num_cpus: int
    num_gpus: int

    @classmethod
    def of_cluster(cls, machines: Sequence[Mapping[str, float]], parallel: int | None) -> "Slots":
        """A GPU for each run; without GPUs the CPUs are divided between `parallel` runs, or one CPU is given to each.

        Args:
            machines: the resources of each; a run is on one of them.

        Raises:
            ConfigError: more runs at a time than there is room for.
        """
        gpus = [int(each.get("GPU", 0)) for each in machines]
        cpus = [int(each.get("CPU", 0)) for each in machines]
        room = sum(map(min, gpus, cpus)) if any(gpus) else sum(cpus)
        if room < max(parallel or 1, 1):
            raise ConfigError(
                f"--ray needs a GPU with a CPU, or without GPUs a CPU, for each of {parallel or 1} runs at a time, got "
                f"{sum(gpus)} GPUs and {sum(cpus)} CPUs; use a smaller --parallel"
            )
        runs = parallel or room
        num_cpus = 1 if any(gpus) else sum(cpus) // runs
        while sum(count // num_cpus for count in cpus) < runs:
            num_cpus -= 1
        return cls(parallel=runs, num_cpus=num_cpus, num_gpus=int(any(gpus)))


def train_there(job: Job, directory: str, num_threads: int | None) -> Outcome:
    """One run; inside a Ray task, on the machine that trains."""
    job = replace(job, log=Path(directory) / job.log)
    if not job.log.parents[1].is_dir():
        return {
            "error": f"every machine must see the sweep's directory, got none in {job.log.parents[1]}; use a shared "
            "file system",
            "kind": "ConfigError",
        }
    environment = {} if num_threads is None else {"OMP_NUM_THREADS": str(num_threads)}
    process = Process(job, environment, directory)
    try:
        return process.wait()
    except KeyboardInterrupt:  # cancelled by the sweep
        process.send(signal.SIGTERM)
        return process.wait()


class RayPool:
    """A pool on a Ray cluster; use it as a context.

    Args:
        address: of a running cluster, `auto` for the one this machine belongs to; None starts Ray on this machine.
        parallel: runs at a time; as many as there is room for by default.
    """

    def __init__(self, address: str | None = None, parallel: int | None = None) -> None:
        self._address, self._parallel = address, parallel
        self._stopping = self._killing = False

    def __enter__(self) -> "RayPool":
        """Connect.

        Raises:
            ConfigError: Ray is not installed, cannot be reached, or has no room.
        """
        with contextlib.ExitStack() as opening:
            opening.enter_context(connected(self._address))
            import ray

            self._slots = Slots.of_cluster(machines_of(ray.nodes()), self._parallel)
            self._connection = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    @property
    def parallel(self) -> int:
        return self._slots.parallel

    def run(
        self, jobs: Sequence[Job], started: Callable[[Job], None], ended: Callable[[Job, Outcome], None]
    ) -> None:
        import ray

        slots = self._slots
        task = ray.remote(num_cpus=slots.num_cpus, num_gpus=slots.num_gpus, max_calls=1, max_retries=0)(
            train_there
        )
        threads = None if slots.num_gpus else slots.num_cpus
        pending, busy = list(jobs)[::-1], dict[Any, Job]()
        cancelled = False
        while busy or (pending and not self._stopping):
            while pending and len(busy) < slots.parallel and not self._stopping:
                job = pending.pop()
                busy[task.remote(job, os.getcwd(), threads)] = job
                started(job)
            if self._killing or (self._stopping and not cancelled):
                cancelled = True
                for reference in busy:
                    with contextlib.suppress(Exception):
                        ray.cancel(reference, force=self._killing)
            finished, _ = ray.wait(list(busy), num_returns=1, timeout=0.5)
            for reference in finished:
                ended(busy.pop(reference), self._outcome(reference))

    def _outcome(self, reference: Any) -> Outcome:
        import ray

        try:
            found: Outcome = ray.get(reference)
        except ray.exceptions.TaskCancelledError:
            return {"interrupted": "SIGTERM"}
        except ray.exceptions.RayError as error:
            if self._stopping:
                return {"interrupted": "SIGTERM"}
            line = one_line(error, 200, whole=True)
            return {"error": f"the run's process on the Ray cluster ended: {line}", "kind": ENDED}
        return found

    def stop(self) -> None:
        self._stopping = True

    def kill(self) -> None:
        self._stopping = self._killing = True
