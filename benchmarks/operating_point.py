"""Which `--min-prob` and `--tail-draws`? Bytes per position against the angle of the parameter gradient.

    python benchmarks/operating_point.py --work WORK --teacher tiny [--rows 128] [--steps 10 100]

For one teacher of teacher_models.py and each of its students every pair of threshold and rate is stored with
the real codec, read back, and compared with the exact full-vocabulary KL gradient with respect to *all
parameters*. What is reported for a step of N tokens is the angle in degrees and the ratio of the norms.

A backward pass per setting would take days, so errors are measured along a few directions v of parameter
space. With J the derivative of all logits with respect to the parameters and e the error of the gradient
with respect to the logits, the parameter gradient errs by J'e, and

    v . J'e = (J v) . e            E over v ~ N(0, 1) of (v . J'e)^2 = |J'e|^2

so one difference quotient of the logits along v serves every setting and every temperature. Rows of text are
independent; for each setting the variance of v . J'e over rows is its *noise*, which grows with the number of
rows, and the square of its mean (less noise) its *bias*, which grows with the number's square. The exact
gradient g is taken by backward passes; the quotient along g itself gives the norm's ratio, and checks the
whole arrangement: it must return |g|. benchmarks/fidelity.py has no such shortcut and confirms the outcome.

P: positions of a row, V: vocabulary, E: kept entries, S: draws, K: directions, R: rows.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

import numpy as np
import torch
from teacher_batches import batch_from_topk
from teacher_models import TEACHERS, Subject, prepare

from formats.codec.config import CodecConfig
from formats.codec.payload import Codec, section_bytes
from formats.codec.rank_table import rank_by_frequency
from formats.logprobs import ragged
from formats.logprobs.tail_draws import POWER, TailDraws, starts
from formats.logprobs.tail_function import TAIL_BETAS
from formats.logprobs.topk import TopKLogprobs
from trainer.loss.kl import LARGEST_RATIO, LARGEST_SHARE
from trainer.loss.label_annealing_loss import label_annealing_loss

TEMPERATURES = (1.0, 2.0, 4.0)
MIN_PROBS = (1e-3, 2.5e-3, 5e-3, 1e-2, 2e-2, 3e-2, 5e-2, 0.1)
RATES = (0, 2, 4, 6, 8, 12, 16, 24)
MAX_K = 128
DEFAULT_STEP = 65_536
LOGIT_CHANGE = 0.02
"""Root mean square change of a logit to either side in a difference quotient."""


@dataclass(frozen=True)
class Setting:
    """One way to store the teacher."""

    min_prob: float
    rate: int
    codec: CodecConfig = field(default_factory=CodecConfig)

    @property
    def name(self) -> str:
        """For tables."""
        default, parts = CodecConfig(), [f"p >= {self.min_prob:g}, draws at {self.rate}"]
        for key, value in vars(self.codec).items():
            if value != getattr(default, key):
                parts.append(f"{key} {value}")
        return ", ".join(parts)


def grid() -> list[Setting]:
    """All pairs."""
    return [Setting(min_prob, rate) for min_prob in MIN_PROBS for rate in RATES]


def codec_variants(pairs: Sequence[tuple[float, int]]) -> list[Setting]:
    """What the codec could do more coarsely, one thing at a time and together."""
    found = []
    for min_prob, rate in pairs:
        for options in (
            {"probabilities": "float32"},
            {"sqrt_steps": 280, "linear_steps": 900},
            {"sqrt_steps": 140, "linear_steps": 450},
            {"sqrt_steps": 70, "linear_steps": 225},
            {"sqrt_steps": 280, "linear_steps": 225},
            {"sqrt_steps": 120, "linear_steps": 120},
            {"sqrt_steps": 60, "linear_steps": 60},
            {"tail_steps": 64},
            {"tail_steps": 32},
            {"tail_steps": 16},
            {"draw_steps": 8},
            {"draw_steps": 4},
            {"draw_steps": 2},
            {"sqrt_steps": 140, "linear_steps": 450, "tail_steps": 64, "draw_steps": 8},
            {"sqrt_steps": 140, "linear_steps": 450, "tail_steps": 32, "draw_steps": 8},
            {"sqrt_steps": 120, "linear_steps": 120, "tail_steps": 32, "draw_steps": 8},
            {"sqrt_steps": 120, "linear_steps": 120, "tail_steps": 32, "draw_steps": 4},
            {"sqrt_steps": 60, "linear_steps": 60, "tail_steps": 16, "draw_steps": 4},
        ):
            if rate == 0 and options.keys() & {"draw_steps"}:
                continue
            found.append(Setting(min_prob, rate, replace(CodecConfig(), **options)))  # type: ignore[arg-type]
    return found


def pairs_of(texts: Sequence[str]) -> list[tuple[float, int]]:
    """`0.02:8` as (min_prob, rate)."""
    return [(float(p), int(rate)) for p, _, rate in (text.partition(":") for text in texts)]


# --- capture ----------------------------------------------------------------------------------------------


def capture_row(
    logits_PV: torch.Tensor, label_ids: np.ndarray, rates: Sequence[int], starts_P: np.ndarray
) -> list[TopKLogprobs]:
    """One row at the lowest threshold, with draws of every rate: what the product captures, from full logits."""
    logprobs_PV = torch.log_softmax(logits_PV.double(), -1)
    labels_P = logprobs_PV[torch.arange(len(label_ids)), torch.as_tensor(label_ids).long()].numpy()
    values_PK, ids_PK = logprobs_PV.topk(min(MAX_K, logprobs_PV.shape[1]), dim=-1)
    keep_PK = values_PK >= math.log(min(MIN_PROBS))
    keep_PK[:, 0] = True
    rest_PV = logprobs_PV.scatter_(1, ids_PK, torch.where(keep_PK, -torch.inf, values_PK))
    nodes_PB = torch.stack([torch.logsumexp(beta * rest_PV, -1) for beta in TAIL_BETAS], dim=1)
    running_PV = rest_PV.mul(POWER).exp_().cumsum_(1).numpy()
    rest = rest_PV.numpy()
    heads = TopKLogprobs(
        offsets=np.concatenate([[0], keep_PK.sum(1).cumsum(0).numpy()]),
        token_ids=ids_PK[keep_PK].numpy().astype(np.int32),
        logprobs=values_PK[keep_PK].numpy().astype(np.float32),
        log_tail_nodes=nodes_PB.numpy().astype(np.float32),
        vocab_size=logprobs_PV.shape[1],
        draws=TailDraws.none(len(logprobs_PV)),
        label_logprobs=labels_P,
    )
    found = []
    for rate in rates:
        if rate == 0:
            found.append(heads)
            continue
        ids = []
        for position, running_V in enumerate(running_PV):
            points = np.arange(starts_P[position], rate * running_V[-1], 1.0)
            ids.append(np.searchsorted(rate * running_V, points, side="right"))
        counts = [len(some) for some in ids]
        flat = np.concatenate(ids)
        logprobs = rest[np.repeat(np.arange(len(ids)), counts), flat]
        found.append(replace(heads, draws=TailDraws(ragged.offsets_of(counts), flat, logprobs, rate)))
    return found


def captures(subject: Subject, rows: int) -> dict[int, list[TopKLogprobs]]:
    """Rate to one item per row; kept in the work folder."""
    file = subject.work / f"{subject.name}-capture-{rows}.npz"
    if not file.exists():
        teacher = subject.teacher()
        arrays: dict[str, np.ndarray] = {}
        for number, row in enumerate(subject.held_out_RS[:rows]):
            with torch.no_grad():
                logits_PV = teacher(input_ids=row[None]).logits[0, :-1]
            begin = starts(row.numpy().astype("<i4").tobytes()[-8:], np.arange(len(row) - 1))
            rows_by_rate = capture_row(logits_PV, row[1:].numpy(), RATES, begin)
            for rate, topk in zip(RATES, rows_by_rate, strict=True):
                if rate == 0:
                    for name in ("offsets", "token_ids", "logprobs", "log_tail_nodes", "label_logprobs"):
                        arrays[f"{number}-{name}"] = getattr(topk, name)
                for name in ("offsets", "token_ids", "logprobs"):
                    arrays[f"{number}-{rate}-{name}"] = getattr(topk.draws, name)
        np.savez(file, vocab_size=logits_PV.shape[1], **arrays)  # type: ignore[arg-type]
    found: dict[int, list[TopKLogprobs]] = {rate: [] for rate in RATES}
    with np.load(file) as data:
        for number in range(rows):
            names = ("offsets", "token_ids", "logprobs", "log_tail_nodes")
            heads = [data[f"{number}-{name}"] for name in names]
            for rate in RATES:
                drawn = [data[f"{number}-{rate}-{name}"] for name in names[:3]]
                draws = TailDraws(*drawn, rate)  # type: ignore[misc]
                labels = data[f"{number}-label_logprobs"]
                found[rate].append(TopKLogprobs(*heads, int(data["vocab_size"]), draws, labels))  # type: ignore[misc]
    return found


@dataclass(frozen=True)
class Stored:
    """Rows after the codec."""

    rows: list[TopKLogprobs]
    sections: dict[str, float]
    """Bytes per position of every section, each compressed alone."""
    payload: float
    """Bytes per position."""
    entries: float
    draws: float
    mass: float


def store(setting: Setting, captured: dict[int, list[TopKLogprobs]], rows_RS: torch.Tensor) -> Stored:
    """Prune, encode and decode all rows of the captured rate; the rank table is learned from the same rows."""
    labels = [row[1:].numpy().astype(np.int32) for row in rows_RS]
    pruned = [row.prune(setting.min_prob, MAX_K) for row in captured[setting.rate]]
    ranked = rank_by_frequency(np.concatenate([row.token_ids for row in pruned]), pruned[0].vocab_size)
    config = replace(setting.codec, draw_rate=setting.rate)
    codec = Codec(config, pruned[0].vocab_size, MAX_K, ranked if config.rank_ids else None)
    pairs = list(zip(pruned, labels[: len(pruned)], strict=True))
    payloads = [codec.encode(*pair) for pair in pairs]
    count = sum(map(len, pruned))
    alone = section_bytes(codec, pairs[:8])
    scale = sum(map(len, payloads)) / count / sum(alone.values())
    parts = [size * scale for size in alone.values()]
    return Stored(
        rows=[codec.decode(payload, ids) for payload, (_, ids) in zip(payloads, pairs, strict=True)],
        sections=dict(zip(alone, parts, strict=True)),
        payload=sum(map(len, payloads)) / count,
        entries=sum(row.num_entries for row in pruned) / count,
        draws=sum(len(row.draws.token_ids) for row in pruned) / count,
        mass=float(np.concatenate([row.head_mass(1.0) for row in pruned]).mean()),
    )


# --- the derivative of the logits -------------------------------------------------------------------------


@dataclass(frozen=True)
class Slope:
    """How final hidden states and output head change along one direction, and their middle."""

    hidden_RPD: torch.Tensor
    hidden_slope_RPD: torch.Tensor
    head_VD: torch.Tensor
    head_slope_VD: torch.Tensor

    def logits(self, row: int) -> torch.Tensor:
        """[P, V]: J v of one row; exact for the two end points of the quotient."""
        return self.hidden_slope_RPD[row] @ self.head_VD.T + self.hidden_RPD[row] @ self.head_slope_VD.T


def hidden_states(model: Any, rows_RS: torch.Tensor) -> torch.Tensor:
    """[R, P, D] final hidden states of the positions that predict a token."""
    with torch.no_grad():
        return torch.cat([model.model(input_ids=row[None]).last_hidden_state[:, :-1] for row in rows_RS])


def shift(model: Any, direction: Sequence[torch.Tensor], size: float) -> None:
    """Move all parameters along a direction."""
    with torch.no_grad():
        for parameter, part in zip(model.parameters(), direction, strict=True):
            parameter.add_(part, alpha=size)


def slope(model: Any, rows_RS: torch.Tensor, direction: Sequence[torch.Tensor]) -> Slope:
    """Symmetric difference quotient of the model along a direction; the model is put back."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    norm = math.sqrt(sum(float(part.double().square().sum()) for part in direction))
    size = 1e-3 * math.sqrt(sum(float(p.double().square().sum()) for p in before)) / norm
    with torch.no_grad():
        middle = model(input_ids=rows_RS[:1]).logits
        shift(model, direction, size)
        change = float((model(input_ids=rows_RS[:1]).logits - middle).square().mean().sqrt())
        shift(model, direction, -size)
    size *= LOGIT_CHANGE / change
    ends = []
    for end in (size, -size):
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), before, strict=True):
                parameter.copy_(value)
        shift(model, direction, end)
        ends.append((hidden_states(model, rows_RS), model.lm_head.weight.detach().clone()))
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)
    (h_1, w_1), (h_0, w_0) = ends
    return Slope(0.5 * (h_1 + h_0), (h_1 - h_0) / (2 * size), 0.5 * (w_1 + w_0), (w_1 - w_0) / (2 * size))


