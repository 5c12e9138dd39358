"""Tables as rows of words: what the terminal and the page both show."""

import math
from dataclasses import dataclass, field

from trainer.comparison.lines import Cell, ComparedModel, Lines
from trainer.comparison.metric import Metric


@dataclass(frozen=True)
class Table:
    """Two header rows (a group over its columns, then the columns), rows, and how many columns are words."""

    groups: list[str]
    header: list[str]
    rows: list[list[str]]
    num_words: int
    labels: list[str] = field(default_factory=list)
    """Of each row, the line it belongs to."""


def main_table(comparison: Lines) -> Table:
    """A line per model: its numbers, differences to the initial model, and the two shares."""
    related = comparison.initial is not None
    shared = comparison.direct is not None and related
    kls = [comparison.kl_on_target(model) for model in comparison.models]
    right = [comparison.still_right(model) for model in comparison.models]
    groups, header = ["", ""], ["  model", "method"]
    for metric in comparison.metrics:
        unit = "ppl" if metric.kind == "text" else measure_name(metric)
        groups += [f"{metric.side} {metric.name}", *([""] if related else [])]
        header += [unit, *(["nats" if metric.logarithmic else "gain"] if related else [])]
    tail = [
        *((("gain", "kept"), ("forgetting", "avoided")) if shared else ()),
        *((("source", "lost"),) if related else ()),
        *((("still", "right"),) if any(share is not None for share in right) else ()),
        *((("KL on", "target"),) if any(kl is not None for kl in kls) else ()),
    ]
    groups += [first for first, _ in tail]
    header += [second for _, second in tail]
    rows = []
    for model, kl, share in zip(comparison.models, kls, right, strict=True):
        mark = "* " if model.label in comparison.front else "  "
        row = [mark + name_of(model), comparison.method_text(model) or "-"]
        for metric in comparison.metrics:
            row.append(value_text(metric, model.cells[metric.key]))
            if related:
                row.append("" if comparison.is_initial(model) else gain_text(comparison, model, metric))
        standing = comparison.standing(model.label)
        blank = comparison.is_initial(model)
        if shared:
            row.append("" if blank else percent(standing.gain_kept if standing else None))
            row.append("" if blank else percent(standing.forgetting_avoided if standing else None))
        if related:
            row.append("" if blank else percent(standing.source_loss if standing else None, digits=1))
        if ("still", "right") in tail:
            row.append(percent(share, digits=1))
        if ("KL on", "target") in tail:
            row.append("-" if kl is None else f"{kl:.4f}")
        rows.append(row)
    return Table(groups, header, rows, 2, [model.label for model in comparison.models])


def flips_table(comparison: Lines) -> Table | None:
    """Which items changed, for every task of right or wrong answers; None without any."""
    header = [
        "task", "model", "items", "1->0", "0->1", "by luck", "1->0", "0->1", "difference", "95 % interval", "p",
    ]  # fmt: skip
    groups = ["", "", "", "lost", "won", "each way", "beyond luck", "", "", "", "McNemar"]
    rows, labels = [], []
    for metric in comparison.metrics:
        for model in comparison.models:
            cell = model.cells[metric.key]
            if cell.flips is None:
                continue
            flips, interval = cell.flips, cell.difference.interval if cell.difference else None
            rows.append(
                [
                    f"{metric.side} {metric.name}",
                    name_of(model),
                    f"{flips.num_items:,}",
                    f"{flips.lost:g}",
                    f"{flips.won:g}",
                    f"{flips.luck:.1f}",
                    f"{flips.lost_adjusted:.1f}",
                    f"{flips.won_adjusted:.1f}",
                    f"{cell.difference.difference:+.4f}" if cell.difference else "-",
                    f"{interval[0]:+.4f} .. {interval[1]:+.4f}" if interval else "-",
                    "-" if flips.p_value is None else f"{flips.p_value:.3f}",
                ]
            )
            labels.append(model.label)
    return Table(groups, header, rows, 2, labels) if rows else None


def notes_of(comparison: Lines) -> list[str]:
    """What stands below the tables, a sentence each."""
    lines = ["* Pareto front: no other model here is nowhere worse and somewhere better"]
    if comparison.initial is not None:
        lines.append(
            f"nats and gain: against {comparison.initial}, higher is better; +- half of the paired 95 % interval"
        )
    if any(model.num_seeds > 1 for model in comparison.models):
        lines.append(
            "(N seeds): the mean of N models that differ in their seed, and after the value their spread"
        )
    if comparison.direct is not None and comparison.initial is not None:
        lines.append(
            f"gain kept, forgetting avoided: shares of what {comparison.direct} gained and forgot"
            + (", mean over metrics" if len(comparison.metrics) > 2 else "")
        )
    lines += [no_share_note(metric, comparison.direct) for metric in comparison.without_share]
    unknown = [
        f"{metric.side} {metric.name}"
        for metric in comparison.metrics
        if any(
            m.cells[metric.key].difference is None and not comparison.is_initial(m) for m in comparison.models
        )
    ]
    if unknown and comparison.initial is not None:
        lines.append(f"no interval for {', '.join(unknown)}: only the totals are known, not the single items")
    lines += comparison.notes
    law = comparison.kl_law()
    if law is not None:
        lines.append(law.text())
    return lines


def no_share_note(metric: Metric, direct: str | None) -> str:
    """Why a metric has no share."""
    did = "gain" if metric.side == "target" else "forget"
    return f"{metric.side} {metric.name} has no share: {direct} did not {did} on it beyond noise"


def name_of(model: ComparedModel) -> str:
    """The label, with the number of seeds."""
    return model.label if model.num_seeds == 1 else f"{model.label} ({model.num_seeds} seeds)"


def measure_name(metric: Metric) -> str:
    """`acc`, or `exact_match (strict)` where answers are filtered."""
    name, _, filter_name = metric.measure.partition(",")
    return name if filter_name in ("", "none") else f"{name} ({filter_name})"


def value_text(metric: Metric, cell: Cell) -> str:
    """A perplexity with two digits behind the point, anything else with four; the spread over seeds behind it."""
    if not math.isfinite(cell.value):
        return "inf" if metric.logarithmic else "-"
    digits = 2 if metric.logarithmic else 4
    spread = f" +-{cell.spread:.{digits}f}" if cell.spread is not None and math.isfinite(cell.spread) else ""
    return f"{cell.value:.{digits}f}{spread}"


def gain_text(comparison: Lines, model: ComparedModel, metric: Metric) -> str:
    """The score's difference to the initial model, and half the width of its interval."""
    standing, cell = comparison.standing(model.label), model.cells[metric.key]
    if standing is None:
        return "-"
    digits = 3 if metric.logarithmic else 4
    interval = cell.difference.interval if cell.difference else None
    around = f" +-{(interval[1] - interval[0]) / 2:.{digits}f}" if interval else ""
    return f"{standing.gains[metric.key]:+.{digits}f}{around}"


def percent(share: float | None, digits: int = 0) -> str:
    """`94%`; `-` for None."""
    if share is None or not math.isfinite(share):
        return "-"
    return f"{100 * share:.{digits}f}%".replace("-0%", "0%").replace("-0.0%", "0.0%")
