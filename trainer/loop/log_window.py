"""What happened since the last log line: sums on the device, read once per line, never per step."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trainer.loss.label_annealing_loss import LabelAnnealingOutput


class LogWindow:
    """Running means of one logging interval.

    `ce` and `kl` of every micro-batch arrive divided by the whole step's counts, so their sum over the
    micro-batches of a step, averaged over ranks, is the step's mean; the window averages steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums = torch.zeros(5, device=device)
        self._num_steps = 0
        self._num_tokens = torch.zeros((), dtype=torch.int64, device=device)
        self._paused = 0.0
        self._start = time.perf_counter()

    def add(self, output: LabelAnnealingOutput) -> None:
        """Account for one micro-batch."""
        num_kl = output.num_kl.to(torch.float32)
        values = (output.ce, output.kl, output.kept_mass * num_kl, output.student_kept_mass * num_kl, num_kl)
        self._sums += torch.stack([value.detach().float() for value in values])

    def step(self, num_tokens: torch.Tensor) -> None:
        """Account for one optimizer step of `num_tokens` (0-d, on the device) tokens on all ranks."""
        self._num_steps += 1
        self._num_tokens += num_tokens

    def pause(self, seconds: float) -> None:
        """Leave time spent on evaluation or saving out of the throughput."""
        self._paused += seconds

    def drain(self, mean_over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The window's means, after which it is empty. Collective: every rank must call it."""
        if not self._num_steps:
            return {}
        ce, kl, kept_mass, student_kept_mass, num_kl = mean_over_ranks(self._sums).tolist()
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        logs = {"ce": ce / self._num_steps}
        if num_kl:
            logs |= {
                "kl": kl / self._num_steps,
                "kept_mass": kept_mass / num_kl,
                "student_kept_mass": student_kept_mass / num_kl,
            }
        logs |= {"tokens_per_second": int(self._num_tokens) / seconds, "memory_gib": memory_gib(self.device)}
        self.__init__(self.device)  # type: ignore[misc]
        return logs


@contextmanager
def evaluating(trainer: Any) -> Iterator[None]:
    """In this block a trainer's time is no time of training; a block within it is part of it. The base class evaluates
    several data sets by calling itself once for each.

    Args:
        trainer: with `is_evaluating`, and `pause`.
    """
    if trainer.is_evaluating:
        yield
        return
    start, trainer.is_evaluating = time.perf_counter(), True
    try:
        yield
    finally:
        trainer.is_evaluating = False
        trainer.pause(time.perf_counter() - start)


def memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: allocated on the GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
