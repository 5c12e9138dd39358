"""||theta - theta0|| of two models, added up a tensor at a time: the sums, and what comes of them.

`trainer.evaluation.weight_distance` reads two directories; a merge adds while it writes.
"""

import math
from dataclasses import asdict, dataclass

import torch

SLICE = 1 << 22
"""Elements taken to float64 at once: 32 MiB of each model."""


@dataclass(frozen=True)
class WeightDistance:
    """The Euclidean distance between the weights of two models."""

    absolute: float
    """||theta - theta0|| over all floating weights."""
    relative: float | None
    """The same over ||theta0||; None where theta0 is zero."""

    def line(self) -> str:
        """For people: `1.234 (0.56 % of its norm)`."""
        share = "" if self.relative is None else f" ({100 * self.relative:.3g} % of its norm)"
        return f"{self.absolute:.4g}{share}"

    def to_dict(self) -> dict[str, float | None]:
        """JSON-ready."""
        return asdict(self)


class DistanceSums:
    """Sums of squares in float64. Integers, such as position tables, count nothing."""

    def __init__(self) -> None:
        self.squared, self.norm = 0.0, 0.0

    def add(self, theta: torch.Tensor, theta0: torch.Tensor) -> None:
        """One weight of both models; of the same shape."""
        if not theta0.is_floating_point():
            return
        now, before = theta.reshape(-1), theta0.reshape(-1)
        for start in range(0, before.numel(), SLICE):
            reference = before[start : start + SLICE].double()
            self.norm += float(reference.square().sum())
            self.squared += float((now[start : start + SLICE].double() - reference).square().sum())

    def distance(self) -> WeightDistance:
        """Of what was added."""
        absolute = math.sqrt(self.squared)
        return WeightDistance(absolute, absolute / math.sqrt(self.norm) if self.norm else None)
