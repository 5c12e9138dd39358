"""The picture of a chain: its matrix as a heat map, and one line per task over the stages.

Colours say how many nats worse than the best model of the picture a model is on a text, so that columns of different
difficulty can be compared; the numbers are those of the table. matplotlib is imported when a picture is drawn.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from formats.picture_file import new_figure, require_plottable, save_figure
from trainer.chain.report import Row, cell_text
from trainer.evaluation.tradeoff_picture import COLOURS, GREY, MARKERS


def draw_matrix(rows: Sequence[Row], columns: Sequence[str], path: Path, *, metric: str) -> Path:
    """Draw it and write it to `path` (PNG, SVG or PDF by its ending).

    Args:
        rows: models; those of kind initial, stage and release make the lines, in their order.
        columns: texts.
        metric: ce or accuracy.

    Raises:
        ConfigError: as `require_plottable`.
    """
    path = require_plottable(path)
    R = np.stack([row.goodness(columns, metric) for row in rows])
    worse = R.max(axis=0) - R
    figure = new_figure(3.4 + 0.95 * len(columns) + 4.2, max(3.2, 1.2 + 0.42 * len(rows)))
    left, right = figure.subplots(1, 2, width_ratios=[2.0 + 0.95 * len(columns), 4.2])
    top = max(float(np.nanmax(worse[np.isfinite(worse)], initial=0.0)), 1e-12)
    image = left.imshow(worse, cmap="Blues", vmin=0.0, vmax=top, aspect="auto")
    for i, row in enumerate(rows):
        for j, name in enumerate(columns):
            dark = worse[i, j] > 0.6 * top
            left.text(
                j, i, cell_text(row.results[name], metric), ha="center", va="center", fontsize=9,
                color="white" if dark else "black",
            )  # fmt: skip
    left.set_xticks(range(len(columns)), columns)
    left.set_yticks(range(len(rows)), [row.label for row in rows])
    left.tick_params(length=0)
    left.xaxis.tick_top()
    unit = "share worse than the best" if metric == "accuracy" else "nats worse than the best"
    figure.colorbar(image, ax=left, label=unit)
    _draw_lines(right, [row for row in rows if row.kind in ("initial", "stage", "release")], columns, metric)
    return save_figure(figure, path, dpi=110)


def _draw_lines(axes: Any, rows: Sequence[Row], columns: Sequence[str], metric: str) -> None:
    for number, name in enumerate(columns):
        values = [row.results[name][metric] for row in rows]
        axes.plot(
            range(len(rows)), values, MARKERS[number % 7], linestyle="-", color=COLOURS[number % 7], label=name,
            markersize=6, linewidth=1.5,
        )  # fmt: skip
        learnt = next((i for i, row in enumerate(rows) if row.task == name), None)
        if learnt is not None:
            axes.axvline(learnt, color=GREY, linewidth=0.6, linestyle=":")
    axes.set_xticks(range(len(rows)), [row.label for row in rows], rotation=20, ha="right")
    axes.set_ylabel("token accuracy" if metric == "accuracy" else "cross-entropy, nats per token")
    axes.grid(color="#e3e5e8", linewidth=0.6)
    axes.legend(frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
