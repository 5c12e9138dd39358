"""The tail function and its interpolation between the captured temperatures.

With l_j the teacher's logprobs at T = 1, beta = 1/T, and the sum over the tokens *outside* a position's head,

    A(beta) = log sum_j exp(beta * l_j)

is all that the T-softmax needs to know about them. It is captured from the full logits at the nodes
`TAIL_BETAS` (exact there, whatever the distribution), and A(0) = log(V - n) costs nothing. A is a
log-sum-exp of linear functions, hence convex: between two nodes it lies below their chord and above the
continued chords of the two neighbouring intervals. `interpolate` uses a cubic Hermite piece with
three-point slopes, clipped to that bracket, which no distribution can leave. Cost: O(P) for any number of
nodes.

P: positions, K: nodes.
"""

import numpy as np

TAIL_BETAS: tuple[float, ...] = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""1/T at which the tail is captured: T = 8, 4, 2, 4/3, 1, 2/3, 1/2. With x = exp(l/8) they are x, x^2, x^4,
x^6, x^8, x^12, x^16: products of powers of one exponential, six multiplications after it."""

MIN_TEMPERATURE = 1.0 / TAIL_BETAS[-1]
"""Below this temperature A would have to be extrapolated, which is refused."""


def check_temperature(temperature: float) -> float:
    """Return beta = 1 / temperature.

    Raises:
        ValueError: the temperature is not finite or below `MIN_TEMPERATURE`.
    """
    if not (np.isfinite(temperature) and temperature >= MIN_TEMPERATURE):
        raise ValueError(
            f"temperature must be finite and at least {MIN_TEMPERATURE:g} (the tail is captured no further), "
            f"got {temperature!r}"
        )
    return 1.0 / float(temperature)


def _nodes(log_tail_nodes_PK: np.ndarray, num_tail_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nodes with the free one at beta = 0 in front, float64; x [K+1], y [P, K+1]."""
    x = np.array((0.0, *TAIL_BETAS))
    with np.errstate(divide="ignore"):
        free = np.log(num_tail_P.astype(np.float64))
    return x, np.concatenate([free[:, None], log_tail_nodes_PK.astype(np.float64)], axis=1)


def _bracket(x: np.ndarray, y: np.ndarray, beta: float, i: int) -> tuple[np.ndarray, np.ndarray]:
    slope = np.diff(y, axis=1) / np.diff(x)
    upper = y[:, i] + slope[:, i] * (beta - x[i])
    lower = np.full(len(y), -np.inf)
    if i > 0:
        lower = y[:, i] + slope[:, i - 1] * (beta - x[i])
    if i + 2 < len(x):
        lower = np.maximum(lower, y[:, i + 1] + slope[:, i + 1] * (beta - x[i + 1]))
    # Rounded nodes need not be exactly convex: never let the bracket turn inside out.
    return np.minimum(lower, upper), upper


def _locate(x: np.ndarray, beta: float) -> int:
    return min(max(int(np.searchsorted(x, beta, side="right")) - 1, 0), len(x) - 2)


def interpolate(log_tail_nodes_PK: np.ndarray, num_tail_P: np.ndarray, temperature: float) -> np.ndarray:
    """float32 [P]: A(1/temperature) per position; exactly the stored value at a node, -inf for an empty tail.

    Raises:
        ValueError: the temperature is not finite or below `MIN_TEMPERATURE`.
    """
    beta = check_temperature(temperature)
    if beta in TAIL_BETAS:
        return log_tail_nodes_PK[:, TAIL_BETAS.index(beta)].astype(np.float32)
    x, y = _nodes(log_tail_nodes_PK, num_tail_P)
    gone = ~np.isfinite(y).all(axis=1)
    y = np.where(gone[:, None], 0.0, y)
    i = _locate(x, beta)
    step = np.diff(x)
    slope = np.diff(y, axis=1) / step

    def derivative(k: int) -> np.ndarray:
        if k == 0:
            return ((2 * step[0] + step[1]) * slope[:, 0] - step[0] * slope[:, 1]) / (step[0] + step[1])
        if k == len(step):
            last, before = step[-1], step[-2]
            return ((2 * last + before) * slope[:, -1] - last * slope[:, -2]) / (last + before)
        return (slope[:, k - 1] * step[k] + slope[:, k] * step[k - 1]) / (step[k - 1] + step[k])

    t = (beta - x[i]) / step[i]
    value = (
        (1 + 2 * t) * (1 - t) ** 2 * y[:, i]
        + t * (1 - t) ** 2 * step[i] * derivative(i)
        + t * t * (3 - 2 * t) * y[:, i + 1]
        + t * t * (t - 1) * step[i] * derivative(i + 1)
    )
    lower, upper = _bracket(x, y, beta, i)
    value = np.clip(value, lower, upper)
    value[gone] = -np.inf
    return value.astype(np.float32)