def random_direction(model: Any, seed: int) -> list[torch.Tensor]:
    """A standard normal number per parameter."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return [torch.randn(parameter.shape, generator=generator) for parameter in model.parameters()]


# --- the exact gradient -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """The true KL gradient of all rows at one temperature."""

    total: list[torch.Tensor]
    """Sum over all positions, a tensor per parameter."""
    row_squares: list[float]
    """|gradient|^2 of each row's sum."""

    def squared_norm(self, rows: float) -> float:
        """Expected |mean gradient over positions|^2 times rows^2, for a step of so many rows."""
        count = len(self.row_squares)
        whole = sum(float(part.double().square().sum()) for part in self.total)
        together = (whole - sum(self.row_squares)) / (count * (count - 1))
        alone = sum(self.row_squares) / count
        return rows * rows * together + rows * (alone - together)


def exact_gradients(
    student: Any,
    rows_RS: torch.Tensor,
    teacher_RPD: torch.Tensor,
    teacher_VD: torch.Tensor,
    temperatures: Sequence[float],
) -> dict[float, Exact]:
    """beta (q - p) through the whole student, row after row; of the teacher its last hidden states and head."""
    parameters = list(student.parameters())
    totals = {t: [torch.zeros_like(p) for p in parameters] for t in temperatures}
    squares: dict[float, list[float]] = {t: [] for t in temperatures}
    for row, teacher_PD in zip(rows_RS, teacher_RPD, strict=True):
        l_PV = teacher_PD @ teacher_VD.T
        z_PV = student(input_ids=row[None]).logits[0, :-1]
        for number, t in enumerate(temperatures):
            with torch.no_grad():
                beta = 1 / t
                difference = torch.softmax(beta * z_PV.double(), -1) - torch.softmax(beta * l_PV.double(), -1)
                gradient = (beta * difference).float()
            more = number + 1 < len(temperatures)
            found = torch.autograd.grad(z_PV, parameters, gradient, retain_graph=more)
            squares[t].append(sum(float(part.double().square().sum()) for part in found))
            for total, part in zip(totals[t], found, strict=True):
                total += part
    return {t: Exact(totals[t], squares[t]) for t in temperatures}


