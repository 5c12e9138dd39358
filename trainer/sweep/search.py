"""The largest kl_coef that keeps a share of direct fine-tuning's gain on the target, by bisection on its logarithm.

Start at kl_coef 1. While it keeps the share, take four times as much; where it does not, a quarter; until one value
keeps it and a larger one does not. Then try the geometric mean of the two until they are within a factor of 1.5. From a
bracket of 1 to 4 that takes two runs. It supposes that a larger kl_coef keeps less of the gain, which a seed's noise
can break near the border. Every value tried is an ordinary run of the sweep under its ordinary name, so the search
finds again what it has done.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

START = 1.0
STEP = 4.0
CLOSE = 1.5
"""The bracket's ends are near enough within this factor."""


@dataclass(frozen=True, kw_only=True)
class Bracket:
    """What a search knows."""

    keeps: float | None
    """The largest kl_coef found to keep the share."""
    loses: float | None
    """The smallest one found that does not."""
    tried: tuple[tuple[float, float | None], ...]
    """(kl_coef, share of the gain) in the order of the search; None for a run without a result."""

    @property
    def close(self) -> bool:
        """Whether nothing is left to search."""
        return self.keeps is not None and self.loses is not None and self.loses / self.keeps <= CLOSE

    def line(self, keep_gain: float) -> str:
        """For people."""
        share, runs = f"{100 * keep_gain:g} % of direct fine-tuning's gain", f"{len(self.tried)} values tried"
        if self.keeps is None:
            return f"search: no kl_coef down to {self.loses:g} keeps {share}; {runs}"
        if self.loses is None:
            return f"search: every kl_coef up to {self.keeps:g} keeps {share}; {runs}"
        return f"search: kl_coef {self.keeps:g} keeps {share}, {self.loses:g} does not; {runs}"


def next_value(bracket: Bracket) -> float:
    """The kl_coef to try next."""
    if bracket.keeps is None and bracket.loses is None:
        return START
    if bracket.loses is None:
        return rounded(STEP * float(bracket.keeps or 0))
    if bracket.keeps is None:
        return rounded(bracket.loses / STEP)
    return rounded(math.sqrt(bracket.keeps * bracket.loses))


def rounded(value: float) -> float:
    """Three digits: short names, and the same ones on every machine."""
    return float(f"{value:.3g}")


def search(share_of: Callable[[float], float | None], keep_gain: float, most: int) -> Bracket:
    """Search with at most `most` values; `share_of` trains one and gives the share of the gain that it keeps."""
    bracket = Bracket(keeps=None, loses=None, tried=())
    while not bracket.close and len(bracket.tried) < most:
        value = next_value(bracket)
        share = share_of(value)
        kept = share is not None and share >= keep_gain
        bracket = Bracket(
            keeps=value if kept else bracket.keeps,
            loses=bracket.loses if kept else value,
            tried=(*bracket.tried, (value, share)),
        )
    return bracket
