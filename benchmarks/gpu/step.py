"""A step of training, as `benchmarks/training.py` takes it: ours beside direct fine-tuning and the Trainer as it comes.

One model of 1.6 billion weights, 4 x 2,048 tokens, fp32 weights under bf16 autocast, fused AdamW; all variants in one
process, one after the other, twice.
"""

import gc
import statistics
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from training_cache import write_cache
from training_variants import options_of, run_training
from transformers import TrainerCallback

from gpu.report import Place, Report

SECONDS: int = 110
BIG = dict(vocab=128_256, hidden=2048, intermediate=8192, layers=16, heads=32, seq=2048, batch=4)
TINY = dict(vocab=1000, hidden=64, intermediate=128, layers=2, heads=2, seq=64, batch=2)
WARMUP, STEPS = 3, 5
SAID = 0.85, 1.2
"""How well a step's memory is to be known before it."""
MOST_SYNCS = 2
"""Waits of the host in a step: where the loss asks how many rows count, where transformers looks at the mask."""


class CountSyncs(TrainerCallback):
    """From the end of step `first` to the end of step `last`: calls that make the host wait for the GPU."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.places: Counter[str] = Counter()
        self._caught: Any = None
        self._catching = warnings.catch_warnings(record=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.first:
            self._caught = self._catching.__enter__()
            warnings.simplefilter("always")
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("warn")
        elif state.global_step == self.last:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
            self._catching.__exit__(None, None, None)
            for entry in self._caught:
                folder, name = Path(entry.filename).parts[-2:]
                # torch/cuda/__init__.py is the clock of these measurements.
                if "synchronizing" in str(entry.message) and (folder, name) != ("cuda", "__init__.py"):
                    self.places[f"{folder}/{name}:{entry.lineno}"] += 1

    @property
    def per_step(self) -> float:
        return sum(self.places.values()) / (self.last - self.first)


def run(report: Report, place: Place) -> None:
    sizes = dict(TINY if place.tiny else BIG)
    on_gpu = place.device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        rows = sizes["batch"] * (WARMUP + STEPS)
        caches = {"whole": Path(folder) / "whole", "short": Path(folder) / "short"}
        shared = dict(vocab_size=sizes["vocab"], num_kept=8)
        write_cache(caches["whole"], num_rows=rows, length=sizes["seq"], **shared)
        write_cache(caches["short"], num_rows=4 * rows, length=sizes["seq"] // 4, **shared)

        def measured(variant: str, *flags: str, cache: str = "whole", callbacks: Any = ()) -> dict[str, Any]:
            words = [
                "--variant",
                variant,
                "--cache",
                str(caches[cache]),
                "--device",
                place.device.type,
                *flags,
            ]
            words += [f"--{name}={value}" for name, value in sizes.items()]
            words += [f"--steps={STEPS}", f"--warmup={WARMUP}", "--amp", f"--workers={2 if on_gpu else 0}"]
            found = run_training(options_of(words), callbacks)
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
            return found

        too_large = ""
        try:
            first = measured("hf")
        except torch.OutOfMemoryError as error:
            too_large = str(error)
        if too_large:  # out here, where the exception no longer holds what was allocated
            report.info("hf does not fit, half the batch is taken", too_large[:200])
            gc.collect()
            torch.cuda.empty_cache()
            sizes["batch"] //= 2
            first = measured("hf")
        report.info("tokens in a step", sizes["batch"] * sizes["seq"])
        full(report, place, measured, first)
        adapters(report, place, measured)
        packed(report, place, measured)
        syncs(report, place, measured)


def compare(report: Report, place: Place, title: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Medians of all steps of a variant; ours against the others, each within its bound."""
    milliseconds = {
        name: 1e3 * statistics.median(s for run in found for s in run["seconds"])
        for name, found in runs.items()
    }
    peaks = {name: max(run["peak_bytes"] for run in found) for name, found in runs.items()}
    for name in runs:
        report.info(f"{title}, {name}", milliseconds[name], "ms a step")
        report.info(f"{title}, {name}, peak", peaks[name] / 2**30, "GiB")
        if said := runs[name][0]["said_bytes"]:
            report.info(f"{title}, {name}, peak as anneal train --dry-run says it", said / 2**30, "GiB")
            if not place.tiny:
                low, high = SAID
                report.check(
                    f"{title}, {name}, said / measured", said / peaks[name], at_least=low, at_most=high
                )
    for ours in (name for name in runs if name.startswith("anneal")):
        for other, bound in (("direct, torch", 1.03), ("direct, triton", 1.03), ("hf", 1.0)):
            if other in runs and (other == "hf" or other.endswith(ours.split(", ")[-1])):
                ratio = milliseconds[ours] / milliseconds[other]
                bounded(report, place, f"{title}, {ours} / {other}, time", ratio, bound)
        if "hf" in runs:
            bounded(report, place, f"{title}, {ours} / hf, peak", peaks[ours] / peaks["hf"], 0.7)


def bounded(report: Report, place: Place, name: str, ratio: float, bound: float) -> None:
    """A ratio of a trial on a CPU says nothing."""
    if place.tiny:
        report.info(name, ratio)
    else:
        report.check(name, ratio, at_most=bound)


def kernels_of(place: Place) -> tuple[str, ...]:
    return ("torch", "triton") if place.device.type == "cuda" else ("torch",)


def full(report: Report, place: Place, measured: Any, first: dict[str, Any]) -> None:
    runs: dict[str, list[dict[str, Any]]] = {"hf": [first]}
    for _ in range(1 if place.tiny else 2):
        for kernel in kernels_of(place):
            for variant in ("anneal", "direct"):
                runs.setdefault(f"{variant}, {kernel}", []).append(
                    measured(variant, f"--loss-kernel={kernel}")
                )
    if not place.tiny:
        runs["hf"].append(measured("hf"))
    report.info("weights", first["parameters"] / 1e9, "billion")
    compare(report, place, "full", runs)


def adapters(report: Report, place: Place, measured: Any) -> None:
    flags = ("--lora", "--dtype=bf16", "--checkpointing")
    runs = {
        f"anneal, {kernel}": [measured("anneal", f"--loss-kernel={kernel}", *flags)]
        for kernel in kernels_of(place)
    }
    compare(report, place, "lora", {**runs, "hf": [measured("hf", *flags)]})


def packed(report: Report, place: Place, measured: Any) -> None:
    """Four rows to a sequence: the same tokens, attention within a row."""
    kernel = kernels_of(place)[-1]
    flags = (f"--loss-kernel={kernel}", "--packing")
    runs = {
        f"{variant}, {kernel}": [measured(variant, *flags, cache="short")] for variant in ("anneal", "direct")
    }
    compare(report, place, "packed", runs)


def syncs(report: Report, place: Place, measured: Any) -> None:
    """Waits of the host in a step, and where."""
    for name, flags, cache in (("whole rows", (), "whole"), ("packed", ("--packing",), "short")):
        counter = CountSyncs(WARMUP, WARMUP + 3)
        measured("anneal", *flags, cache=cache, callbacks=[counter])
        bounded(report, place, f"{name}, waits of the host in a step", counter.per_step, MOST_SYNCS)
        for where, count in counter.places.most_common(8):
            report.info(f"{name}, wait at {where}", count / 3, "a step")
