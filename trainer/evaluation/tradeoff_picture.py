"""The picture of a sweep: what was learnt (target text) against what was kept (source text).

One point per model; by default both axes are perplexities, so the lower left corner is the best of both. Models of one
family (such as one method at several strengths) are joined in the given order; the dashed line is the Pareto
front: than which no other point is nowhere worse and somewhere better. matplotlib is imported when a picture is drawn.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from formats.errors import ConfigError
from formats.picture_file import new_figure, require_plottable, save_figure

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#5f6368"
WIDE = 2.0
"""Ratio between the largest and the smallest perplexity from which an axis is logarithmic."""
Point = Mapping[str, float]


LOWER_IS_BETTER: Mapping[str, bool] = {"source": False, "target": False}


def pareto_front(
    points: Mapping[str, Point], higher_is_better: Mapping[str, bool] = LOWER_IS_BETTER
) -> list[str]:
    """Labels than which no other point is nowhere worse and somewhere better, from the best on the target. O(n log n).

    Equal points are on it together, or not at all.

    Args:
        higher_is_better: `source` and `target` -> the direction; by default both axes are perplexities.
    """
    signs = {axis: -1.0 if higher_is_better[axis] else 1.0 for axis in ("source", "target")}
    cost = {
        label: (signs["target"] * point["target"], signs["source"] * point["source"])
        for label, point in points.items()
    }
    best = float("inf")
    front: list[str] = []
    for label in sorted(cost, key=lambda name: cost[name]):
        if cost[label][1] < best or (front and cost[label] == cost[front[-1]]):
            front.append(label)
            best = cost[label][1]
    return front


def plot_tradeoff(
    results: Mapping[str, Point],
    path: str | Path,
    *,
    initial: str = "initial",
    families: Mapping[str, Sequence[str]] | None = None,
    title: str | None = None,
    size: tuple[float, float] = (7.2, 5.0),
    source_label: str = "perplexity on the source text (what it knew)",
    target_label: str = "perplexity on the target text (what it learns)",
    higher_is_better: Mapping[str, bool] = LOWER_IS_BETTER,
) -> Path:
    """Draw the trade-off of several models and write it to `path` (PNG, SVG or PDF by its ending).

    Args:
        results: label -> {"source": perplexity, "target": perplexity}, or other numbers with `higher_is_better`.
        initial: label of the initial model, drawn as a star with lines through it; may be absent. The label
            "initial model" is recognised as well.
        families: name -> labels that are joined by a line, in order; a label in none stands alone.
        title: above the picture.
        size: width and height in inches, at 160 dots each.
        source_label, target_label: names of the axes.
        higher_is_better: `source` and `target` -> whether the better models lie at the axis' upper end.

    Raises:
        ConfigError: no results, a label without both numbers, or as `require_plottable`.
    """
    check_points(results, families or {})
    path = require_plottable(path)
    from matplotlib.ticker import ScalarFormatter

    initial = f"{initial} model" if initial not in results else initial  # either way to call it
    figure = new_figure(*size)
    axes: Any = figure.add_subplot()
    groups = {name: list(labels) for name, labels in (families or {}).items()}
    joined = {label for labels in groups.values() for label in labels}
    groups |= {label: [label] for label in results if label not in joined and label != initial}
    _draw_front(axes, results, initial, higher_is_better)
    for number, (name, labels) in enumerate(groups.items()):
        # From the eighth family on colours come again, with another marker.
        colour, marker = COLOURS[number % 7], MARKERS[(number + number // 7) % 7]
        xs, ys = (
            [results[label]["target"] for label in labels],
            [results[label]["source"] for label in labels],
        )
        axes.plot(
            xs, ys, marker, linestyle="-" if len(labels) > 1 else "none", color=colour, label=name,
            markersize=8, linewidth=1.6, zorder=3, markeredgecolor="white", markeredgewidth=0.8,
        )  # fmt: skip
        if len(labels) > 1:
            for label, x, y in zip(labels, xs, ys, strict=True):
                short = label.removeprefix(name).strip(" ,:-") or label
                axes.annotate(
                    short, (x, y), xytext=(6, 5), textcoords="offset points", fontsize=8, color=colour
                )
    if initial in results:
        x, y = results[initial]["target"], results[initial]["source"]
        axes.axhline(y, color=GREY, linewidth=0.8, linestyle=":", zorder=1)
        axes.axvline(x, color=GREY, linewidth=0.8, linestyle=":", zorder=1)
        axes.plot(
            [x],
            [y],
            "*",
            color="black",
            markersize=15,
            label=initial if initial.endswith("model") else f"{initial} model",
            zorder=4,
            linestyle="none",
        )
    for axis, key in ((axes.xaxis, "target"), (axes.yaxis, "source")):
        values = [point[key] for point in results.values()]
        if max(values) > WIDE * min(values) > 0:
            (axes.set_xscale if key == "target" else axes.set_yscale)("log")
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(ScalarFormatter())
    axes.set_xlabel(target_label)
    axes.set_ylabel(source_label)
    if title:
        axes.set_title(title, loc="left", fontsize=11)
    axes.margins(0.12)
    corner = [(0.97, 0.88) if higher_is_better[axis] else (0.03, 0.12) for axis in ("target", "source")]
    axes.annotate(
        "better", xy=tuple(end for end, _ in corner), xytext=tuple(start for _, start in corner),
        xycoords="axes fraction", fontsize=9, color=GREY, ha="center", va="center",
        arrowprops={"arrowstyle": "->", "color": GREY},
    )  # fmt: skip
    axes.grid(color="#e3e5e8", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return save_figure(figure, path, dpi=160)


def check_points(results: Mapping[str, Point], families: Mapping[str, Sequence[str]]) -> None:
    """Raise ConfigError unless there are points, all complete, and families name only known ones."""
    if not results:
        raise ConfigError("a trade-off plot needs at least one model, got none")
    for label, point in results.items():
        missing = [axis for axis in ("source", "target") if not isinstance(point.get(axis), int | float)]
        if missing:
            raise ConfigError(
                f"every model needs a source and a target perplexity, got no {missing[0]} for {label!r}"
            )
    unknown = [label for labels in families.values() for label in labels if label not in results]
    if unknown:
        raise ConfigError(f"families may only name given models, got {unknown[0]!r}")


def _draw_front(
    axes: Any, points: Mapping[str, Point], initial: str, higher_is_better: Mapping[str, bool]
) -> None:
    """The line ends before the initial model, but does not pass through what that one beats."""
    front = [label for label in pareto_front(points, higher_is_better) if label != initial]
    if len(front) > 1:
        xs, ys = [points[label]["target"] for label in front], [points[label]["source"] for label in front]
        axes.plot(xs, ys, "--", color=GREY, linewidth=1.0, zorder=2, label="Pareto front")
