"""How faithful are gradients from a cache? Compared with the online two-model computation, as drift grows.

    python benchmarks/fidelity.py [--model examples/tiny-base] [--steps 0 10 100] [--temperatures 0.5 1 2]

The student starts as the teacher and drifts by plain fine-tuning. At each stop the gradient of the KL term
alone with respect to *all parameters* is taken seven ways:

    online         KL(p || q) over the full vocabulary, both models run: the truth
    cache          our loss on our cache: written by CacheWriter with its default codec, read by TeacherCache
    bucket only    the same cache, its tail draws left out
    renormalised   the same stored entries, renormalised to one, the rest of the vocabulary impossible
    both sides     the student renormalised over the same entries as well (an option of MaxText, NeMo-RL and
                   Axolotl): zero at the initial weights, but nothing outside the entries is seen at all
    zero-filled    the same entries at their true probabilities, the tail's term dropped
    sampled        50 draws at T = 1, importance-weighted to T (Sparse Logit Sampling, ACL 2025)

Draws are noise without bias: it shrinks with the tokens a gradient is averaged over, which a bias does not.
So two things are reported per method, each against the truth of the same tokens: the median over batches,
and the *step*, the mean gradient of all batches. At step 0 of the drift the truth is zero; there the norm is
given relative to the cross-entropy's gradient.
"""

import argparse
import copy
import json
import math
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from fidelity_targets import capture, sampled_targets, topk_targets
from teacher_batches import batch_from_topk

from formats.cache import TeacherCache
from formats.capture_settings import CaptureSettings
from formats.codec.config import CodecConfig
from formats.disk.token_row import TokenRow
from formats.logprobs.tail_draws import starts
from formats.logprobs.topk import TopKLogprobs
from formats.writer import CacheWriter
from trainer.loss.label_annealing_loss import label_annealing_loss

METHODS = ("cache", "bucket only", "renormalised", "both sides", "zero-filled", "sampled")
NUM_DRAWS = 50


@dataclass(frozen=True)
class Comparison:
    """One gradient against the truth."""

    angle: float
    """Degrees."""
    norm_ratio: float
    relative_error: float
    relative_to_ce: float
    """|gradient| / |gradient of the cross-entropy|: the only meaningful number at step 0."""


def parameter_gradient(model: Any) -> torch.Tensor:
    """All gradients in one float64 vector."""
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def gradient_from_logits(model: Any, ids_BS: torch.Tensor, grad_logits_NV: torch.Tensor) -> torch.Tensor:
    """The parameter gradient that a given gradient with respect to the logits [B * (S - 1), V] causes."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=ids_BS).logits[:, :-1].flatten(0, 1)
    logits.backward(gradient=grad_logits_NV.to(logits.dtype))
    return parameter_gradient(model)


def gradient_from_cache(
    model: Any,
    ids_BS: torch.Tensor,
    topk: TopKLogprobs,
    kept_P: np.ndarray,
    temperature: float,
    draws: bool,
) -> torch.Tensor:
    """The KL gradient of the product's loss over the positions `kept_P`."""
    model.zero_grad(set_to_none=True)
    batch, length = ids_BS.shape
    hidden = model.model(input_ids=ids_BS).last_hidden_state.flatten(0, 1)
    rows = np.arange(batch * length).reshape(batch, length)[:, :-1].reshape(-1)
    teacher = batch_from_topk(rows[kept_P], topk.take(kept_P), temperature, draws)
    no_labels = torch.full((batch * length,), -100)
    label_annealing_loss(hidden, model.lm_head.weight, no_labels, teacher).loss.backward()
    return parameter_gradient(model)


def compare(gradient: torch.Tensor, truth: torch.Tensor, ce: torch.Tensor) -> Comparison:
    """Angle, norm ratio and relative error; NaN where the truth is zero."""
    norm, true_norm = gradient.norm(), truth.norm()
    if true_norm < 1e-5 * ce.norm():
        return Comparison(math.nan, math.nan, math.nan, float(norm / ce.norm()))
    cosine = float(torch.dot(gradient, truth) / (norm * true_norm))
    return Comparison(
        math.degrees(math.acos(min(1.0, cosine))),
        float(norm / true_norm),
        float((gradient - truth).norm() / true_norm),
        float(norm / ce.norm()),
    )