# --- errors along directions ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Student and directions of one row at one temperature, and the exact gradient along each direction."""

    beta: float
    q_PV: np.ndarray
    slopes_KPV: list[np.ndarray]
    mean_slope_KP: np.ndarray
    """sum over V of q times the slope."""
    exact_K: np.ndarray


def row_at(beta: float, z_PV: torch.Tensor, l_PV: torch.Tensor, slopes_KPV: Sequence[torch.Tensor]) -> Row:
    """Everything of a row that does not depend on the setting."""
    q_PV = torch.softmax(beta * z_PV.double(), -1)
    difference = q_PV - torch.softmax(beta * l_PV.double(), -1)
    mean_KP = torch.stack([(q_PV * slope_PV).sum(1) for slope_PV in slopes_KPV]).numpy()
    exact_K = np.array([beta * float((difference * slope_PV).sum()) for slope_PV in slopes_KPV])
    return Row(beta, q_PV.numpy(), [s.numpy() for s in slopes_KPV], mean_KP, exact_K)


def limited_pull(scale_S: np.ndarray, ratio_S: np.ndarray) -> np.ndarray:
    """What a draw adds, with the limit of trainer/loss/kl.py on its ratio."""
    return scale_S * (np.minimum(ratio_S, np.maximum(LARGEST_SHARE / scale_S, LARGEST_RATIO)) - 1)


