"""The picture of a comparison as PNG, SVG or PDF: what was learnt against what was kept, a point per line."""

import math
from dataclasses import dataclass
from pathlib import Path

from trainer.comparison.layout import measure_name
from trainer.comparison.lines import Lines
from trainer.comparison.metric import Metric
from trainer.evaluation.tradeoff_picture import plot_tradeoff


def plot_comparison(comparison: Lines, path: str | Path) -> Path:
    """Draw it with matplotlib.

    Raises:
        ConfigError: no line that could be drawn, matplotlib is missing, or the file cannot be written.
    """
    axes = picture_axes(comparison)
    return plot_tradeoff(
        axes.points,
        path,
        initial=comparison.initial or "",
        families=comparison.families(),
        source_label=axes.source_label,
        target_label=axes.target_label,
        higher_is_better=axes.higher_is_better,
    )


@dataclass(frozen=True)
class PictureAxes:
    """What is drawn: label -> {"source", "target"}, with names and directions of the axes."""

    points: dict[str, dict[str, float]]
    source_label: str
    target_label: str
    higher_is_better: dict[str, bool]


def picture_axes(comparison: Lines, pair: tuple[Metric, Metric] | None = None) -> PictureAxes:
    """The axes of one source and one target metric, or of the whole: their own values where there is one of each,
    else the mean loss and the mean gain.
    """
    sources, targets = comparison.of_side("source"), comparison.of_side("target")
    if pair is None and len(sources) == len(targets) == 1:
        pair = (sources[0], targets[0])
    shown = comparison.axes()
    if pair is None:
        gained = "gain kept" if comparison.direct is not None else "gain, as a share of the largest"
        return PictureAxes(
            {label: {"source": 100 * lost, "target": 100 * gain} for label, (lost, gain) in shown.items()},
            f"lost on the source in %, mean of {len(sources)}",
            f"{gained} in %, mean of {len(targets)}",
            {"source": False, "target": True},
        )
    source, target = pair
    points = {
        model.label: {"source": model.cells[source.key].value, "target": model.cells[target.key].value}
        for model in comparison.models
        if all(math.isfinite(metric.score(model.cells[metric.key].value)) for metric in pair)
    }
    return PictureAxes(
        points,
        f"{axis_name(source)} (what it knew)",
        f"{axis_name(target)} (what it learns)",
        {"source": source.higher_is_better, "target": target.higher_is_better},
    )


def axis_name(metric: Metric) -> str:
    """`perplexity on NAME`, `acc on NAME`."""
    return f"{measure_name(metric)} on {metric.name}"
