"""Loss and gradients alone, beside cross-entropy on logits as a tensor: time, memory, and both kernels' numbers.

N: rows, D: hidden size, V: vocabulary, E: kept entries.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from gpu.report import Place, Report
from gpu.timing import milliseconds, peak_bytes

SECONDS: int = 75
ROOT = Path(__file__).resolve().parents[2]
CHUNKS = (512, 1024, 2048, 4096, None)
NEAR = 5e-3
"""Largest relative difference of the two kernels' bf16 gradients, as in tests/trainer/loss/loss_triton_cases.py."""
EXACT = 1.5e-2
"""Largest relative error of a bf16 gradient against float64, as in tests/trainer/loss/test_loss.py."""
MEMORY = 0.05
"""Of what the dense side holds beside inputs and gradients."""


@dataclass(frozen=True)
class Inputs:
    """Random rows, an output head, labels, and a teacher such as a default cache gives."""

    hidden_ND: torch.Tensor
    weight_VD: torch.Tensor
    labels_N: torch.Tensor
    teacher: Any

    @classmethod
    def of(
        cls, device: torch.device, rows: int, hidden: int, vocab: int, temperature: float = 1.0
    ) -> "Inputs":
        from training_cache import random_teacher

        sys.path.append(str(ROOT / "tests" / "helpers"))
        from teacher_batches import batch_from_topk

        def normal(std: float, *shape: int) -> torch.Tensor:
            return torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(std=std)

        topk = random_teacher(rows, vocab, 8, seed=0)
        return cls(
            normal(1.0, rows, hidden).requires_grad_(),
            normal(2.5 / hidden**0.5, vocab, hidden).requires_grad_(),
            torch.randint(0, vocab, (rows,), device=device),
            batch_from_topk(range(rows), topk, temperature).to(device),
        )

    def clear(self) -> None:
        """Forget gradients."""
        self.hidden_ND.grad = self.weight_VD.grad = None

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Those that there are."""
        for name, leaf in (("hidden states", self.hidden_ND), ("output head", self.weight_VD)):
            if leaf.grad is not None:
                yield name, leaf.grad


def fused(inputs: Inputs, teacher: Any, **options: Any) -> Callable[[], torch.Tensor]:
    """Our loss with its gradients."""
    from trainer.loss.label_annealing_loss import label_annealing_loss

    def work() -> torch.Tensor:
        inputs.clear()
        output = label_annealing_loss(inputs.hidden_ND, inputs.weight_VD, inputs.labels_N, teacher, **options)
        output.loss.backward()
        return output.loss.detach()

    return work


def dense(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """Cross-entropy alone, as a model that returns logits has it."""

    def work() -> torch.Tensor:
        inputs.clear()
        loss = F.cross_entropy((inputs.hidden_ND @ inputs.weight_VD.t()).float(), inputs.labels_N)
        loss.backward()
        return loss.detach()

    return work


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|, slice by slice: the matrices are large."""
    difference = sum(
        (a.double() - b.double()).square().sum()
        for a, b in zip(found.split(8192), expected.split(8192), strict=True)
    )
    total = sum(b.double().square().sum() for b in expected.split(8192))
    return float((difference / total).sqrt())


def run(report: Report, place: Place) -> None:
    torch.manual_seed(0)
    on_gpu = place.device.type == "cuda"
    sizes = (600, 32, 2000) if place.tiny else (8192, 4096, 128_256)
    kernels = ("torch", "triton") if on_gpu else ("torch",)
    from trainer.loss.accumulate import adds_in_fp32

    report.info("gradient added in fp32 by one call", str(adds_in_fp32(place.device, torch.bfloat16)))
    against_float64(report, place, kernels)
    inputs = Inputs.of(place.device, *sizes)
    dense_ms = milliseconds(dense(inputs), place.device)
    report.info("dense cross-entropy, forward and backward", dense_ms, "ms")
    for kernel, chunk in product(kernels, CHUNKS):
        if chunk is not None and chunk > sizes[0]:
            continue
        took = milliseconds(fused(inputs, inputs.teacher, kernel=kernel, chunk_size=chunk), place.device)
        name = f"{kernel}, chunks of {chunk or 'the default'}"
        report.info(name, took, f"ms, {took / dense_ms:.3f} of dense")
    for kernel in kernels:
        only_ce = milliseconds(fused(inputs, None, kernel=kernel), place.device)
        report.info(f"{kernel}, cross-entropy alone", only_ce, f"ms, {only_ce / dense_ms:.3f} of dense")
    memory(report, place, inputs, kernels)
    variants(report, place, inputs, kernels)
    frozen_head(report, place, inputs, kernels)


def memory(report: Report, place: Place, inputs: Inputs, kernels: tuple[str, ...]) -> None:
    """Peaks beyond inputs and gradients, for bf16 weights, and for fp32 weights under autocast as runs have them."""
    device = place.device
    for kind in ("bf16 weights", "fp32 weights under bf16 autocast"):
        if kind != "bf16 weights":
            inputs = replace(inputs, weight_VD=inputs.weight_VD.detach().float().requires_grad_())

        def beyond(work: Callable[[], Any], inputs: Inputs = inputs, kind: str = kind) -> float:
            with torch.autocast(device.type, torch.bfloat16, enabled=kind != "bf16 weights"):
                work()
                outputs = sum(gradient.nbytes for _, gradient in inputs.gradients())
                inputs.clear()
                return peak_bytes(work, device) - outputs

        theirs = beyond(dense(inputs))
        report.info(f"{kind}: dense, beyond inputs and gradients", theirs / 2**30, "GiB")
        for kernel, chunk in product(kernels, (None, 2048)):
            ours = beyond(fused(inputs, inputs.teacher, kernel=kernel, chunk_size=chunk))
            name = f"{kind}: {kernel}, chunks of {chunk or 'the default'}"
            report.info(f"{name}, beyond inputs and gradients", ours / 2**30, "GiB")
            if not place.tiny:
                report.check(f"{name}, of dense", ours / theirs, at_most=MEMORY)
        inputs.clear()


