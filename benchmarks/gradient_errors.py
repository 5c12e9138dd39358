"""How far the gradient from a stored teacher is from the exact one, for any number of settings at once.

The derivative of the logits along a few directions of parameter space serves every setting and temperature
(operating_point.py says why): `slope` takes it, `exact_gradients` goes through the whole student, `along`
gives one row's gradient from storage along each direction, and `angle` what that means in a step of N tokens.

P: positions of a row, V: vocabulary, D: hidden size, E: kept entries, S: draws, K: directions, R: rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from formats.logprobs import ragged
from formats.logprobs.topk import TopKLogprobs
from trainer.loss.kl import LARGEST_RATIO, LARGEST_SHARE

LOGIT_CHANGE = 0.02
"""Root mean square change of a logit to either side in a difference quotient."""


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


@dataclass(frozen=True)
class Terms:
    """What the loss's gradient of a row is made of (docs/method.md; trainer/loss/kl.py)."""

    at_E: np.ndarray
    pull_E: np.ndarray
    """beta (q - p) of the kept entries."""
    q_E: np.ndarray
    tail_q_P: np.ndarray
    tail_P: np.ndarray
    """beta (1 - p / q) of the tails."""
    at_S: np.ndarray
    pull_S: np.ndarray
    """What each draw adds; none where the rate is 0."""

    @classmethod
    def of(cls, beta: float, q_PV: np.ndarray, topk: TopKLogprobs) -> "Terms":
        """float64."""
        temperature, draws = 1 / beta, topk.draws
        log_z_P = topk.log_partition(temperature).astype(np.float64)
        at_E, at_S = ragged.segment_of(topk.offsets), ragged.segment_of(draws.offsets)
        p_E = np.exp(beta * topk.logprobs.astype(np.float64) - log_z_P[at_E])
        q_E = q_PV[at_E, topk.token_ids]
        tail_q_P = np.maximum(1 - ragged.segment_sum(q_E, topk.offsets), 1e-12)
        tail_p_P = np.exp(topk.log_tail(temperature) - log_z_P)
        pull_S = np.zeros(0)
        if draws.rate:
            p_S = np.exp(beta * draws.logprobs.astype(np.float64) - log_z_P[at_S])
            ratio_S = tail_p_P[at_S] * q_PV[at_S, draws.token_ids] / tail_q_P[at_S] / p_S
            pull_S = beta * limited_pull(draws.weights * p_S, ratio_S)
        return cls(at_E, beta * (q_E - p_E), q_E, tail_q_P, beta * (1 - tail_p_P / tail_q_P), at_S, pull_S)


def along(row: Row, topk: TopKLogprobs) -> np.ndarray:
    """[K]: the loss's gradient of one row along each direction."""
    terms, draws = Terms.of(row.beta, row.q_PV, topk), topk.draws
    spread_P = ragged.segment_sum(terms.pull_S, draws.offsets)
    found = []
    for slope_PV, mean_P in zip(row.slopes_KPV, row.mean_slope_KP, strict=True):
        slope_E = slope_PV[terms.at_E, topk.token_ids]
        tail_slope_P = mean_P - ragged.segment_sum(terms.q_E * slope_E, topk.offsets)
        value = float((terms.pull_E * slope_E).sum() + (terms.tail_P * tail_slope_P).sum())
        value += float((terms.pull_S * slope_PV[terms.at_S, draws.token_ids]).sum())
        value -= float((spread_P * tail_slope_P / terms.tail_q_P).sum())
        found.append(value)
    return np.array(found)


def gradient(beta: float, q_PV: np.ndarray, topk: TopKLogprobs) -> np.ndarray:
    """float64 [P, V]: the same with respect to the logits, in full."""
    terms, draws = Terms.of(beta, q_PV, topk), topk.draws
    spread_P = ragged.segment_sum(terms.pull_S, draws.offsets)
    found = q_PV * (terms.tail_P - spread_P / terms.tail_q_P)[:, None]
    np.add.at(found, (terms.at_S, draws.token_ids), terms.pull_S)
    found[terms.at_E, topk.token_ids] = terms.pull_E
    return found


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
