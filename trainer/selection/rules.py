"""Which of several models to take: rules over points, separate from how the points were measured.

    paper            out: no improvement on every target metric; of the rest the one that lost least on the source
                     (label annealing, section 3: "drop settings with no improvement on the target, best source")
    keep-gain:0.9    of those that keep at least 0.9 of direct fine-tuning's gain, the one that lost least
    budget:2%        of those that lost at most 2 % on the source, the one that gained most
    nearest:0.9      of those that keep at least 0.9 of direct fine-tuning's gain, the one nearest to the initial model

The paper's rule is degenerate where settings lie close together: any improvement passes, so the strongest setting that
gains an epsilon wins. It is there to be compared with, not to be followed.

Lost is `Standing.source_loss`, gained `Standing.gain`, near `Point.distance`. What another point beats on every metric
is never picked but by `nearest`, which asks for another number; the initial model never, nor a model that has diverged.
A loss counts a lower perplexity as something won; a distance counts every change.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from formats.errors import ConfigError
from trainer.checks import check_at_least
from trainer.comparison.metric import Metric
from trainer.comparison.standing import NEEDS_DIRECT, NO_DIRECT, NO_DISTANCE, Point, Standing, beats

PAPER, KEEP_GAIN, BUDGET, NEAREST = "paper", "keep-gain", "budget", "nearest"
DEFAULT_RULE = "keep-gain:0.9"
ALL_RULES = (PAPER, DEFAULT_RULE, "budget:2%", "nearest:0.9")
OF_DIRECT = (KEEP_GAIN, NEAREST)
"""Rules that relate to direct fine-tuning's gain."""


@dataclass(frozen=True)
class Rule:
    """A rule and its number."""

    kind: str
    number: float = 0.0
    """keep-gain, nearest: the least share of direct's gain; budget: the largest loss, 0.02 for 2 %."""

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """`paper`, `keep-gain:SHARE`, `budget:PERCENT%` or `nearest:SHARE`.

        Raises:
            ConfigError: another word, or a number out of range.
        """
        kind, colon, number = text.strip().partition(":")
        if kind == PAPER and not colon:
            return cls(PAPER)
        try:
            value = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
        except ValueError:
            value = math.nan
        if kind in OF_DIRECT and 0 < value <= 1:
            return cls(kind, value)
        # Without the sign 2 would be 200 %.
        if kind == BUDGET and number.endswith("%") and 0 <= value < math.inf:
            return cls(BUDGET, value)
        raise ConfigError(
            f"--rule must be paper, keep-gain:SHARE (0 to 1), budget:PERCENT% or nearest:SHARE, got {text!r}; for "
            f"example {DEFAULT_RULE} or budget:2%"
        )

    def text(self) -> str:
        """As it is given."""
        if self.kind in OF_DIRECT:
            return f"{self.kind}:{self.number:g}"
        return f"{BUDGET}:{100 * self.number:g}%" if self.kind == BUDGET else PAPER

    def meaning(self) -> str:
        """In words."""
        if self.kind == KEEP_GAIN:
            return f"least lost of those that keep {100 * self.number:g} % of direct's gain"
        if self.kind == BUDGET:
            return f"most gained of those that lost at most {100 * self.number:g} %"
        if self.kind == NEAREST:
            return (
                f"least KL to the initial model of those that keep {100 * self.number:g} % of direct's gain"
            )
        return "least lost of those that improve on every target"


@dataclass(frozen=True)
class Pick:
    """What a rule chose."""

    rule: Rule
    label: str | None
    """None where no point passes."""
    passed: tuple[str, ...]
    """Labels that the rule admits, the pick first."""
    why_none: str = ""


def check_min_gain(min_gain: float | None) -> None:
    """Refuse a least improvement that a loss would pass.

    Raises:
        ConfigError: it is below 0, or no number.
    """
    if min_gain is not None:
        check_at_least("--min-gain", min_gain, 0, "0 takes any improvement")


