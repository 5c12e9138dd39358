"""Quantisation of probabilities and tail nodes: what the compact codec loses, and how little.

**Probabilities.** With s = sqrt(p), an entry is stored as the whole number c = round(a*s + b*s^2), at least
1. The two terms are what rate-distortion theory asks for: equal KL share needs steps proportional to sqrt(p),
equal share in the gradient at T = 1 equal steps in p, and minimising entropy under both gives a step
density that is their sum. `a` steps govern small p and high T, `b` steps the few large p and low T; large
codes are rare, so they cost little once compressed. Error: |s' - s| <= 0.5 / (a + b*(s + s')), half a step, wherever
p is not below the smallest code; p' - p is s + s' times that. Code 0 means p = 0.

**Tail nodes.** A(beta) is stored in steps of 1/`tail_steps` nats as the difference to an integer prediction
from nodes already known, modulo 2^16. The prediction of A(1) is the log of the mass the quantised head
leaves; the others are fixed linear combinations, exact for a linear A, fitted to language model tails.
Error: half a step.

**Tail draws.** Their logprobs are stored in steps of 1/`draw_steps` nats: a loss looks at the ratio of the
student's probability to it, so the error is relative. Error: half a step.

**Labels.** The logprob of a position's next token is stored in steps of 1/16 nat where that token is not
kept; one byte holds it down to -255/16 nats, and what is below is stored as that. Error: half a step.

All predictions are integer arithmetic on stored codes, so every implementation reproduces them to the bit.
P: positions, E: kept entries, K: nodes, S: draws.
"""

from functools import lru_cache

import numpy as np

from formats.logprobs import ragged
from formats.logprobs.tail_function import TAIL_BETAS

MASS_UNIT = 1 << 40
"""Head masses are summed as integers in these units."""
LEAST_TAIL_MASS = 1 << 26
"""The least tail mass (in mass units, 2^-14) that predicts A(1): below it the quantised head knows
nothing."""
LABEL_STEPS = 16
"""Steps per nat of a label's logprob."""
LOWEST_LABEL = -255 / LABEL_STEPS
"""What stands for this logprob and everything below."""
MINUS_INFINITY = -32768
LEAST_CODE = -32767

PREDICTIONS: tuple[tuple[float, int, tuple[tuple[float, int], ...]], ...] = (
    # node, bias, ((known node, weight), ...): all in 64ths; beta = 0 is the free node log(V - n).
    (0.5, -42, ((0.0, 32), (1.0, 32))),
    (2.0, 141, ((0.5, -128), (1.0, 192))),
    (0.25, 0, ((0.0, 20), (0.5, 60), (1.0, -18), (2.0, 2))),
    (0.125, 0, ((0.0, 23), (0.25, 52), (0.5, -12), (1.0, 1))),
    (0.75, 0, ((0.25, -12), (0.5, 46), (1.0, 32), (2.0, -2))),
    (1.5, 0, ((0.5, 14), (0.75, -68), (1.0, 96), (2.0, 22))),
)
"""In the order in which the nodes are decoded, after A(1)."""

NODE_ORDER = (1.0, *(node for node, _, _ in PREDICTIONS))
"""The order in which the nodes are stored."""


