"""Does the KL on the new text tell how much was forgotten?

Shenfeld et al. 2025 ("RL's Razor", arXiv 2509.04259) find that forgetting follows KL(initial || model) on the *new*
task, whatever the method, and fit it with a quadratic. Here: y, the mean relative loss on the source, over x, the mean
KL on the target texts, one point per model, through the origin (no drift, no loss):

    y = a x        and        y = a x + b x^2

R^2 is 1 - sum (y - fit)^2 / sum (y - mean y)^2, against the mean, so it can be negative: worse than a constant.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_EXACT = 1e-24


@dataclass(frozen=True)
class Fit:
    """Coefficients of x, x^2, ... and how much of the spread they explain."""

    coefficients: tuple[float, ...]
    r_squared: float | None
    """None where all losses are equal."""


@dataclass(frozen=True)
class KlLaw:
    """Both fits over the models of a comparison."""

    num_models: int
    linear: Fit
    quadratic: Fit | None
    """None with fewer than four models."""

    def text(self) -> str:
        """One line for people."""
        words = [
            f"loss on the source against KL on the target text ({self.num_models} models): "
            f"{100 * self.linear.coefficients[0]:.1f} % per nat, R^2 {_r(self.linear)}"
        ]
        if self.quadratic is not None:
            one, two = self.quadratic.coefficients
            words.append(f"{100 * one:.1f} % x {100 * two:+.1f} % x^2, R^2 {_r(self.quadratic)}")
        return "; ".join(words)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under stable keys; losses as shares, not percent."""
        return {
            "num_models": self.num_models,
            **{
                name: None
                if fit is None
                else {"coefficients": list(fit.coefficients), "r_squared": fit.r_squared}
                for name, fit in (("linear", self.linear), ("quadratic", self.quadratic))
            },
        }


def kl_law(kl: Sequence[float], loss: Sequence[float]) -> KlLaw | None:
    """Fit losses over KLs, one of each per model other than the initial one.

    None with fewer than three models, or where no model has moved: a line through the origin and one or two points
    says nothing.
    """
    x, y = np.asarray(kl, np.float64), np.asarray(loss, np.float64)
    if len(x) < 3 or not (x**2).sum() > MOST_EXACT:
        return None
    return KlLaw(len(x), _fit(x, y, 1), _fit(x, y, 2) if len(x) >= 4 else None)


def _fit(x: np.ndarray, y: np.ndarray, degree: int) -> Fit:
    columns = np.stack([x**power for power in range(1, degree + 1)], axis=1)
    scale = np.abs(columns).max(axis=0)
    found, *_ = np.linalg.lstsq(columns / scale, y, rcond=None)
    coefficients = found / scale
    spread = ((y - y.mean()) ** 2).sum()
    r_squared = (
        None if spread <= MOST_EXACT else float(1 - ((y - columns @ coefficients) ** 2).sum() / spread)
    )
    return Fit(tuple(map(float, coefficients)), r_squared)


def _r(fit: Fit) -> str:
    return "-" if fit.r_squared is None else f"{fit.r_squared:.3f}"
