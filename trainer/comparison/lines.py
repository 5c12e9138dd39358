"""Models side by side: their numbers, where each stands, the front, and the law of their drift."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

from formats.errors import ConfigError
from trainer.comparison.flips import Flips
from trainer.comparison.intervals import PairedDifference
from trainer.comparison.kl_law import KlLaw, kl_law
from trainer.comparison.metric import SIDES, Metric
from trainer.comparison.standing import Point, Standing, beats, finite, front_of, mean, standings
from trainer.evaluation.recorded_method import AppliedMethod


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One metric of one line: a model, or the mean of one over seeds."""

    value: float
    """Of several seeds that of the mean score (`Metric.score`): the geometric mean of perplexities."""
    spread: float | None = None
    """Standard deviation of the value over seeds (n - 1); None with one."""
    stderr: float | None = None
    """Of the value, where the benchmark gives one; the mean of several seeds'."""
    difference: PairedDifference | None = None
    """Of the score to the initial model, paired; None without one, or without items."""
    flips: Flips | None = None
    """Against the initial model, for right-or-wrong answers; the mean of several seeds'."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """The rest of `evaluate`'s result or of the benchmark's entry; numbers are means over seeds."""


@dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """One line of the table."""

    label: str
    """Its name in this comparison."""
    members: tuple[str, ...]
    """The labels of the models it is the mean of; mostly one."""
    paths: tuple[str, ...]
    """Their directories or hub names, as given."""
    method: AppliedMethod | None
    """How it was made; None if its directory does not tell."""
    cells: Mapping[str, Cell]
    """`Metric.key` -> numbers."""

    @property
    def num_seeds(self) -> int:
        """Models behind the line."""
        return len(self.members)

    def point(self, metrics: tuple[Metric, ...]) -> Point:
        """The line for the pure functions of `standing` and of a selection."""
        errors, spreads = {}, {}
        for metric in metrics:
            cell = self.cells[metric.key]
            if cell.difference is not None and cell.difference.stderr is not None:
                errors[metric.key] = cell.difference.stderr
            elif cell.stderr is not None and not metric.logarithmic:
                errors[metric.key] = cell.stderr
            if cell.spread is not None:
                spreads[metric.key] = cell.spread / cell.value if metric.logarithmic else cell.spread
        values = {metric.key: self.cells[metric.key].value for metric in metrics}
        return Point(
            label=self.label,
            values=values,
            errors=errors,
            spreads=spreads,
            num_seeds=self.num_seeds,
            distance=self.mean_detail("kl", [metric for metric in metrics if metric.side == "source"]),
        )

    def mean_detail(self, key: str, metrics: Sequence[Metric]) -> float | None:
        """Mean of an entry of `Cell.details` over the texts among these; None without texts, or where one lacks it."""
        found = [self.cells[metric.key].details.get(key) for metric in metrics if metric.kind == "text"]
        known = [float(value) for value in found if value is not None and math.isfinite(value)]
        return mean(known) if len(known) == len(found) else None


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Lines in the given order, the initial model first; `Comparison` adds the forms in which they are shown."""

    metrics: tuple[Metric, ...]
    models: tuple[ComparedModel, ...]
    initial: str | None = None
    """Label of the initial model, if it was given."""
    direct: str | None = None
    """Label of direct fine-tuning, if it was named or found."""
    notes: tuple[str, ...] = ()
    """Sentences about what could not be computed, and why."""

    def related_to(self, direct: str) -> Self:
        """The same lines with shares of this one, which is direct fine-tuning; nothing is read again.

        Raises:
            ConfigError: there is no such line.
        """
        return replace(self, direct=self.line(direct).label, notes=())

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """The lines as plain points."""
        return tuple(model.point(self.metrics) for model in self.models)

    @cached_property
    def _standings(self) -> tuple[dict[str, Standing], list[Metric]]:
        if self.initial is None:
            return {}, []
        return standings(self.points, self.metrics, initial=self.initial, direct=self.direct)

    def standing(self, label: str) -> Standing | None:
        """Where a line stands; None without an initial model, and for one that has diverged."""
        return self._standings[0].get(label)

    @property
    def without_share(self) -> list[Metric]:
        """Metrics on which direct fine-tuning did not gain, or did not forget, more than noise."""
        return self._standings[1]

    def line(self, label: str) -> ComparedModel:
        """The line of this label, or the one that a model of this label is part of.

        Raises:
            ConfigError: there is none.
        """
        for model in self.models:
            if label == model.label or label in model.members:
                return model
        raise ConfigError(f"no model is called {label!r}; they are {', '.join(m.label for m in self.models)}")

    def of_side(self, side: str) -> list[Metric]:
        """The metrics of `source` or `target`."""
        return [metric for metric in self.metrics if metric.side == side]

    def axes(self) -> dict[str, tuple[float, float]]:
        """Label -> (lost on the source, gained on the target), of lines that have not diverged.

        With one metric a side these are its scores, else the means of `Standing`; empty where neither can be had.
        """
        sources, targets = (self.of_side(side) for side in SIDES)
        if len(sources) == len(targets) == 1:
            return {
                point.label: (
                    -sources[0].score(point.values[sources[0].key]),
                    targets[0].score(point.values[targets[0].key]),
                )
                for point in self.points
                if finite(point, self.metrics)
            }
        found = {}
        for label, standing in self._standings[0].items():
            if standing.source_loss is not None and standing.gain is not None:
                found[label] = (standing.source_loss, standing.gain)
        return found

    @cached_property
    def front(self) -> list[str]:
        """Labels than which no other line is nowhere worse and somewhere better, on the two sides; without an initial
        model to relate several metrics to, on all metrics.
        """
        axes = self.axes()
        if axes:
            return front_of(axes)
        scores = {
            point.label: {m.key: m.score(point.values[m.key]) for m in self.metrics}
            for point in self.points
            if finite(point, self.metrics)
        }
        return [
            label for label in scores if not any(beats(other, scores[label]) for other in scores.values())
        ]

    def kl_on_target(self, model: ComparedModel) -> float | None:
        """Mean KL to the initial model over the target texts; None where no target is a text with a teacher."""
        return model.mean_detail("kl", self.of_side("target"))

    def still_right(self, model: ComparedModel) -> float | None:
        """Mean over the source texts of the share of tokens that the initial model had right with p > 0.5 and this
        one still has; None where evaluations do not have it.
        """
        return model.mean_detail("kept", self.of_side("source"))

    def kl_law(self) -> KlLaw | None:
        """The loss on the source against the KL on the target texts, over all lines but the initial model's."""
        pairs = []
        for model in self.models:
            standing, kl = self.standing(model.label), self.kl_on_target(model)
            if (
                model.label != self.initial
                and standing
                and standing.source_loss is not None
                and kl is not None
            ):
                pairs.append((kl, standing.source_loss))
        return kl_law([kl for kl, _ in pairs], [loss for _, loss in pairs])

    def is_initial(self, model: ComparedModel) -> bool:
        """Whether the line is the initial model's."""
        return self.initial is not None and model.label == self.initial

    def method_text(self, model: ComparedModel) -> str | None:
        """How a line was made, in words."""
        if self.is_initial(model):
            return "initial model"
        return model.method.text() if model.method else None

    def families(self) -> dict[str, list[str]]:
        """Method -> labels, from the one that learnt most, of lines that have not diverged."""
        axes = self.axes()
        found: dict[str, list[str]] = {}
        for model in self.models:
            if model.method is not None and model.label in axes and not self.is_initial(model):
                found.setdefault(model.method.name, []).append(model.label)
        for labels in found.values():  # a line, not a zigzag
            labels.sort(key=lambda label: -axes[label][1])
        return found