def along(row: Row, topk: TopKLogprobs) -> np.ndarray:
    """[K]: the loss's gradient of one row along each direction (docs/method.md; trainer/loss/kl.py)."""
    beta, temperature = row.beta, 1 / row.beta
    log_z_P = topk.log_partition(temperature).astype(np.float64)
    at_E = ragged.segment_of(topk.offsets)
    p_E = np.exp(beta * topk.logprobs.astype(np.float64) - log_z_P[at_E])
    q_E = row.q_PV[at_E, topk.token_ids]
    tail_q_P = np.maximum(1 - ragged.segment_sum(q_E, topk.offsets), 1e-12)
    tail_p_P = np.exp(topk.log_tail(temperature) - log_z_P)
    coefficient_P = beta * (1 - tail_p_P / tail_q_P)
    found = []
    draws = topk.draws
    if draws.rate:
        at_S = ragged.segment_of(draws.offsets)
        p_S = np.exp(beta * draws.logprobs.astype(np.float64) - log_z_P[at_S])
        ratio_S = tail_p_P[at_S] * row.q_PV[at_S, draws.token_ids] / tail_q_P[at_S] / p_S
        pull_S = beta * limited_pull(draws.weights * p_S, ratio_S)
        spread_P = ragged.segment_sum(pull_S, draws.offsets)
    for slope_PV, mean_P in zip(row.slopes_KPV, row.mean_slope_KP, strict=True):
        slope_E = slope_PV[at_E, topk.token_ids]
        tail_slope_P = mean_P - ragged.segment_sum(q_E * slope_E, topk.offsets)
        value = float((beta * (q_E - p_E) * slope_E).sum() + (coefficient_P * tail_slope_P).sum())
        if draws.rate:
            value += float((pull_S * slope_PV[at_S, draws.token_ids]).sum())
            value -= float((spread_P * tail_slope_P / tail_q_P).sum())
        found.append(value)
    return np.array(found)


