"""The distributions of a cache as one picture. Needs matplotlib (the extra `plot`)."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from formats.cache_row import ReadableCache
from formats.inspect.summary import sampled_rows
from formats.logprobs.entropy import entropy
from formats.picture_file import new_figure, save_figure

INK, BLUE, PALE = "#1f2933", "#2b6cb0", "#c3dafe"


def plot_cache(
    cache: ReadableCache, summary: dict[str, Any], path: str | os.PathLike[str], *, full: bool = False
) -> None:
    """Write head sizes, covered mass, entropy and bytes by part to `path` (PNG, SVG or PDF by its suffix).

    Raises:
        ConfigError: as `save_figure`.
    """
    from matplotlib import rc_context

    rows = [cache[index].teacher for index in sampled_rows(cache, full).tolist()]
    filled = [teacher for teacher in rows if len(teacher)]
    none = np.zeros(0)
    counts = np.concatenate([t.counts for t in filled]) if filled else none
    missed = np.concatenate([np.exp(t.log_tail(1.0).astype(float)) for t in filled]) if filled else none
    nats = np.concatenate([entropy(t) for t in filled]) if filled else none

    with rc_context(
        {"font.size": 9, "axes.edgecolor": INK, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = new_figure(9.6, 6.4)
        axes = figure.subplots(2, 2)
        _histogram(axes[0, 0], counts, "entries per head", "head size", logarithmic=True)
        _histogram(
            axes[0, 1],
            np.maximum(missed, 1e-6),
            "probability outside the head",
            "uncovered mass",
            logarithmic=True,
        )
        _histogram(axes[1, 0], nats, "entropy of the teacher", "nats", logarithmic=False)
        _parts(axes[1, 1], summary)
        figure.suptitle(
            f"{Path(cache.path).name}: {summary['num_rows']:,} rows, {summary['num_positions']:,} positions, "
            f"{summary['bytes_per_token']:.1f} bytes/token",
            fontsize=11,
            color=INK,
        )
        save_figure(figure, Path(path), dpi=150)


def _histogram(axis: Any, values: np.ndarray, title: str, label: str, *, logarithmic: bool) -> None:
    axis.set_title(title, loc="left", color=INK)
    axis.set_xlabel(label)
    axis.set_ylabel("share of positions")
    if len(values) == 0:
        return
    if logarithmic:
        bins = np.geomspace(max(values.min(), 1e-6), max(values.max(), values.min() * 1.01) * 1.001, 33)
        axis.set_xscale("log")
    else:
        bins = np.linspace(0, max(float(values.max()), 1e-3), 41)
    axis.hist(
        values,
        bins=bins,
        weights=np.full(len(values), 1 / len(values)),
        color=PALE,
        edgecolor=BLUE,
        linewidth=0.6,
    )
    median = float(np.median(values))
    axis.axvline(median, color=INK, linewidth=1, linestyle="--")
    axis.annotate(
        f"median {median:.3g}",
        (median, 0.96),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=8,
        va="top",
    )


def _parts(axis: Any, summary: dict[str, Any]) -> None:
    tokens = max(1, summary["num_tokens"])
    per_token = summary["num_positions"] / tokens
    sizes = {name: part["bytes_per_position"] * per_token for name, part in summary["payload_parts"].items()}
    sizes["tokens"] = (
        summary["columns"]["input_ids"]["bytes_per_token"]
        + summary["columns"]["loss_mask"]["bytes_per_token"]
    )
    sizes["keys, container"] = (
        summary["columns"]["key"]["bytes_per_token"] + summary["columns"]["container"]["bytes_per_token"]
    )
    names = list(sizes)[::-1]
    values = [sizes[name] for name in names]
    axis.barh(names, values, color=PALE, edgecolor=BLUE, linewidth=0.6)
    for k, value in enumerate(values):
        axis.annotate(
            f"{value:.2f}", (value, k), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axis.set_title("bytes per token", loc="left", color=INK)
    axis.margins(x=0.15)
