"""The entropy of a teacher's distribution, from its kept tokens and its tail function.

With l_j the logprobs at T = 1, H the kept tokens, R the tail and A(beta) its tail function,

    sum_R p_j l_j = d/dbeta exp(A(beta)) at 1 = exp(A(1)) A'(1),    entropy = -sum_H p_j l_j - exp(A(1)) A'(1).

The first term is exact. A' comes from the nodes: the slope at beta = 1 of the polynomial of fourth degree through the
five nodes around it. A is convex, so the true slope lies between those of the two chords that meet at 1; the estimate
is held to that interval, which bounds its error by the tail's mass times the interval's length.

P: positions.
"""

import numpy as np

from formats.logprobs.ragged import segment_sum
from formats.logprobs.tail_function import TAIL_BETAS
from formats.logprobs.topk import TopKLogprobs

_AT = TAIL_BETAS.index(1.0)
_AROUND = slice(_AT - 2, _AT + 3)


def _slope_weights() -> np.ndarray:
    """float64 [5]: what each node's value contributes to the slope at beta = 1 of the polynomial through all."""
    x = np.asarray(TAIL_BETAS[_AROUND]) - 1.0
    powers = np.vander(x, increasing=True)  # row i: 1, x_i, x_i^2, ...
    return np.linalg.inv(powers)[1]


_WEIGHTS = _slope_weights()


def tail_slope(log_tail_nodes_PK: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(estimate, lower bound, upper bound) of A'(1), float64 [P] each; 0 where the tail is empty."""
    nodes = log_tail_nodes_PK.astype(np.float64)
    nodes = np.where(np.isfinite(nodes).all(axis=1, keepdims=True), nodes, 0.0)
    chords = np.diff(nodes, axis=1) / np.diff(TAIL_BETAS)
    lower, upper = chords[:, _AT - 1], chords[:, _AT]
    upper = np.maximum(upper, lower)  # rounded nodes need not be exactly convex
    return np.clip(nodes[:, _AROUND] @ _WEIGHTS, lower, upper), lower, upper


def entropy(topk: TopKLogprobs) -> np.ndarray:
    """float32 [P]: the entropy at T = 1 of every position, in nats."""
    logprobs = topk.logprobs.astype(np.float64)
    finite = np.where(np.isneginf(logprobs), 0.0, logprobs)  # p log p of an impossible token is 0
    kept = segment_sum(np.exp(logprobs) * finite, topk.offsets)
    slope, _, _ = tail_slope(topk.log_tail_nodes)
    tail = np.exp(topk.log_tail_nodes[:, _AT].astype(np.float64)) * slope
    return np.maximum(-kept - tail, 0.0).astype(np.float32)
