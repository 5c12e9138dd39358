"""Where each model stands: what it learnt and what it lost, as shares of what direct fine-tuning did.

Pure functions over points (label -> metric -> value), so that numbers of any origin can be fed.

    gain kept            (score - score0) / (score_direct - score0)          of a target metric
    forgetting avoided   1 - (score0 - score) / (score0 - score_direct)      of a source metric

For a perplexity the first is ln(ppl0 / ppl) / ln(ppl0 / ppl_direct). Several metrics of a side are combined by the
plain mean of each one's own share, so that neither the length of a text nor the scale of a metric sets its weight.
A share is undefined where direct fine-tuning did not gain, or did not forget, by more than the standard error of that
difference (where one is known): dividing by noise says nothing. Such a metric is left out of the mean and named.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from formats.errors import ConfigError
from trainer.comparison.metric import Metric
from trainer.evaluation.tradeoff_picture import pareto_front

NEEDS_DIRECT = "needs direct fine-tuning to relate to"
NO_DIRECT = f"{NEEDS_DIRECT}, got no model of it; name it with --direct LABEL"
"""What is said of a rule where there is none."""
NO_DISTANCE = (
    "needs the KL to the initial model on a source text, got none; name a cache of that model with --source"
)
"""The same where tasks alone are known of a source."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model, or the mean of one over seeds."""

    label: str
    values: Mapping[str, float]
    """`Metric.key` -> value: a perplexity, an accuracy, ..."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """`Metric.key` -> standard error of the score's difference to the initial model; absent where unknown."""
    spreads: Mapping[str, float] = field(default_factory=dict)
    """`Metric.key` -> standard deviation of the score over seeds; absent with one seed."""
    num_seeds: int = 1
    distance: float | None = None
    """Mean KL(initial || model) over the source texts, in nats per token; None where no text tells."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One point against the initial model and direct fine-tuning."""

    gains: Mapping[str, float]
    """`Metric.key` -> score minus the initial model's; negative where something was lost. Both sides."""
    losses: Mapping[str, float]
    """Source `Metric.key` -> relative loss (`Metric.loss`)."""
    shares: Mapping[str, float]
    """`Metric.key` -> gain kept or forgetting avoided, where defined."""
    gain_kept: float | None
    """Mean of the target shares; None without direct fine-tuning or where it gained nothing."""
    forgetting_avoided: float | None
    """Mean of the source shares; None without direct fine-tuning or where it forgot nothing."""
    source_loss: float | None
    """Mean of `losses`: 0.02 is 2 %; negative where the source improved."""
    gain: float | None
    """Mean over target metrics of the gain as a share of direct's, or of the largest gain of all points where there is
    no direct one: the axis of what was learnt."""


def require_complete(points: Sequence[Point], metrics: Sequence[Metric]) -> None:
    """Refuse points that lack a metric, or two of one label.

    Raises:
        ConfigError: naming the point.
    """
    labels = [point.label for point in points]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"points must have different labels, got {label!r} twice")
    for point in points:
        missing = [metric.key for metric in metrics if metric.key not in point.values]
        if missing:
            raise ConfigError(
                f"every point needs a value of every metric, got no {missing[0]} for {point.label!r}"
            )


def finite(point: Point, metrics: Iterable[Metric]) -> bool:
    """Whether the model has not diverged on any metric."""
    return all(math.isfinite(metric.score(point.values[metric.key])) for metric in metrics)


def standings(
    points: Sequence[Point], metrics: Sequence[Metric], *, initial: str, direct: str | None = None
) -> tuple[dict[str, Standing], list[Metric]]:
    """Label -> standing, for points that have not diverged; and the metrics without a share, by direct's lack.

    Raises:
        ConfigError: incomplete points, no such label, or the initial model has no finite value.
    """
    require_complete(points, metrics)
    known = {point.label: point for point in points}
    for what, label in (("initial model", initial), ("direct fine-tuning", direct)):
        if label is not None and label not in known:
            raise ConfigError(
                f"the {what} must be one of the models, got {label!r}; they are {', '.join(known)}"
            )
    first = known[initial]
    if not finite(first, metrics):
        raise ConfigError(
            f"the initial model must have finite values, got {dict(first.values)} for {initial!r}"
        )
    gains = {
        label: {m.key: m.score(point.values[m.key]) - m.score(first.values[m.key]) for m in metrics}
        for label, point in known.items()
        if finite(point, metrics)
    }
    reference = None if direct is None else gains.get(direct)
    if direct is not None and reference is None:
        raise ConfigError(f"direct fine-tuning must have finite values, got {dict(known[direct].values)}")
    moved, unmoved = _denominators(metrics, reference, known[direct] if direct is not None else None)
    largest = {m.key: max(found[m.key] for found in gains.values()) for m in metrics if m.side == "target"}
    return {
        label: _standing(found, known[label], first, metrics, moved, largest)
        for label, found in gains.items()
    }, unmoved


def _denominators(
    metrics: Sequence[Metric], reference: Mapping[str, float] | None, direct: Point | None
) -> tuple[dict[str, float], list[Metric]]:
    """`Metric.key` -> direct's gain where it says something, and the metrics where it does not."""
    if reference is None or direct is None:
        return {}, []
    moved, unmoved = {}, []
    for metric in metrics:
        gain = reference[metric.key]
        expected = gain if metric.side == "target" else -gain  # what fine-tuning does: learn, and forget
        if expected > direct.errors.get(metric.key, 0.0):
            moved[metric.key] = gain
        else:
            unmoved.append(metric)
    return moved, unmoved


def _standing(
    gains: Mapping[str, float],
    point: Point,
    first: Point,
    metrics: Sequence[Metric],
    moved: Mapping[str, float],
    largest: Mapping[str, float],
) -> Standing:
    sources = [metric for metric in metrics if metric.side == "source"]
    targets = [metric for metric in metrics if metric.side == "target"]
    losses = {}
    for metric in sources:
        loss = metric.loss(point.values[metric.key], first.values[metric.key])
        if loss is not None:
            losses[metric.key] = loss
    shares = {metric.key: gains[metric.key] / moved[metric.key] for metric in targets if metric.key in moved}
    gain_kept = mean(shares.values())
    avoided = {m.key: 1 - gains[m.key] / moved[m.key] for m in sources if m.key in moved}
    of_largest = [gains[key] / most for key, most in largest.items() if most > 0]
    return Standing(
        gains=gains,
        losses=losses,
        shares={**shares, **avoided},
        gain_kept=gain_kept,
        forgetting_avoided=mean(avoided.values()),
        source_loss=mean(losses.values()),
        gain=gain_kept if gain_kept is not None else mean(of_largest),
    )


def mean(values: Iterable[float]) -> float | None:
    """The plain mean; None of nothing."""
    found = list(values)
    return math.fsum(found) / len(found) if found else None


def front_of(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Labels on the front of (lost, gained), as `pareto_front` says it; from the largest gain. O(n log n)."""
    named = {label: {"source": lost, "target": gained} for label, (lost, gained) in points.items()}
    return pareto_front(named, {"source": False, "target": True})


def beats(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether `one` is nowhere worse and somewhere better; scores or gains, higher is better."""
    return all(one[key] >= other[key] for key in other) and any(one[key] > other[key] for key in other)
