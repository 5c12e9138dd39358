"""How faithful are the gradients of the other objectives from a cache at its default settings?

    python benchmarks/fidelity_objectives.py [--model examples/tiny-base] [--steps 0 10 100] [--temperatures 0.5 1 2]

As in fidelity.py: the student drifts by plain fine-tuning, and at each stop the gradient of a term with respect to
all parameters is compared with the same term computed from both models over the whole vocabulary in float64. Here
the terms are those that `trainer/objective.py` makes of a cache, read as `anneal train` reads it: dataset, collator,
loss. Two figures say what is bias and what is noise: the angle and norm of one *step*, the mean of all batches, and
the angle of a single batch. Noise falls with the square root of their ratio, bias does not.
"""

import copy
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from fidelity import (
    Comparison,
    arguments,
    compare,
    drift,
    gradient_from_logits,
    parameter_gradient,
    teacher_and_texts,
    write_cache,
)

from formats.cache import TeacherCache
from formats.capture_settings import CaptureSettings
from trainer.data.collator import LabelAnnealingCollator, shifted_terms, split_batch
from trainer.data.dataset import CachedDataset
from trainer.loss.label_annealing_loss import label_annealing_loss
from trainer.loss.token_weights import LabelTerms
from trainer.objective import TOP, Objective

Term = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(z, log p0, labels, beta) -> the term's value at every token: float64 [N, V], [N, V], [N] -> [N]."""


