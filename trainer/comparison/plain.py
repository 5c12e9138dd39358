"""A comparison as plain values for `--json` and for the page: stable keys, None for what is not finite."""

import math
from typing import Any

from trainer.comparison.lines import Cell, ComparedModel, Lines
from trainer.comparison.metric import Metric

FORMAT = 1


def comparison_to_dict(comparison: Lines) -> dict[str, Any]:
    """Everything that a comparison knows."""
    law = comparison.kl_law()
    return {
        "format": FORMAT,
        "initial": comparison.initial,
        "direct": comparison.direct,
        "metrics": [
            {
                "key": metric.key,
                "side": metric.side,
                "name": metric.name,
                "kind": metric.kind,
                "measure": metric.measure,
                "where": metric.where,
                "higher_is_better": metric.higher_is_better,
                "has_share": None if comparison.direct is None else metric not in comparison.without_share,
            }
            for metric in comparison.metrics
        ],
        "models": [_model(comparison, model) for model in comparison.models],
        "front": list(comparison.front),
        "kl_law": None if law is None else law.to_dict(),
        "notes": list(comparison.notes),
    }


def _model(comparison: Lines, model: ComparedModel) -> dict[str, Any]:
    standing = comparison.standing(model.label)
    return {
        "label": model.label,
        "models": dict(zip(model.members, model.paths, strict=True)),
        "method": comparison.method_text(model),
        "strengths": model.method.strengths if model.method else {},
        "num_seeds": model.num_seeds,
        "front": model.label in comparison.front,
        "gain_kept": standing.gain_kept if standing else None,
        "forgetting_avoided": standing.forgetting_avoided if standing else None,
        "source_loss": standing.source_loss if standing else None,
        "gain": standing.gain if standing else None,
        "kl_on_target": comparison.kl_on_target(model),
        "still_right": comparison.still_right(model),
        **{
            side: {
                metric.name: _cell(comparison, model, metric, model.cells[metric.key])
                for metric in comparison.of_side(side)
            }
            for side in ("source", "target")
        },
    }


def _cell(comparison: Lines, model: ComparedModel, metric: Metric, cell: Cell) -> dict[str, Any]:
    standing = comparison.standing(model.label)
    difference = cell.difference
    plain = {
        **{key: plain_value(value) for key, value in cell.details.items()},
        "value": finite_or_none(cell.value),
        "score": finite_or_none(metric.score(cell.value)),
        "spread": finite_or_none(cell.spread),
        "stderr": finite_or_none(cell.stderr),
        "gain": standing.gains[metric.key] if standing else None,
        "gain_stderr": finite_or_none(difference.stderr) if difference else None,
        "gain_interval": [finite_or_none(end) for end in difference.interval]
        if difference and difference.interval
        else None,
        "loss": standing.losses.get(metric.key) if standing else None,
        "share": standing.shares.get(metric.key) if standing else None,
        "flips": cell.flips.to_dict() if cell.flips else None,
    }
    if metric.kind == "text":
        plain["perplexity"] = finite_or_none(cell.value)
        plain["ce"] = finite_or_none(-metric.score(cell.value))
    return plain


def finite_or_none(value: float | None) -> float | None:
    """The number, None for what is not finite."""
    return value if value is not None and math.isfinite(value) else None


def plain_value(value: Any) -> Any:
    """The value, None for a number that is not finite."""
    return finite_or_none(value) if isinstance(value, float) else value
