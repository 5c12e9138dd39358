"""`select`: every rule's pick over the lines of a comparison, the recommended one, and what is as good as it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from formats.errors import ConfigError
from formats.table import aligned
from trainer.comparison.comparison import Comparison
from trainer.comparison.layout import no_share_note, percent
from trainer.comparison.metric import Metric
from trainer.comparison.standing import Point, Standing, standings
from trainer.selection.rules import (
    ALL_RULES,
    DEFAULT_RULE,
    NEAREST,
    OF_DIRECT,
    Pick,
    Rule,
    check_min_gain,
    choose,
    noise_of_a_seed,
)

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What each rule picks among points."""

    points: tuple[Point, ...]
    metrics: tuple[Metric, ...]
    standings: Mapping[str, Standing]
    without_share: tuple[Metric, ...]
    initial: str
    direct: str | None
    rule: Rule
    """The one that recommends."""
    picks: Mapping[str, Pick]
    """Rule -> its pick, the recommending rule included."""
    noise: tuple[float, float] | None
    """What one seed moves (lost, gained); None with one seed each."""

    @property
    def recommended(self) -> str | None:
        """Label that the asked-for rule picks; None where no model passes it."""
        return self.picks[self.rule.text()].label

    @property
    def as_good(self) -> list[str]:
        """Labels closer to the recommended one than a seed's noise, on both sides."""
        if self.noise is None or self.recommended is None:
            return []
        chosen = self.standings[self.recommended]
        lost, gained = self.noise
        return [
            label
            for label, other in self.standings.items()
            if label not in (self.recommended, self.initial)
            and abs(_number(other.source_loss) - _number(chosen.source_loss)) <= lost
            and abs(_number(other.gain) - _number(chosen.gain)) <= gained
        ]

    def distance(self, label: str) -> float | None:
        """Mean KL to the initial model over the source texts; see `Point.distance`."""
        return next(point.distance for point in self.points if point.label == label)

    def source_mean(self, label: str) -> float | None:
        """The plain mean of the source metrics' values, where all are tasks of one measure's direction."""
        point = next(point for point in self.points if point.label == label)
        sources = [metric for metric in self.metrics if metric.side == "source"]
        if any(metric.kind != "task" or not metric.higher_is_better for metric in sources):
            return None
        return math.fsum(point.values[metric.key] for metric in sources) / len(sources)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        return {
            "format": FORMAT,
            "rule": self.rule.text(),
            "recommended": self.recommended,
            "initial": self.initial,
            "direct": self.direct,
            "picks": {
                name: {
                    "label": pick.label,
                    "passed": list(pick.passed),
                    "why_none": pick.why_none,
                    **(self._shares(pick.label) if pick.label is not None else {}),
                }
                for name, pick in self.picks.items()
            },
            "points": {label: self._shares(label) for label in self.standings},
            "noise": None if self.noise is None else {"source_loss": self.noise[0], "gain": self.noise[1]},
            "as_good": self.as_good,
            "without_share": [metric.key for metric in self.without_share],
        }

    def _shares(self, label: str) -> dict[str, Any]:
        standing = self.standings[label]
        return {
            "gain_kept": standing.gain_kept,
            "forgetting_avoided": standing.forgetting_avoided,
            "source_loss": standing.source_loss,
            "gain": standing.gain,
            "source_mean": self.source_mean(label),
            "distance": self.distance(label),
        }

    def text(self) -> str:
        """Each rule's pick in a line, and what to know about the recommended one."""
        rows = []
        for name, pick in self.picks.items():
            mark = "<- recommended" if name == self.rule.text() and pick.label is not None else ""
            if pick.label is None:
                rows.append([name, "none", "-", "-", "-", "-", "-", f"({pick.why_none})"])
                continue
            found = self.standings[pick.label]
            source_mean, distance = self.source_mean(pick.label), self.distance(pick.label)
            rows.append(
                [
                    name,
                    pick.label,
                    percent(found.gain_kept),
                    percent(found.forgetting_avoided),
                    percent(found.source_loss, digits=1),
                    "-" if distance is None else f"{distance:.4f}",
                    "-" if source_mean is None else f"{source_mean:.4f}",
                    mark,
                ]
            )
        optional = ("KL on source", "source mean")
        header = ["rule", "pick", "gain kept", "forgetting avoided", "lost on source", *optional, ""]
        told = [
            n for n, name in enumerate(header) if name not in optional or any(row[n] != "-" for row in rows)
        ]
        table = [[row[n] for n in told] for row in (header, *rows)]
        return "\n".join([aligned(table, left=2), "", *self._notes()])

    def _notes(self) -> list[str]:
        lines = [f"{name}: {pick.rule.meaning()}" for name, pick in self.picks.items()]
        if self.noise is None:
            lines.append("one seed each: how far a seed moves them is not known")
        else:
            lost, gained = self.noise
            words = f"a seed moves the loss by {percent(lost, 1)} and the gain by {percent(gained, 1)}"
            near = ", ".join(self.as_good) or "none"
            lines.append(f"within the noise of a seed: {near} ({words})")
        if self.direct is None:
            lines.append("no shares: no model is known to be direct fine-tuning; name it with --direct LABEL")
        return lines + [no_share_note(metric, self.direct) for metric in self.without_share]