def variants(report: Report, place: Place, inputs: Inputs, kernels: tuple[str, ...]) -> None:
    """Temperature, reverse KL, a masked label: times, and both kernels beside each other."""
    from trainer.objective import Objective

    rows, vocab = len(inputs.labels_N), len(inputs.weight_VD)
    warm = Inputs.of(place.device, rows, 1, vocab, temperature=2.0).teacher
    flags = torch.zeros(len(inputs.teacher.token_ids), dtype=torch.bool, device=place.device)
    flags[inputs.teacher.offsets[:-1]] = True
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "T = 1": (inputs.teacher, {}),
        "T = 2": (warm, {}),
        "reverse": (inputs.teacher, {"kl_direction": "reverse"}),
        "masked": (
            replace(inputs.teacher, masked=flags),
            {"objective": Objective(kl_target="masked-weighted")},
        ),
    }
    for name, (teacher, options) in cases.items():
        losses, gradients = [], []
        for kernel in kernels:
            work = fused(inputs, teacher, kernel=kernel, **options)
            report.info(f"{name}, {kernel}", milliseconds(work, place.device, repeats=3, warm_ups=1), "ms")
            losses.append(float(work()))
            gradients.append([gradient.clone() for _, gradient in inputs.gradients()])
        if len(kernels) < 2:
            continue
        difference = abs(losses[0] - losses[1]) / abs(losses[0])
        report.check(f"{name}, losses of the kernels differ by", difference, at_most=NEAR)
        for (part, _), one, other in zip(inputs.gradients(), *gradients, strict=True):
            report.check(f"{name}, gradients of {part} differ by", relative(one, other), at_most=NEAR)


def frozen_head(report: Report, place: Place, inputs: Inputs, kernels: tuple[str, ...]) -> None:
    """As with adapters: hidden states alone want a gradient."""
    inputs.clear()
    inputs = replace(inputs, weight_VD=inputs.weight_VD.detach())
    dense_ms = milliseconds(dense(inputs), place.device)
    theirs = peak_bytes(dense(inputs), place.device)
    report.info("frozen head, dense", dense_ms, "ms")
    for kernel, chunk in product(kernels, (2048, None)):
        if chunk is not None and chunk > len(inputs.labels_N):
            continue
        work = fused(inputs, inputs.teacher, kernel=kernel, chunk_size=chunk)
        took = milliseconds(work, place.device)
        name = f"frozen head, {kernel}, chunks of {chunk or 'the default'}"
        report.info(name, took, f"ms, {took / dense_ms:.3f} of dense")
        inputs.clear()
        ours = peak_bytes(work, place.device)
        if not place.tiny:
            report.check(f"{name}, memory of dense", ours / theirs, at_most=MEMORY)


def against_float64(report: Report, place: Place, kernels: tuple[str, ...]) -> None:
    """Every logit at once in float64, on the same bf16 inputs, with the vocabulary of a real model."""
    inputs = Inputs.of(place.device, *((64, 16, 500) if place.tiny else (384, 1024, 128_256)))
    hidden, weight = (
        part.detach().double().requires_grad_() for part in (inputs.hidden_ND, inputs.weight_VD)
    )
    teacher = inputs.teacher.without_draws()
    log_q_NV = (hidden @ weight.t()).log_softmax(1)
    row_E = torch.repeat_interleave(torch.arange(len(log_q_NV), device=place.device), teacher.counts)
    ids_E, log_p_E, log_tail_N = (
        teacher.token_ids.long(),
        teacher.logprobs.double(),
        teacher.log_tail.double(),
    )
    log_z_N = torch.zeros_like(log_tail_N).index_add(0, row_E, log_p_E.exp()).add(log_tail_N.exp()).log()
    log_p_E, log_tail_N = log_p_E - log_z_N[row_E], log_tail_N - log_z_N
    outside_NV = torch.ones_like(log_q_NV, dtype=torch.bool)
    outside_NV[row_E, ids_E] = False
    log_tail_q_N = log_q_NV.masked_fill(~outside_NV, -torch.inf).logsumexp(1)
    kl = (log_p_E.exp() * (log_p_E - log_q_NV[row_E, ids_E])).sum()
    kl = kl + (log_tail_N.exp() * (log_tail_N - log_tail_q_N)).sum()
    loss = F.nll_loss(log_q_NV, inputs.labels_N) + kl / len(log_q_NV)
    loss.backward()
    for kernel in kernels:
        found = float(fused(inputs, teacher, kernel=kernel, chunk_size=150)())
        report.check(f"{kernel}: loss against float64", abs(found / float(loss) - 1), at_most=EXACT)
        for (name, gradient), leaf in zip(inputs.gradients(), (hidden, weight), strict=True):
            assert leaf.grad is not None
            error = relative(gradient, leaf.grad)
            report.check(f"{kernel}: gradient of {name} against float64", error, at_most=EXACT)
