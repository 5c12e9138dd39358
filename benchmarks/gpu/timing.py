"""Clocks of the smoke run's sections: device events where there are some, memory peaks, host synchronisations."""

import gc
import statistics
import time
import warnings
from collections.abc import Callable

import torch

SYNC_WARNING = "called a synchronizing CUDA operation"


def finish(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(
    run: Callable[[], object], device: torch.device, *, repeats: int = 5, warm_ups: int = 2
) -> float:
    """Median time of `run`, from a device that is idle to a device that is idle again."""
    for _ in range(warm_ups):
        run()
    times = []
    for _ in range(repeats):
        finish(device)
        began = time.perf_counter()
        run()
        finish(device)
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def device_milliseconds(run: Callable[[], object], device: torch.device, *, calls: int = 10) -> float:
    """Time per call on the device alone: calls one behind the other between two events, which hides their launches
    where they are short."""
    if device.type != "cuda":
        return milliseconds(run, device)
    for _ in range(2):
        run()
    times = []
    for _ in range(3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        finish(device)
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        finish(device)
        times.append(begin.elapsed_time(end) / calls)
    return statistics.median(times)


def peak_bytes(run: Callable[[], object], device: torch.device) -> float:
    """Device memory that `run` holds at its peak beyond what was held before; NaN where nobody counts it."""
    if device.type != "cuda":
        return float("nan")
    gc.collect()
    torch.cuda.empty_cache()
    finish(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    finish(device)
    return float(torch.cuda.max_memory_allocated(device) - before)


def synchronisations(run: Callable[[], object], device: torch.device) -> float:
    """How often `run` makes the host wait for the device; NaN where there is nothing to wait for."""
    if device.type != "cuda":
        return float("nan")
    run()
    finish(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return float(sum(SYNC_WARNING in str(warning.message) for warning in caught))
