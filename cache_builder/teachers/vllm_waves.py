"""vLLM's scheduler, in waves: requests of a wave run when all of them are there and the wave before has ended.

So what shares a step depends on the rows alone, never on when they arrive, and a wave can be sent while the one before
runs: the device need not wait for thousands of short rows to be taken in. Runs in the engine's process.
"""

from collections import deque
from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

WAVE_KEY = "anneal_wave_ends"
"""In a request's `extra_kwargs`: whether it is the last of its wave. Requests without it are of no wave."""


class WaveScheduler(Scheduler):
    """See the module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._arriving: list[Request] = []
        self._complete: deque[list[Request]] = deque()

    def add_request(self, request: Request) -> None:
        ends = _wave_ends(request)
        if ends is None:
            super().add_request(request)
            return
        self._arriving.append(request)
        if ends:
            self._complete.append(self._arriving)
            self._arriving = []

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if self._complete and not any(self.get_request_counts()):
            self._admit(self._complete.popleft())
        return super().schedule(throttle_prefills)

    def get_num_unfinished_requests(self) -> int:
        held = sum(map(len, self._complete)) if self.pause_state == PauseState.UNPAUSED else 0
        return super().get_num_unfinished_requests() + held

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        # Who takes back a request gives up its wave: the scheduler must know all of them to forget them.
        while self._complete:
            self._admit(self._complete.popleft())
        self._admit(self._arriving)
        self._arriving = []
        return super().finish_requests(request_ids, finished_status)

    def _admit(self, wave: list[Request]) -> None:
        for request in wave:
            super().add_request(request)


def _wave_ends(request: Request) -> bool | None:
    asked = request.pooling_params.extra_kwargs if request.pooling_params is not None else None
    return (asked or {}).get(WAVE_KEY)