@dataclass(frozen=True)
class Angle:
    """A setting's gradient in a step of N tokens."""

    degrees: float
    norm: float
    noise_degrees: float
    """What draws and rounding alone would cause: falls with the root of the tokens."""
    bias_degrees: float
    """What no number of tokens takes away."""


def angle(errors_RK: np.ndarray, exact: Exact, rows: float) -> Angle:
    """From errors along K - 1 random directions and, last, along the exact gradient (unit length)."""
    random_RK, parallel_R = errors_RK[:, :-1], errors_RK[:, -1]
    count = len(errors_RK)
    noise = float(random_RK.var(0, ddof=1).mean())
    # The mean of rows is noisy itself: what is not clearly above that is no bias.
    mean_square = float((random_RK.mean(0) ** 2).mean())
    seen = mean_square > noise / count * (1 + 2 * math.sqrt(2 / random_RK.shape[1]))
    bias = mean_square - noise / count if seen else 0.0
    true = math.sqrt(exact.squared_norm(rows))
    parallel = rows * float(parallel_R.mean())
    across = max(0.0, rows * rows * bias - parallel**2)
    along_it = true + parallel
    noise_part = math.sqrt(rows * noise)
    return Angle(
        degrees=math.degrees(math.atan2(math.hypot(noise_part, math.sqrt(across)), along_it)),
        norm=along_it / true,
        noise_degrees=math.degrees(math.atan2(noise_part, along_it)),
        bias_degrees=math.degrees(math.atan2(math.sqrt(across), along_it)),
    )