def batch_gradients(
    student: Any,
    teacher: Any,
    ids_BS: torch.Tensor,
    topk: TopKLogprobs,
    temperature: float,
    seed: int,
    least_mass: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Gradients of all methods, "online" and "ce" on one batch, over the positions whose kept tokens hold at
    least `least_mass`."""
    with torch.no_grad():
        z = student(input_ids=ids_BS).logits[:, :-1].flatten(0, 1).double()
        logprobs = torch.log_softmax(teacher(input_ids=ids_BS).logits[:, :-1].flatten(0, 1).double(), -1)
    kept_P = np.flatnonzero(topk.head_mass(1.0) >= least_mass)
    share_N1 = torch.zeros(len(z), 1, dtype=torch.float64)  # of every position in the mean
    share_N1[torch.as_tensor(kept_P)] = 1.0 / len(kept_P)
    beta = 1.0 / temperature
    q, p = torch.softmax(beta * z, -1), torch.softmax(beta * logprobs, -1)
    labels = ids_BS[:, 1:].flatten()
    ce = torch.softmax(z, -1)
    ce[torch.arange(len(z)), labels] -= 1.0

    stored, mass = topk_targets(topk, temperature, z.shape[1])
    kept_q = torch.where(stored > 0, q, 0.0)
    generator = torch.Generator().manual_seed(seed)
    gradients = {
        "online": beta * (q - p),
        "renormalised": beta * (q - stored / mass),
        "both sides": beta * (kept_q / kept_q.sum(1, keepdim=True) - stored / mass),
        "zero-filled": beta * (mass * q - stored),
        "sampled": beta * (q - sampled_targets(logprobs, temperature, NUM_DRAWS, generator)),
    }
    found = {name: gradient_from_logits(student, ids_BS, g * share_N1) for name, g in gradients.items()}
    for name, draws in (("cache", True), ("bucket only", False)):
        found[name] = gradient_from_cache(student, ids_BS, topk, kept_P, temperature, draws)
    found["ce"] = gradient_from_logits(student, ids_BS, ce * share_N1)
    return found


def write_cache(
    teacher: Any,
    batches: list[torch.Tensor],
    folder: Path,
    settings: CaptureSettings,
) -> TeacherCache:
    """Every sequence's teacher targets in a cache with its default codec; prints what a position holds."""
    vocab_size = teacher.config.vocab_size
    with CacheWriter(
        folder,
        identity={},
        vocab_size=vocab_size,
        min_prob=settings.min_prob,
        max_k=settings.max_k,
        codec=CodecConfig(draw_rate=settings.draw_rate),
    ) as writer:
        for ids_BS in batches:
            for ids in ids_BS:
                mask = np.ones(len(ids), dtype=bool)
                mask[0] = False
                with torch.no_grad():
                    logits = teacher(input_ids=ids[None]).logits[0, :-1]
                row = TokenRow(ids.numpy(), mask)
                begin = starts(row.key, row.positions())
                writer.append(row, capture(logits, settings, begin, row.label_ids()))
    cache = TeacherCache(folder)
    shards = cache.manifest.shards
    positions, entries, stored = (
        sum(getattr(shard, name) for shard in shards)
        for name in ("num_positions", "num_entries", "num_payload_bytes")
    )
    mass = np.concatenate([row.teacher.head_mass(1.0) for row in cache])
    draws = np.concatenate([row.teacher.draws.counts for row in cache])
    print(
        f"tokens of p >= {settings.min_prob:g}, at most {settings.max_k}, draws at rate {settings.draw_rate}: "
        f"{entries / positions:.1f} entries, {draws.mean():.1f} draws and {stored / positions:.1f} bytes per "
        f"position, mass {mass.mean():.3f}; {positions} positions in {len(batches)} batches\n"
    )
    return cache


def through_a_cache(
    teacher: Any,
    batches: list[torch.Tensor],
    folder: Path,
    settings: CaptureSettings,
) -> list[TopKLogprobs]:
    """Every batch's teacher targets, written to a cache and read back."""
    cache, size = write_cache(teacher, batches, folder, settings), len(batches[0])
    return [
        TopKLogprobs.concatenate([cache[i].teacher for i in range(start, start + size)])
        for start in range(0, len(cache), size)
    ]


def drift(
    student: Any, batches: list[torch.Tensor], num_steps: int, start: int, learning_rate: float
) -> None:
    """Plain fine-tuning, continued over `batches` in turn."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate)
    for step in range(start, start + num_steps):
        ids = batches[step % len(batches)]
        student.zero_grad(set_to_none=True)
        student(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@dataclass(frozen=True)
class Result:
    """One method at one stop and temperature."""

    batches: list[Comparison]
    step: Comparison
    """Of the mean gradient of all batches."""


def measure(
    teacher: Any,
    train: list[torch.Tensor],
    held_out: list[torch.Tensor],
    *,
    stops: list[int],
    temperatures: list[float],
    learning_rate: float,
    settings: CaptureSettings,
    least_mass: float = 0.0,
) -> dict[tuple[int, float, str], Result]:
    """Results per (steps of drift, temperature, method)."""
    student = copy.deepcopy(teacher)
    results: dict[tuple[int, float, str], Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        caches = through_a_cache(teacher, held_out, Path(folder) / "cache", settings)
    done = 0
    for stop in stops:
        student.train()
        drift(student, train, stop - done, done, learning_rate)
        done = stop
        student.eval()
        for temperature in temperatures:
            compared: dict[str, list[Comparison]] = {method: [] for method in METHODS}
            sums: dict[str, torch.Tensor] = {}
            for number, (ids, topk) in enumerate(zip(held_out, caches, strict=True)):
                found = batch_gradients(student, teacher, ids, topk, temperature, number, least_mass)
                for name, gradient in found.items():
                    sums[name] = sums[name] + gradient if name in sums else gradient
                for method in METHODS:
                    compared[method].append(compare(found[method], found["online"], found["ce"]))
            for method in METHODS:
                step = compare(sums[method], sums["online"], sums["ce"])
                results[stop, temperature, method] = Result(compared[method], step)
            print(f"{stop} steps, T = {temperature:g} done", file=sys.stderr, flush=True)
    return results


def print_report(results: dict[tuple[int, float, str], Result]) -> None:
    """One table: medians over batches, and the step."""
    print("| steps | T | method | batch: angle | norm ratio | error | step: angle | norm ratio | norm / CE |")
    print("|---:|---:|---|---:|---:|---:|---:|---:|---:|")
    for (stop, temperature, method), result in results.items():
        values = [
            statistics.median(getattr(one, name) for one in result.batches)
            for name in ("angle", "norm_ratio", "relative_error")
        ]
        values += [result.step.angle, result.step.norm_ratio, result.step.relative_to_ce]
        cells = ["" if math.isnan(value) else f"{value:.4f}" for value in values]
        print(f"| {stop} | {temperature:g} | {method} | " + " | ".join(cells) + " |")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every benchmark of gradients asks: the model, its drift, the held-out text, the cache."""
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=root / "examples" / "tiny-base")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 10, 100])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--batches", type=int, default=8, help="held-out batches, together one step")
    parser.add_argument("--rows", type=int, default=4, help="rows per batch")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--min-prob", type=float, default=CaptureSettings.min_prob, help="as in cache build")
    parser.add_argument("--tail-draws", type=int, default=CaptureSettings.draw_rate, help="as in cache build")
    parser.add_argument("--json", type=Path, help="write every figure here")
    return parser