def full(z: torch.Tensor, log_p0: torch.Tensor, labels: torch.Tensor, beta: float) -> torch.Tensor:
    """KL(p || q)."""
    log_p, log_q = torch.log_softmax(beta * log_p0, -1), torch.log_softmax(beta * z, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse(z: torch.Tensor, log_p0: torch.Tensor, labels: torch.Tensor, beta: float) -> torch.Tensor:
    """KL(q || p)."""
    return full(log_p0, z, labels, beta)


def masked(z: torch.Tensor, log_p0: torch.Tensor, labels: torch.Tensor, beta: float) -> torch.Tensor:
    """KL of both without the label, renormalised (arXiv 2605.29498)."""
    others = torch.ones_like(z, dtype=torch.bool).scatter_(1, labels[:, None], False)
    shape = (len(z), -1)
    return full(z[others].view(shape), log_p0[others].view(shape), labels, beta)


def masked_weighted(z: torch.Tensor, log_p0: torch.Tensor, labels: torch.Tensor, beta: float) -> torch.Tensor:
    """The same times 1 - p(label), p at this temperature: what the chain rule leaves of KL(p || q)."""
    p_label = torch.softmax(beta * log_p0, -1).gather(1, labels[:, None])[:, 0]
    return (1.0 - p_label) * masked(z, log_p0, labels, beta)


def unsure(z: torch.Tensor, log_p0: torch.Tensor, labels: torch.Tensor, beta: float) -> torch.Tensor:
    """KL(p || q) times 1 - p0(label), p0 at temperature 1."""
    p_label = torch.softmax(log_p0, -1).gather(1, labels[:, None])[:, 0]
    return (1.0 - p_label) * full(z, log_p0, labels, beta)


def cross_entropy(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log q(label)."""
    return -torch.log_softmax(z, -1).gather(1, labels[:, None])[:, 0]


def eaft0(z: torch.Tensor, log_p0: torch.Tensor, labels: torch.Tensor, beta: float) -> torch.Tensor:
    """Cross-entropy weighed by the entropy of the initial model's top 20, over ln 20."""
    top = torch.log_softmax(log_p0.topk(TOP, -1).values, -1)
    return -(top.exp() * top).sum(-1) / math.log(TOP) * cross_entropy(z, labels)


def stm(z: torch.Tensor, log_p0: torch.Tensor, labels: torch.Tensor, beta: float) -> torch.Tensor:
    """Cross-entropy of the tokens with p0 >= 0.4 (arXiv 2501.14315); a mean over those."""
    known = torch.log_softmax(log_p0, -1).gather(1, labels[:, None])[:, 0] >= math.log(0.4)
    return torch.where(known, cross_entropy(z, labels), 0.0) * (len(known) / known.sum())


@dataclass(frozen=True)
class Case:
    """One objective, typed as a user types it, beside its definition."""

    term: Term
    objective: Objective
    kl_coef: float = 1.0
    """0: the term is a cross-entropy, otherwise cross-entropy is left out."""
    direction: str = "forward"


CASES = {
    "kl_target: full": Case(full, Objective()),
    "kl_target: masked": Case(masked, Objective(kl_target="masked")),
    "kl_target: masked-weighted": Case(masked_weighted, Objective(kl_target="masked-weighted")),
    "kl_gate: unsure": Case(unsure, Objective(kl_gate="unsure")),
    "kl_direction: reverse": Case(reverse, Objective(), direction="reverse"),
    "ce_weight: eaft0": Case(eaft0, Objective(ce_weight="eaft0"), kl_coef=0.0),
    "ce_weight: stm": Case(stm, Objective(ce_weight="stm"), kl_coef=0.0),
}


def from_both_models(
    model: Any, ids_BL: torch.Tensor, log_p0: torch.Tensor, term: Term, temperature: float
) -> torch.Tensor:
    """The gradient of the mean of `term` over all tokens, the whole vocabulary in float64."""
    with torch.no_grad():
        z = model(input_ids=ids_BL).logits[:, :-1].flatten(0, 1).double()
    z.requires_grad_()
    term(z, log_p0, ids_BL[:, 1:].flatten(), 1.0 / temperature).mean().backward()
    return gradient_from_logits(model, ids_BL, z.grad)


def from_the_cache(
    model: Any, cache: TeacherCache, rows: range, case: Case, temperature: float
) -> torch.Tensor:
    """The gradient that `anneal train` would take of these rows."""
    dataset = CachedDataset(cache, temperature, objective=case.objective)
    batch = LabelAnnealingCollator()([dataset[row] for row in rows])
    inputs, labels_N, teacher = split_batch(batch)
    terms = shifted_terms(batch)
    if case.kl_coef:
        labels_N = torch.full_like(labels_N, -100)
    model.zero_grad(set_to_none=True)
    hidden = model.model(**inputs).last_hidden_state.flatten(0, 1)
    label_annealing_loss(
        hidden,
        model.lm_head.weight,
        labels_N,
        teacher if case.kl_coef else None,
        kl_direction=case.direction,
        objective=case.objective,
        label_terms=LabelTerms(terms.get("label_weights"), terms.get("label_logprobs")),
    ).loss.backward()
    return parameter_gradient(model)


@dataclass(frozen=True)
class Result:
    """One objective at one stop and temperature."""

    batch_angle: float
    """Median over batches, degrees."""
    step: Comparison


class Comparisons:
    """The batches of one objective, and their mean."""

    def __init__(self) -> None:
        self.angles: list[float] = []
        self.sums: list[torch.Tensor] = []

    def add(self, *gradients: torch.Tensor) -> None:
        """One batch: the gradient from the cache, the exact one, that of plain cross-entropy."""
        self.angles.append(compare(*gradients).angle)
        self.sums = (
            [a + b for a, b in zip(self.sums, gradients, strict=True)] if self.sums else list(gradients)
        )

    def result(self) -> Result:
        """Of all batches."""
        return Result(statistics.median(self.angles), compare(*self.sums))


def measure(
    teacher: Any,
    train: list[torch.Tensor],
    held_out: list[torch.Tensor],
    *,
    stops: list[int],
    temperatures: list[float],
    learning_rate: float,
    settings: CaptureSettings,
    folder: Path,
) -> dict[tuple[str, int, float], Result]:
    """Results per (objective, steps of drift, temperature)."""
    cache, size = write_cache(teacher, held_out, folder / "cache", settings), len(held_out[0])
    student = copy.deepcopy(teacher)
    results: dict[tuple[str, int, float], Result] = {}
    done = 0
    for stop in stops:
        student.train()
        drift(student, train, stop - done, done, learning_rate)
        done = stop
        student.eval()
        compared: dict[tuple[str, float], Comparisons] = {
            (name, temperature if case.kl_coef else 1.0): Comparisons()
            for name, case in CASES.items()
            for temperature in temperatures
        }
        for number, ids_BL in enumerate(held_out):
            rows = range(number * size, (number + 1) * size)
            with torch.no_grad():
                logits = teacher(input_ids=ids_BL).logits[:, :-1].flatten(0, 1)
            log_p0 = torch.log_softmax(logits.double(), -1)
            ce = from_both_models(student, ids_BL, log_p0, lambda z, _, y, __: cross_entropy(z, y), 1.0)
            for (name, temperature), found in compared.items():
                case = CASES[name]
                ours = from_the_cache(student, cache, rows, case, temperature)
                found.add(ours, from_both_models(student, ids_BL, log_p0, case.term, temperature), ce)
            print(f"{stop} steps, batch {number + 1} of {len(held_out)} done", file=sys.stderr, flush=True)
        results |= {(name, stop, t): found.result() for (name, t), found in compared.items()}
    return results


def print_report(results: dict[tuple[str, int, float], Result]) -> None:
    """One table."""
    print("| objective | steps | T | angle, a batch | angle, the step | norm ratio | norm / CE |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for (name, stop, temperature), result in results.items():
        step = result.step
        values = (result.batch_angle, step.angle, step.norm_ratio, step.relative_to_ce)
        cells = ["" if math.isnan(value) else f"{value:.4f}" for value in values]
        print(f"| {name} | {stop} | {temperature:g} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = arguments(__doc__)
    args = parser.parse_args()
    teacher, train, held_out = teacher_and_texts(parser, args)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(
            teacher,
            train,
            held_out,
            stops=sorted(args.steps),
            temperatures=args.temperatures,
            learning_rate=args.learning_rate,
            settings=CaptureSettings(min_prob=args.min_prob, draw_rate=args.tail_draws),
            folder=Path(folder),
        )
    print_report(results)
    if args.json:
        rows = [
            {"objective": n, "steps": s, "temperature": t, "batch_angle": r.batch_angle, "step": vars(r.step)}
            for (n, s, t), r in results.items()
        ]
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