@lru_cache(maxsize=16)
def probability_tables(sqrt_steps: int, linear_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(logprob float32 [C], mass int64 [C] in `MASS_UNIT`s) of the codes 0 to sqrt_steps + linear_steps."""
    code = np.arange(sqrt_steps + linear_steps + 1, dtype=np.float64)
    if linear_steps:
        root = (np.sqrt(sqrt_steps * sqrt_steps + 4.0 * linear_steps * code) - sqrt_steps) / (
            2.0 * linear_steps
        )
    else:
        root = code / sqrt_steps
    prob = root * root
    with np.errstate(divide="ignore"):
        logprob = np.log(prob).astype(np.float32)
    return logprob, np.floor(prob * MASS_UNIT + 0.5).astype(np.int64)


def quantise_probabilities(logprobs_E: np.ndarray, sqrt_steps: int, linear_steps: int) -> np.ndarray:
    """uint16 codes [E] of logprobs (at most 0, -inf allowed)."""
    logprobs = logprobs_E.astype(np.float64)
    code = np.rint(sqrt_steps * np.exp(0.5 * logprobs) + linear_steps * np.exp(logprobs))
    code = np.where(np.isneginf(logprobs), 0, np.clip(code, 1, sqrt_steps + linear_steps))
    return code.astype(np.uint16)


def _predict_one(
    codes_E: np.ndarray, offsets: np.ndarray, mass_table: np.ndarray, tail_steps: int
) -> np.ndarray:
    """int64 [P]: the predicted code of A(1), from the mass that the quantised head leaves."""
    left = MASS_UNIT - ragged.segment_sum(mass_table[codes_E], offsets)
    left = np.clip(left, LEAST_TAIL_MASS, MASS_UNIT)
    return np.floor(tail_steps * np.log(left / MASS_UNIT) + 0.5).astype(np.int64)


def _free_node(num_tail_P: np.ndarray, tail_steps: int) -> np.ndarray:
    """int64 [P]: the code of A(0) = log(V - n)."""
    return np.floor(tail_steps * np.log(np.maximum(num_tail_P, 1)) + 0.5).astype(np.int64)


def quantise_tails(
    nodes_PK: np.ndarray,
    num_tail_P: np.ndarray,
    codes_E: np.ndarray,
    offsets: np.ndarray,
    mass_table: np.ndarray,
    tail_steps: int,
) -> np.ndarray:
    """uint16 [K, P], rows in `NODE_ORDER`: zigzag-coded differences to the predictions."""
    with np.errstate(invalid="ignore"):
        code_PK = np.floor(nodes_PK.astype(np.float64) * tail_steps + 0.5)
    code_PK = np.where(np.isneginf(nodes_PK), MINUS_INFINITY, np.clip(code_PK, LEAST_CODE, 32767)).astype(
        np.int64
    )
    known = {beta: code_PK[:, k] for k, beta in enumerate(TAIL_BETAS)}
    known[0.0] = _free_node(num_tail_P, tail_steps)
    rows = [known[1.0] - _predict_one(codes_E, offsets, mass_table, tail_steps)]
    for node, bias, weights in PREDICTIONS:
        rows.append(known[node] - _combine(known, bias, weights, tail_steps))
    return _zigzag(((np.stack(rows) + 32768) & 0xFFFF) - 32768)


def _zigzag(signed: np.ndarray) -> np.ndarray:
    """uint16 of int64: 0, -1, 1, -2, ... become 0, 1, 2, 3, ..."""
    return ((signed << 1) ^ (signed >> 63)).astype(np.uint16)


def _unzigzag(stored: np.ndarray) -> np.ndarray:
    """int32, the inverse of `_zigzag`; everything here fits: half the memory traffic of int64."""
    wide = stored.astype(np.int32)
    return (wide >> 1) ^ -(wide & 1)


def _combine(
    known: dict[float, np.ndarray], bias: int, weights: tuple[tuple[float, int], ...], tail_steps: int
) -> np.ndarray:
    total = sum(weight * known[node] for node, weight in weights) + bias * tail_steps + 32
    return np.asarray(total) >> 6


def dequantise_tails(
    stored_KP: np.ndarray,
    num_tail_P: np.ndarray,
    codes_E: np.ndarray,
    offsets: np.ndarray,
    mass_table: np.ndarray,
    tail_steps: int,
) -> np.ndarray:
    """float32 [P, K]: the inverse of `quantise_tails`; -inf where the tail is empty."""
    difference = _unzigzag(stored_KP)
    known = {0.0: _free_node(num_tail_P, tail_steps).astype(np.int32)}
    for k, node in enumerate(NODE_ORDER):
        if k == 0:
            prediction = _predict_one(codes_E, offsets, mass_table, tail_steps).astype(np.int32)
        else:
            prediction = _combine(known, *PREDICTIONS[k - 1][1:], tail_steps)
        known[node] = ((prediction + difference[k] + 32768) & 0xFFFF) - 32768
    code_PK = np.stack([known[beta] for beta in TAIL_BETAS], axis=1)
    nodes_PK = (code_PK / tail_steps).astype(np.float32)
    nodes_PK[(code_PK == MINUS_INFINITY) | (num_tail_P == 0)[:, None]] = -np.inf
    return nodes_PK


def quantise_draws(logprobs_S: np.ndarray, steps: int) -> np.ndarray:
    """uint16 [S]: steps below 0; what is further down than 65,535 of them is stored as that."""
    return np.clip(np.rint(logprobs_S.astype(np.float64) * -steps), 0, 65535).astype(np.uint16)


def dequantise_draws(stored_S: np.ndarray, steps: int) -> np.ndarray:
    """float32 [S]: the inverse of `quantise_draws`."""
    return stored_S.astype(np.float32) / np.float32(-steps)


def quantise_labels(logprobs_P: np.ndarray) -> np.ndarray:
    """uint8 [P]: steps below 0 of logprobs, -inf allowed."""
    return np.clip(np.rint(logprobs_P.astype(np.float64) * -LABEL_STEPS), 0, 255).astype(np.uint8)


def dequantise_labels(stored_P: np.ndarray) -> np.ndarray:
    """float32 [P]: the inverse of `quantise_labels`."""
    return stored_P.astype(np.float32) / np.float32(-LABEL_STEPS)