def measure(
    subject: Subject,
    steps: int,
    stored: dict[str, Stored],
    rows: int,
    num_directions: int,
    temperatures: Sequence[float],
) -> tuple[dict[tuple[str, float], np.ndarray], dict[float, Exact], dict[str, float]]:
    """Errors [R, K] per setting and temperature, the exact gradients, and facts about the drift."""
    rows_RS = subject.held_out_RS[:rows]
    teacher, student = subject.teacher(), subject.student(steps).eval()
    begin = time.time()

    def say(what: str) -> None:
        print(
            f"{subject.name}, {steps} steps: {what}, {time.time() - begin:.0f} s", file=sys.stderr, flush=True
        )

    teacher_RPD, teacher_VD = hidden_states(teacher, rows_RS), teacher.lm_head.weight.detach()
    exact = exact_gradients(student, rows_RS, teacher_RPD, teacher_VD, temperatures)
    say("exact gradients")
    student_RPD = hidden_states(student, rows_RS)
    slopes = [slope(student, rows_RS, random_direction(student, k)) for k in range(num_directions)]
    norm = math.sqrt(sum(float(part.double().square().sum()) for part in exact[1.0].total))
    slopes.append(slope(student, rows_RS, [part / norm for part in exact[1.0].total]))
    say("slopes")
    student_VD = student.lm_head.weight.detach()
    errors: dict[tuple[str, float], list[np.ndarray]] = {}
    along_exact, kl = 0.0, 0.0
    for r in range(rows):
        l_PV, z_PV = teacher_RPD[r] @ teacher_VD.T, student_RPD[r] @ student_VD.T
        slopes_KPV = [one.logits(r) for one in slopes]
        kl += float(
            torch.nn.functional.kl_div(
                torch.log_softmax(z_PV, -1),
                torch.log_softmax(l_PV, -1),
                log_target=True,
                reduction="batchmean",
            )
        )
        for t in temperatures:
            row = row_at(1 / t, z_PV, l_PV, slopes_KPV)
            if t == 1.0:
                along_exact += float(row.exact_K[-1])
            for name, found in stored.items():
                errors.setdefault((name, t), []).append(along(row, found.rows[r]) - row.exact_K)
    say("errors")
    facts = {"kl": kl / rows, "along_exact_over_norm": along_exact / norm, "rows": rows}
    return {key: np.stack(value) for key, value in errors.items()}, exact, facts


def gradient(beta: float, q_PV: np.ndarray, topk: TopKLogprobs) -> np.ndarray:
    """float64 [P, V]: the loss's gradient with respect to the logits, in full."""
    temperature = 1 / beta
    log_z_P = topk.log_partition(temperature).astype(np.float64)
    at_E, ids_E = ragged.segment_of(topk.offsets), topk.token_ids
    q_E = q_PV[at_E, ids_E]
    tail_q_P = np.maximum(1 - ragged.segment_sum(q_E, topk.offsets), 1e-12)
    tail_p_P = np.exp(topk.log_tail(temperature) - log_z_P)
    coefficient_P = beta * (1 - tail_p_P / tail_q_P)
    draws = topk.draws
    if draws.rate:
        at_S = ragged.segment_of(draws.offsets)
        p_S = np.exp(beta * draws.logprobs.astype(np.float64) - log_z_P[at_S])
        ratio_S = tail_p_P[at_S] * q_PV[at_S, draws.token_ids] / tail_q_P[at_S] / p_S
        pull_S = beta * limited_pull(draws.weights * p_S, ratio_S)
        coefficient_P = coefficient_P - ragged.segment_sum(pull_S, draws.offsets) / tail_q_P
    found = q_PV * coefficient_P[:, None]
    if draws.rate:
        np.add.at(found, (at_S, draws.token_ids), pull_S)
    p_E = np.exp(beta * topk.logprobs.astype(np.float64) - log_z_P[at_E])
    found[at_E, ids_E] = beta * (q_E - p_E)
    return found


