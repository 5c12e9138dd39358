"""The reduction of logits on a device: its numbers against a float64 reference, its time pass by pass.

The reference is dense and uses nothing of ours: it runs in float64 on the CPU for some rows, and on the device, where
it must agree with the first, for all.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch

from cache_builder.reduction import block_sums, kernels, reduce
from cache_builder.reduction.reduce import ReducedRows, reduce_logits
from cache_builder.teachers import wire
from formats.capture_settings import CaptureSettings
from formats.logprobs.tail_draws import POWER
from formats.logprobs.tail_function import TAIL_BETAS

from .report import Place, Report
from .timing import device_milliseconds, milliseconds, peak_bytes, synchronisations

SECONDS = 85
ATOL, RTOL = 2e-5, 3e-6
BORDER = 1e-5
"""Entries so near the threshold, in nats, may fall on either side of it in fp32."""
MOST_SYNCHRONISATIONS = 1
CPU_ROWS = 24
DEFAULT = CaptureSettings()


class Reference(NamedTuple):
    """Rows in float64, dense."""

    logprobs_NV: torch.Tensor
    kept_NV: torch.Tensor
    """bool."""
    tails_NK: torch.Tensor
    drawn_N: torch.Tensor
    """Expected number of draws."""


def reference(logits_NV: torch.Tensor, capture: CaptureSettings) -> Reference:
    """What the reduction must find, by sorting whole rows."""
    logprobs_NV = torch.log_softmax(logits_NV.double(), -1)
    max_k = min(capture.max_k, logits_NV.shape[1])
    sorted_NV, ids_NV = logprobs_NV.sort(dim=-1, descending=True, stable=True)
    enough_NK = sorted_NV[:, :max_k] >= (math.log(capture.min_prob) if capture.min_prob else -math.inf)
    enough_NK &= sorted_NV[:, :max_k] > -math.inf
    enough_NK[:, 0] = True
    kept_NV = torch.zeros_like(logprobs_NV, dtype=torch.bool).scatter_(-1, ids_NV[:, :max_k], enough_NK)
    tail_NV = logprobs_NV.masked_fill(kept_NV, -math.inf)
    tails_NK = torch.stack([torch.logsumexp(beta * tail_NV, -1) for beta in TAIL_BETAS], -1)
    drawn_N = capture.draw_rate * (POWER * tail_NV).exp().sum(-1)
    return Reference(logprobs_NV, kept_NV, tails_NK, drawn_N)


def random_logits(num_rows: int, vocab_size: int, device: torch.device, seed: int) -> torch.Tensor:
    """Rows from flat to peaked: standard deviations from 0.5 to 12."""
    generator = torch.Generator(device).manual_seed(seed)
    logits_NV = torch.randn(num_rows, vocab_size, generator=generator, device=device)
    return logits_NV.mul_(torch.linspace(0.5, 12.0, num_rows, device=device)[:, None])


class Case(NamedTuple):
    """Logits that are difficult in one way, and what to keep of them."""

    logits_NV: torch.Tensor
    capture: CaptureSettings


def cases(rows: int, vocab: int, device: torch.device) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Made one at a time: each is half a GiB."""

    def plain(vocab_size: int = vocab) -> torch.Tensor:
        return random_logits(rows, vocab_size, device, seed=1)

    def nan_row() -> Case:
        logits_NV = plain()
        logits_NV[rows // 2] = torch.nan
        return Case(logits_NV, DEFAULT)

    def impossible() -> Case:
        logits_NV = plain()
        logits_NV[:, ::3] = -torch.inf
        return Case(logits_NV, DEFAULT)

    yield "default", lambda: Case(plain(), DEFAULT)
    yield "ties of bf16", lambda: Case(plain().bfloat16().float(), DEFAULT)
    yield "min_prob 0", lambda: Case(plain(), CaptureSettings(min_prob=0.0, max_k=64))
    yield "a NaN row", nan_row
    yield "a third is -inf", impossible
    yield "strided", lambda: Case(plain(vocab + 64)[:, :vocab], DEFAULT)
    yield "short last stripe", lambda: Case(plain(50_257 if vocab > 60_000 else 257), DEFAULT)


@contextmanager
def kernels_set(setting: str) -> Iterator[None]:
    """ANNEAL_TRITON for a while."""
    before = os.environ.get("ANNEAL_TRITON")
    os.environ["ANNEAL_TRITON"] = setting
    try:
        yield
    finally:
        if before is None:
            del os.environ["ANNEAL_TRITON"]
        else:
            os.environ["ANNEAL_TRITON"] = before


def reduced(case: Case) -> ReducedRows:
    """The product's own reduction of it."""
    rows, vocab_size = case.logits_NV.shape
    at_N = torch.arange(rows, device=case.logits_NV.device)
    return reduce_logits(
        case.logits_NV,
        case.capture,
        labels_N=at_N * 389 % vocab_size,
        starts_N=at_N.double() * 0.6180339887 % 1.0,
    )


def same_bits(one: ReducedRows, other: ReducedRows) -> bool:
    """NaN equals NaN."""
    return all(
        a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))
        for a, b in zip(one, other, strict=True)
    )


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over what is allowed: at most 1 is right; equal infinities are right."""
    found, expected = found.double(), expected.double()
    error = (found - expected).abs() / (ATOL + RTOL * expected.abs())
    error = torch.where((found == expected) | (found.isnan() & expected.isnan()), 0.0, error)
    return float(error.nan_to_num(math.inf).max()) if error.numel() else 0.0


def compare(report: Report, name: str, case: Case, found: ReducedRows) -> None:
    """Heads, their logprobs, tails, labels and draws against the reference."""
    wanted = reference(case.logits_NV, case.capture)
    rows = torch.arange(0, len(case.logits_NV), max(1, len(case.logits_NV) // CPU_ROWS))
    on_cpu = reference(case.logits_NV[rows].cpu(), case.capture)
    of_cpu = [torch.equal(on_cpu.kept_NV, wanted.kept_NV[rows].cpu())]
    of_cpu += [
        torch.allclose(a, b[rows].cpu(), rtol=1e-10, atol=1e-10, equal_nan=True)
        for a, b in zip(on_cpu[2:], wanted[2:], strict=True)
    ]
    report.check(f"{name}: device's float64 reference is the CPU's", float(all(of_cpu)), at_least=1)

    device, (num_rows, vocab_size) = case.logits_NV.device, case.logits_NV.shape
    finite_N = ~wanted.tails_NK.isnan().any(-1)
    rows_E = torch.repeat_interleave(torch.arange(num_rows, device=device), found.counts.long())
    kept_NV = torch.zeros_like(wanted.kept_NV)
    kept_NV[rows_E, found.token_ids.long()] = True
    threshold = math.log(case.capture.min_prob) if case.capture.min_prob else -math.inf
    other_NV = (kept_NV != wanted.kept_NV) & ((wanted.logprobs_NV - threshold).abs() > BORDER)
    other_NV &= finite_N[:, None]
    report.check(f"{name}: kept tokens that differ", float(other_NV.sum()), at_most=0)
    same_N = (kept_NV == wanted.kept_NV).all(-1)
    errors = {
        "kept": worst(found.logprobs, wanted.logprobs_NV[rows_E, found.token_ids.long()]),
        "tails": worst(found.log_tail_nodes[same_N], wanted.tails_NK[same_N]),
        "labels": worst(
            found.label_logprobs,
            wanted.logprobs_NV.gather(
                -1, (torch.arange(num_rows, device=device) * 389 % vocab_size)[:, None]
            )[:, 0],
        ),
    }
    rows_S = torch.repeat_interleave(torch.arange(num_rows, device=device), found.draw_counts.long())
    errors["draws"] = worst(found.draw_logprobs, wanted.logprobs_NV[rows_S, found.draw_ids.long()])
    for what, error in errors.items():
        report.check(f"{name}: {what}, error over the allowed", error, at_most=1)
    report.check(
        f"{name}: draws of kept tokens", float(kept_NV[rows_S, found.draw_ids.long()].sum()), at_most=0
    )
    away_N = (found.draw_counts.double() - wanted.drawn_N).abs()[finite_N]
    report.check(f"{name}: draws from their expected number", float(away_N.max()), at_most=1.001)


def run(report: Report, place: Place) -> None:
    """See the module."""
    device = place.device
    rows, vocab = (48, 1003) if place.tiny else (1046, 128_256)
    previous: dict[str, ReducedRows] = {}
    for setting, way in (("1", "triton"), ("0", "plain")):
        for name, make in cases(rows, vocab, device):
            with kernels_set(setting):
                case = make()
                found, again = reduced(case), reduced(case)
                report.check(
                    f"{name}, {way}: two runs, the same bits", float(same_bits(found, again)), at_least=1
                )
                if setting == "1" or name in ("default", "min_prob 0"):
                    compare(report, f"{name}, {way}", case, found)
                else:  # against the kernels, which were compared with the reference
                    close = worst(found.log_tail_nodes, previous[name].log_tail_nodes)
                    report.check(f"{name}, plain: tails, from triton over the allowed", close, at_most=2)
                previous[name] = found
                del case, again
        if setting == "1" and device.type == "cuda":
            report.check("the kernels run", float(kernels.run_on("cuda", vocab)), at_least=1)
    times(report, place, vocab)


def times(report: Report, place: Place, vocab: int) -> None:
    """Pass by pass, beside the output head's product and one reading of the logits."""
    device, hidden = place.device, 64 if place.tiny else 4096
    for rows in (16, 32) if place.tiny else (1046, 2092, 4184):
        hidden_ND = torch.randn(rows, hidden, device=device).bfloat16()
        weight_VD = (torch.randn(vocab, hidden, device=device) * (5 / hidden**0.5)).bfloat16()

        def product(hidden_ND: torch.Tensor = hidden_ND, weight_VD: torch.Tensor = weight_VD) -> torch.Tensor:
            if device.type == "cuda":
                return torch.mm(hidden_ND, weight_VD.t(), out_dtype=torch.float32)
            return hidden_ND.float() @ weight_VD.float().t()

        logits_NV = product()
        case, undrawn = Case(logits_NV, DEFAULT), Case(logits_NV, CaptureSettings(draw_rate=0))
        whole = reduced(case)
        blocks = block_sums.block_statistics(logits_NV, TAIL_BETAS)
        top_N = blocks.maxima_NG.amax(-1)
        scale = 8192 / rows
        found = {
            "output head": device_milliseconds(product, device),
            "one reading": device_milliseconds(partial(logits_NV.amax, -1), device),
            "block statistics": device_milliseconds(
                partial(block_sums.block_statistics, logits_NV, TAIL_BETAS), device
            ),
            "totals of the blocks": device_milliseconds(
                partial(block_sums.totals, blocks, TAIL_BETAS, top_N), device
            ),
            "without draws": milliseconds(partial(reduced, undrawn), device),
            "all": milliseconds(partial(reduced, case), device),
            "pack": milliseconds(partial(wire.pack, whole), device),
        }
        with kernels_set("0"):
            found["all, plain"] = milliseconds(partial(reduced, case), device, repeats=3)
        for name, each in found.items():
            report.info(f"{rows} rows: {name}", each * scale, "ms per 8,192 rows")
        report.info(f"{rows} rows: entries and draws", _per_position(whole, rows), "per position")
        report.check(
            f"{rows} rows: all / output head", found["all"] / found["output head"], at_most=_most(place, 1.0)
        )
        extra = peak_bytes(partial(reduced, case), device) / logits_NV.nbytes
        report.info(f"{rows} rows: memory beside the logits", extra, "of the logits")
        chunks = math.ceil(rows / reduce.rows_per_chunk(vocab, reduce.chunk_bytes(device)))
        waits = synchronisations(partial(reduced, case), device) / chunks
        if device.type == "cuda":
            report.check(f"{rows} rows: waits per chunk", waits, at_most=MOST_SYNCHRONISATIONS)
    profile(report, place, case)


