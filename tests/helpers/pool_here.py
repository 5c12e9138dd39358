"""A pool of a sweep without its processes."""

import json


class InThisProcess:
    """The same functions, one job after another, with what a process would read.

    Args:
        stop_after: so many jobs, then a KeyboardInterrupt.
        parallel: how many it says to have room for.
    """

    def __init__(self, stop_after: int | None = None, parallel: int = 1) -> None:
        self.jobs: list = []
        self.parallel = parallel
        self._stop_after = stop_after
        self._stopped = False

    @property
    def names(self) -> list[str]:
        """Of the jobs that ran."""
        return [job.name for job in self.jobs]

    def run(self, jobs, started, ended) -> None:
        from trainer.sweep.worker import WORKS

        for job in jobs:
            if self._stopped:
                return
            if len(self.jobs) == self._stop_after:
                raise KeyboardInterrupt
            started(job)
            self.jobs.append(job)
            ended(job, WORKS[job.work](json.loads(json.dumps(dict(job.settings)))))

    def stop(self) -> None:
        """After the job under way, which stops by itself at a signal."""
        self._stopped = True

    kill = stop