def rounding(
    subject: Subject,
    steps: int,
    captured: dict[int, list[TopKLogprobs]],
    pairs: Sequence[tuple[float, int]],
    rows: int,
    temperatures: Sequence[float],
) -> list[dict[str, Any]]:
    """What coarser codecs add to the noise of draws, per token and with respect to the logits.

    Both are noise that is independent from token to token, so the ratio of their squares is the share by which
    a step's squared angle grows.
    """
    rows_RS = subject.held_out_RS[:rows]
    teacher, student = subject.teacher(), subject.student(steps).eval()
    with torch.no_grad():
        l_RPV = [teacher(input_ids=row[None]).logits[0, :-1] for row in rows_RS]
        z_RPV = [student(input_ids=row[None]).logits[0, :-1] for row in rows_RS]
    lines = []
    for min_prob, rate in pairs:
        exact = store(Setting(min_prob, rate, CodecConfig.lossless()), captured, subject.held_out_RS)
        variants = [Setting(min_prob, rate), *codec_variants([(min_prob, rate)])[1:]]
        stored = {variant.name: store(variant, captured, subject.held_out_RS) for variant in variants}
        for t in temperatures:
            noise, added = 0.0, dict.fromkeys(stored, 0.0)
            for r in range(rows):
                q_PV = torch.softmax(z_RPV[r].double() / t, -1).numpy()
                p_PV = torch.softmax(l_RPV[r].double() / t, -1).numpy()
                unrounded = gradient(1 / t, q_PV, exact.rows[r])
                noise += float(((unrounded - (q_PV - p_PV) / t) ** 2).sum())
                for name, found in stored.items():
                    added[name] += float(((gradient(1 / t, q_PV, found.rows[r]) - unrounded) ** 2).sum())
            for name, found in stored.items():
                share = added[name] / noise
                lines.append(
                    {"setting": name, "steps": steps, "temperature": t, "share": share} | found.sections
                )
                parts = ", ".join(f"{key} {value:.2f}" for key, value in found.sections.items())
                print(
                    f"rounding: {steps} steps, T = {t:g}, {found.payload:.2f} B, adds {share:8.2%} to the squared "
                    f"noise of draws  {name}: {parts}",
                    flush=True,
                )
    return lines