def select(comparison: Comparison, rule: str = DEFAULT_RULE, *, min_gain: float | None = None) -> Selection:
    """Every rule's pick over the lines of a comparison.

    Args:
        comparison: with its initial model; keep-gain and nearest need direct fine-tuning in it, too.
        rule: the one that recommends: `paper`, `keep-gain:SHARE`, `budget:PERCENT%` or `nearest:SHARE`.
        min_gain: paper: the least improvement on every target metric, in nats or the metric's unit; by default its
            standard error.

    Raises:
        ConfigError: no such rule, no initial model, or keep-gain or nearest is asked for without what it needs.
    """
    parsed = Rule.parse(rule)
    if comparison.initial is None:
        raise ConfigError("a selection needs the initial model, got none; name it with --initial MODEL")
    return select_points(
        comparison.points,
        comparison.metrics,
        initial=comparison.initial,
        direct=comparison.direct,
        rule=parsed,
        min_gain=min_gain,
    )


def select_points(
    points: Sequence[Point],
    metrics: Sequence[Metric],
    *,
    initial: str,
    direct: str | None = None,
    rule: Rule,
    min_gain: float | None = None,
) -> Selection:
    """The same over points of any origin.

    Raises:
        ConfigError: `min_gain` is below 0; see `standings` and `choose` too.
    """
    check_min_gain(min_gain)
    found, without_share = standings(points, metrics, initial=initial, direct=direct)
    related = direct is not None and found[direct].gain_kept is not None
    picks = {}
    for each in _shown_with(rule, points):
        try:
            pick = choose(points, metrics, found, each, initial=initial, direct=direct, min_gain=min_gain)
        except ConfigError:
            if each == rule or each.kind not in OF_DIRECT:
                raise
            why = "needs the KL of every model" if related else "needs direct fine-tuning that gained"
            pick = Pick(each, None, (), why)
        picks[each.text()] = pick
    return Selection(
        points=tuple(points),
        metrics=tuple(metrics),
        standings=found,
        without_share=tuple(without_share),
        initial=initial,
        direct=direct,
        rule=rule,
        picks=picks,
        noise=noise_of_a_seed(points, metrics, found, initial=initial, direct=direct),
    )


def _shown_with(asked: Rule, points: Sequence[Point]) -> list[Rule]:
    """Every rule: the asked-for one has its own number, and those of direct's gain share one.

    Of tasks alone there is no distance, so the nearest is not spoken of unless it is asked for.
    """
    shown = []
    for rule in map(Rule.parse, ALL_RULES):
        if rule.kind == asked.kind or {rule.kind, asked.kind} <= set(OF_DIRECT):
            rule = Rule(rule.kind, asked.number)
        if rule.kind != NEAREST or rule == asked or any(point.distance is not None for point in points):
            shown.append(rule)
    return shown


def _number(value: float | None) -> float:
    return math.nan if value is None else value