def teacher_and_texts(
    parser: argparse.ArgumentParser, args: argparse.Namespace
) -> tuple[Any, list[torch.Tensor], list[torch.Tensor]]:
    """The model, batches to drift on, and the held-out ones."""
    if not (args.model / "config.json").is_file():
        parser.error(f"no model in {args.model}; run examples/make_tiny_base.py or pass --model")
    from fidelity_data import text_batches
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train = text_batches(tokenizer, "target-train", 20, rows=4, length=128)
    held_out = text_batches(tokenizer, "target-heldout", args.batches, rows=args.rows, length=args.length)
    return teacher, train, held_out


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--max-k", type=int, default=CaptureSettings.max_k, help="as in cache build")
    parser.add_argument(
        "--least-mass",
        type=float,
        default=0.0,
        metavar="P",
        help="KL only at positions whose kept tokens hold so much, as nearly all of a large model's do",
    )
    args = parser.parse_args()
    teacher, train, held_out = teacher_and_texts(parser, args)
    results = measure(
        teacher,
        train,
        held_out,
        stops=sorted(args.steps),
        temperatures=args.temperatures,
        learning_rate=args.learning_rate,
        settings=CaptureSettings(min_prob=args.min_prob, max_k=args.max_k, draw_rate=args.tail_draws),
        least_mass=args.least_mass,
    )
    print_report(results)
    if args.json:
        rows = [
            {"steps": s, "temperature": t, "method": m, "step": vars(found.step)}
            | {"batches": [vars(one) for one in found.batches]}
            for (s, t, m), found in results.items()
        ]
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
