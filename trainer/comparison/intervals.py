"""How well the difference of two models on the same items is known.

Two models answer the same items, so the difference is computed item by item and its items are drawn again: the
paired bootstrap (Efron 1979; for two systems on one test set: Koehn 2004). Right-or-wrong answers also get McNemar's
exact test, on the items on which the two disagree (McNemar 1947).

N: items (questions, or rows of a text).
"""

import math
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
LEVEL = 0.95
SEED = 0


@dataclass(frozen=True)
class PairedDifference:
    """sum(second - first) / sum(weights) over the same items."""

    difference: float
    stderr: float | None
    """Standard deviation over the bootstrap's draws; None with fewer than two items."""
    interval: tuple[float, float] | None
    """95 % of the draws lie between."""
    num_items: int


def paired_difference(
    first_N: np.ndarray, second_N: np.ndarray, weights_N: np.ndarray | None = None, *, draws: int = DRAWS
) -> PairedDifference:
    """The difference of two means (or ratios of sums) and its paired bootstrap, the same at every call.

    Args:
        first_N, second_N: [N] float64, each model's contribution of the same items.
        weights_N: [N] float64, what the sums are divided by (tokens, words); ones if None.
        draws: bootstrap samples of N items each.

    Items with equal (difference, weight) are interchangeable, so a draw is one multinomial over the distinct pairs:
    exactly the bootstrap's distribution, in a time that does not grow with N for right-or-wrong answers.
    """
    difference_N = second_N - first_N
    weights_N = np.ones(len(difference_N)) if weights_N is None else weights_N
    num_items = len(difference_N)
    if num_items == 0 or not np.isfinite(difference_N).all() or weights_N.sum() <= 0:
        return PairedDifference(math.nan, None, None, num_items)
    difference = float(difference_N.sum() / weights_N.sum())
    if num_items < 2:
        return PairedDifference(difference, None, None, num_items)
    pairs, counts = np.unique(np.stack([difference_N, weights_N], axis=1), axis=0, return_counts=True)
    generator = np.random.default_rng(SEED)
    found = np.empty(draws)
    block = max(1, (1 << 22) // len(pairs))
    for start in range(0, draws, block):
        stop = min(start + block, draws)
        drawn = generator.multinomial(num_items, counts / num_items, size=stop - start)
        sums = drawn @ pairs
        with np.errstate(invalid="ignore", divide="ignore"):
            found[start:stop] = sums[:, 0] / sums[:, 1]
    found = found[np.isfinite(found)]
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return PairedDifference(difference, float(found.std(ddof=1)), (float(low), float(high)), num_items)


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p-value that items turned wrong and right equally often: Binomial(lost + won, 1/2)."""
    total, fewer = lost + won, min(lost, won)
    if total == 0:
        return 1.0
    terms = (
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2)
        for k in range(fewer + 1)
    )
    return min(1.0, 2 * math.fsum(math.exp(term) for term in terms))
