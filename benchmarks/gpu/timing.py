"""Times and peaks of a piece of work on a device."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Wait for what was asked of a GPU; a CPU has nothing outstanding."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(work: Callable[[], Any], device: torch.device, repeats: int = 5, warmup: int = 2) -> float:
    """Median time of `work`, by events on the device, or by the clock of a CPU."""
    times = []
    for number in range(warmup + repeats):
        synchronize(device)
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            end.synchronize()
            took = begin.elapsed_time(end)
        else:
            start = time.perf_counter()
            work()
            took = 1e3 * (time.perf_counter() - start)
        if number >= warmup:
            times.append(took)
    return statistics.median(times)


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """The most that `work` allocates at a time beyond what is allocated already, its results included; a CPU's
    resident bytes, which are rough."""
    from training_variants import PeakMemory

    if device.type == "cuda":
        torch.cuda.empty_cache()
    peak = PeakMemory(device.type)
    result = work()
    synchronize(device)
    found = peak.read()
    del result
    return found