def confirm(
    subject: Subject,
    steps: int,
    stored: dict[str, Stored],
    rows: int,
    temperature: float,
    sizes: Sequence[int],
) -> list[dict[str, Any]]:
    """The same by backward passes of the product's loss: angle and norm of steps of the first `sizes` rows."""
    teacher = subject.teacher()
    teacher_RPD = hidden_states(teacher, subject.held_out_RS[:rows])
    teacher_VD = teacher.lm_head.weight.detach().clone()
    del teacher
    student = subject.student(steps).eval()
    parameters = list(student.parameters())
    totals: dict[str, torch.Tensor] = {}
    lines: list[dict[str, Any]] = []

    def add(name: str, gradient: Sequence[torch.Tensor]) -> None:
        flat = torch.cat([part.flatten() for part in gradient])
        totals[name] = totals[name].add_(flat) if name in totals else flat

    for number, row in enumerate(subject.held_out_RS[:rows]):
        there = teacher_RPD[number : number + 1]
        exact = exact_gradients(student, row[None], there, teacher_VD, [temperature])[temperature]
        add("exact", exact.total)
        for name, found in stored.items():
            hidden_PD = student.model(input_ids=row[None]).last_hidden_state[0, :-1]
            batch = batch_from_topk(np.arange(len(row) - 1), found.rows[number], temperature)
            labels_P = torch.full((len(row) - 1,), -100)
            loss = label_annealing_loss(hidden_PD, student.lm_head.weight, labels_P, batch).loss
            add(name, torch.autograd.grad(loss * (len(row) - 1), parameters))
        if number + 1 not in sizes:
            continue
        true = totals["exact"]
        for name in stored:
            across = totals[name] - true * (true.dot(totals[name]) / true.dot(true))
            along_it = float(totals[name].dot(true) / true.norm())
            degrees = math.degrees(math.atan2(float(across.norm()), along_it))
            norm = float(totals[name].norm() / true.norm())
            tokens = (number + 1) * (len(row) - 1)
            line = {"setting": name, "steps": steps, "temperature": temperature, "tokens": tokens}
            lines.append(line | {"degrees": degrees, "norm": norm, "bytes": stored[name].payload})
            print(
                f"confirmed: {steps} steps, T = {temperature:g}, {tokens} tokens, {stored[name].payload:.1f} B  "
                f"{degrees:.3f} deg, norm {norm:.4f}  {name}",
                flush=True,
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for models and captures")
    parser.add_argument("--teacher", choices=TEACHERS, required=True)
    parser.add_argument("--real-model", type=Path, help="a directory that examples/real/make_model.py made")
    parser.add_argument("--rows", type=int, default=32, help="held-out rows of 512 tokens")
    parser.add_argument("--steps", type=int, nargs="*", default=[10, 100], help="of drift; none: bytes only")
    parser.add_argument("--directions", type=int, default=4, help="random ones")
    parser.add_argument("--temperatures", type=float, nargs="+", default=list(TEMPERATURES))
    parser.add_argument("--step-tokens", type=int, nargs="+", default=[DEFAULT_STEP])
    parser.add_argument("--variants", nargs="*", default=[], metavar="P:RATE", help="try codec settings here")
    parser.add_argument(
        "--confirm",
        nargs="*",
        default=[],
        metavar="P:RATE",
        help="only these, by backward passes of the loss",
    )
    parser.add_argument(
        "--rounding",
        nargs="*",
        default=[],
        metavar="P:RATE",
        help="only what coarser codecs add to the noise here",
    )
    parser.add_argument("--bytes", nargs="*", default=[], metavar="P:RATE", help="only the bytes of these")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 32, 128], help="rows of a confirmed step")
    parser.add_argument("--codec", default="{}", metavar="JSON", help="codec settings of what is confirmed")
    parser.add_argument("--json", type=Path, help="write everything here")
    args = parser.parse_args()
    if 1.0 not in args.temperatures and not args.confirm:
        parser.error("--temperatures must include 1")
    subject = prepare(args.teacher, args.work, args.rows, args.steps, args.real_model)
    captured = captures(subject, args.rows)
    if args.confirm:
        codec = replace(CodecConfig(), **json.loads(args.codec))
        settings = [Setting(min_prob, rate, codec) for min_prob, rate in pairs_of(args.confirm)]
        chosen = {setting.name: store(setting, captured, subject.held_out_RS) for setting in settings}
        lines = []
        for steps in args.steps:
            for t in args.temperatures:
                lines += confirm(subject, steps, chosen, args.rows, t, args.sizes)
        if args.json:
            args.json.write_text(json.dumps(lines, indent=1) + "\n")
        return
    if args.bytes:
        for min_prob, rate in pairs_of(args.bytes):
            codec = replace(CodecConfig(), **json.loads(args.codec))
            found = store(Setting(min_prob, rate, codec), captured, subject.held_out_RS)
            print(
                f"p >= {min_prob:g}, draws at {rate}: {found.payload:.2f} B, {found.entries:.2f} entries, "
                f"{found.draws:.2f} draws, mass {found.mass:.3f}: "
                + ", ".join(f"{name} {size:.2f}" for name, size in found.sections.items()),
                flush=True,
            )
        return
    if args.rounding:
        lines = []
        for steps in args.steps:
            lines += rounding(subject, steps, captured, pairs_of(args.rounding), args.rows, args.temperatures)
        if args.json:
            args.json.write_text(json.dumps(lines, indent=1) + "\n")
        return
    settings = grid() + codec_variants(pairs_of(args.variants))
    stored = {setting.name: store(setting, captured, subject.held_out_RS) for setting in settings}
    print(f"{TEACHERS[args.teacher].what}: {args.rows} rows of 511 positions")
    report: dict[str, Any] = {
        "bytes": {
            name: {"payload": s.payload, "entries": s.entries, "draws": s.draws, "mass": s.mass} | s.sections
            for name, s in stored.items()
        },
        "angles": [],
    }
    for name, found in report["bytes"].items():
        print(f"{name:72} " + ", ".join(f"{key} {value:.2f}" for key, value in found.items()))
    for steps in args.steps:
        errors, exact, facts = measure(subject, steps, stored, args.rows, args.directions, args.temperatures)
        print(f"\n{steps} steps: " + ", ".join(f"{key} {value:.5g}" for key, value in facts.items()))
        for (name, t), found in errors.items():
            for tokens in args.step_tokens:
                got = angle(found, exact[t], tokens / (subject.held_out_RS.shape[1] - 1))
                line = {"setting": name, "steps": steps, "temperature": t, "tokens": tokens} | vars(got)
                report["angles"].append(line)
                print(
                    f"{steps:4} steps, T = {t:g}, {tokens} tokens, {stored[name].payload:6.1f} B  "
                    f"{got.degrees:7.3f} deg (noise {got.noise_degrees:.3f}, bias {got.bias_degrees:.3f}), "
                    f"norm {got.norm:.4f}  {name}"
                )
        report[f"facts-{steps}"] = facts
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