def _most(place: Place, bound: float) -> float:
    """A bound on time says nothing about a trial on a CPU."""
    return math.inf if place.tiny or place.device.type != "cuda" else bound


def _per_position(found: ReducedRows, rows: int) -> str:
    return f"{len(found.token_ids) / rows:.1f} and {len(found.draw_ids) / rows:.1f}"


def profile(report: Report, place: Place, case: Case) -> None:
    """The kernels of one reduction, the longest first, in a file; how many of them are ours."""
    from torch.profiler import ProfilerActivity

    on_gpu = place.device.type == "cuda"
    with torch.profiler.profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] * on_gpu)]
    ) as found:
        reduced(case)
        if on_gpu:
            torch.cuda.synchronize()
    averages = found.key_averages()
    order = "cuda_time_total" if on_gpu else "cpu_time_total"
    (place.out / "reduction_profile.txt").write_text(averages.table(sort_by=order, row_limit=45))
    if on_gpu:
        launched = sorted(
            (
                (event.self_device_time_total, event.count, event.key)
                for event in averages
                if event.device_type == torch.autograd.DeviceType.CUDA
            ),
            reverse=True,
        )
        for time, count, name in launched[:12]:
            report.info(f"kernel {name[:70]}", time / 1e3, f"ms in {count} calls")
        report.info("kernels", sum(count for _, count, _ in launched), "launches")
        ours = sum(
            count
            for _, count, name in launched
            if name in ("block_kernel", "pick_kernel", "hand_over_kernel")
        )
        report.check("kernels of ours", float(ours), at_least=3)
