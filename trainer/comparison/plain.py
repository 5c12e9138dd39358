"""A comparison as plain values for `--json` and for the page: stable keys, None for what is not finite."""

from typing import Any

from formats.finite_json import finite_json
from trainer.comparison.lines import Cell, ComparedModel, Lines
from trainer.comparison.metric import Metric

FORMAT = 1


def comparison_to_dict(comparison: Lines) -> dict[str, Any]:
    """Everything that a comparison knows."""
    law = comparison.kl_law()
    shown = {
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
    return finite_json(shown)


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
        **cell.details,
        "value": cell.value,
        "score": metric.score(cell.value),
        "spread": cell.spread,
        "stderr": cell.stderr,
        "gain": standing.gains[metric.key] if standing else None,
        "gain_stderr": difference.stderr if difference else None,
        "gain_interval": difference.interval if difference else None,
        "loss": standing.losses.get(metric.key) if standing else None,
        "share": standing.shares.get(metric.key) if standing else None,
        "flips": cell.flips.to_dict() if cell.flips else None,
    }
    if metric.kind == "text":
        plain["perplexity"] = cell.value
        plain["ce"] = -metric.score(cell.value)
    return plain
