"""Per-position quantities of a teacher distribution, from its head and tail: the numbers that `inspect`
reports.

**Entropy** in nats at T = 1 is exact for the head and taken from the tail function for the rest: a tail with
A(beta) = log sum exp(beta * l) contributes -sum exp(l) * l = -exp(A(1)) * A'(1), and A'(1) comes from the
nodes around 1 by the three-point rule, kept within what a distribution over V - n tokens can have.
"""

from typing import Any

import numpy as np

from formats.logprobs import ragged
from formats.logprobs.tail_function import TAIL_BETAS
from formats.logprobs.topk import TopKLogprobs

PERCENTILES = (5, 25, 50, 75, 95)
_ONE = TAIL_BETAS.index(1.0)


def _tail_slope(nodes_PK: np.ndarray) -> np.ndarray:
    """A'(1), float64 [P], for finite nodes."""
    below, at, above = (nodes_PK[:, k].astype(np.float64) for k in (_ONE - 1, _ONE, _ONE + 1))
    left, right = TAIL_BETAS[_ONE] - TAIL_BETAS[_ONE - 1], TAIL_BETAS[_ONE + 1] - TAIL_BETAS[_ONE]
    return ((at - below) / left * right + (above - at) / right * left) / (left + right)


def entropy(topk: TopKLogprobs) -> np.ndarray:
    """float64 [P]: entropy in nats of each full-vocabulary distribution at T = 1."""
    logprobs = topk.logprobs.astype(np.float64)
    finite = np.where(np.isneginf(logprobs), 0.0, logprobs)
    head = ragged.segment_sum(-np.exp(logprobs) * finite, topk.offsets)
    log_mass = topk.log_tail_nodes[:, _ONE].astype(np.float64)
    some = np.isfinite(topk.log_tail_nodes).all(axis=1)
    nodes = np.where(some[:, None], topk.log_tail_nodes, 0.0)
    # Within the tail the conditional entropy A(1) - A'(1) lies between 0 and log(V - n).
    with np.errstate(divide="ignore", invalid="ignore"):
        inner = np.clip(log_mass - _tail_slope(nodes), 0, np.log(topk.vocab_size - topk.counts))
        tail = np.exp(log_mass) * (inner - log_mass)
    return head + np.where(some, tail, 0.0)


def distribution(values: np.ndarray) -> dict[str, float]:
    """Mean, extremes and percentiles of a sample; empty for no values."""
    if len(values) == 0:
        return {}
    found = {"mean": float(np.mean(values)), "min": float(np.min(values))}
    for percent, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True):
        found[f"p{percent}"] = float(value)
    return found | {"max": float(np.max(values))}


def head_size_histogram(counts: np.ndarray) -> list[dict[str, Any]]:
    """Positions per head size, in bins 1, 2, 3-4, 5-8, ...: `{"from", "to", "positions"}`."""
    bins: list[dict[str, Any]] = []
    low, high = 1, 1
    while len(counts) and low <= counts.max():
        inside = int(((counts >= low) & (counts <= high)).sum())
        bins.append({"from": low, "to": high, "positions": inside})
        low, high = high + 1, 2 * high
    return bins