def choose(
    points: Sequence[Point],
    metrics: Sequence[Metric],
    standings: Mapping[str, Standing],
    rule: Rule,
    *,
    initial: str,
    direct: str | None = None,
    min_gain: float | None = None,
) -> Pick:
    """Apply one rule.

    Args:
        points: every model, the initial one included.
        standings: of `trainer.comparison.standing.standings` on the same points.
        min_gain: paper: the improvement on every target metric must be larger than this, in the score's unit (nats,
            accuracy); by default than the standard error of that improvement, or zero where none is known.

    Raises:
        ConfigError: keep-gain or nearest without direct fine-tuning, or where it gained nothing; nearest without a
            distance.
    """
    known = {point.label: point for point in points}
    admitted = [label for label in standings if label != initial]
    if rule.kind != NEAREST:
        gains = {label: standing.gains for label, standing in standings.items()}
        admitted = [
            label for label in admitted if not any(beats(other, gains[label]) for other in gains.values())
        ]
    if any(standings[label].source_loss is None for label in admitted):
        raise ConfigError(
            "a selection needs a source metric of which the initial model has something to lose, got none"
        )
    if rule.kind == PAPER:
        passing = [
            label for label in admitted if _improves(known[label], metrics, standings[label], min_gain)
        ]
    elif rule.kind in OF_DIRECT:
        if direct is None or standings[direct].gain_kept is None:
            reason = NO_DIRECT if direct is None else f"{NEEDS_DIRECT}, it gained nothing"
            raise ConfigError(f"{rule.text()} {reason}")
        if rule.kind == NEAREST and any(known[label].distance is None for label in admitted):
            raise ConfigError(f"{rule.text()} {NO_DISTANCE}")
        passing = [label for label in admitted if _at_least(standings[label].gain_kept, rule.number)]
    else:
        passing = [label for label in admitted if _at_least(-_loss(standings[label]), -rule.number)]
        passing = [label for label in passing if (standings[label].gain or 0.0) > 0]
    if rule.kind == NEAREST:
        passing.sort(key=lambda label: (known[label].distance, -_gain(standings[label])))
    elif rule.kind == BUDGET:
        passing.sort(key=lambda label: (-_gain(standings[label]), _loss(standings[label])))
    else:
        passing.sort(key=lambda label: (_loss(standings[label]), -_gain(standings[label])))
    return Pick(rule, passing[0] if passing else None, tuple(passing), "" if passing else "no model passes")


def _improves(point: Point, metrics: Sequence[Metric], standing: Standing, min_gain: float | None) -> bool:
    for metric in metrics:
        if metric.side == "target":
            least = point.errors.get(metric.key, 0.0) if min_gain is None else min_gain
            if not standing.gains[metric.key] > least:
                return False
    return True


def _at_least(value: float | None, least: float) -> bool:
    """With room for rounding, so that a share of exactly 0.9 passes 0.9."""
    return value is not None and value >= least - 1e-12


def _loss(standing: Standing) -> float:
    return math.inf if standing.source_loss is None else standing.source_loss


def _gain(standing: Standing) -> float:
    return -math.inf if standing.gain is None else standing.gain


def noise_of_a_seed(
    points: Sequence[Point],
    metrics: Sequence[Metric],
    found: Mapping[str, Standing],
    *,
    initial: str,
    direct: str | None,
) -> tuple[float, float] | None:
    """How far one seed moves (lost, gained): the spread over seeds, pooled over the points that have several.

    Spreads of several metrics are taken as independent: the spread of a mean of n is sqrt(sum of squares) / n. The
    metrics and their units are those of `Standing.source_loss` and `Standing.gain`, so that what a share leaves out
    adds no noise to it. None without a point of several seeds that have not diverged.

    Args:
        found: of `trainer.comparison.standing.standings` on the same points.
    """
    first = next(point for point in points if point.label == initial)
    lost_units = {
        metric.key: 1.0 if metric.logarithmic else abs(first.values[metric.key])
        for metric in metrics
        if metric.key in found[initial].losses
    }
    gain_units = _gain_units(metrics, found, direct)
    several = [point for point in points if point.num_seeds > 1 and point.label in found]
    if not several:
        return None
    lost, gained = (
        math.fsum(_variance(point, units) for point in several) / len(several)
        for units in (lost_units, gain_units)
    )
    return math.sqrt(lost), math.sqrt(gained)


def _gain_units(
    metrics: Sequence[Metric], found: Mapping[str, Standing], direct: str | None
) -> dict[str, float]:
    """Target `Metric.key` -> what its gain is divided by in `Standing.gain`; without those that it leaves out."""
    targets = [metric.key for metric in metrics if metric.side == "target"]
    if direct is not None and found[direct].gain_kept is not None:
        return {key: found[direct].gains[key] for key in targets if key in found[direct].shares}
    largest = {key: max(standing.gains[key] for standing in found.values()) for key in targets}
    return {key: most for key, most in largest.items() if most > 0}


def _variance(point: Point, units: Mapping[str, float]) -> float:
    """Over seeds, of the mean over these metrics."""
    moves = [point.spreads.get(key, 0.0) / unit for key, unit in units.items()]
    return math.fsum(move**2 for move in moves) / len(moves) ** 2 if moves else 0.0
