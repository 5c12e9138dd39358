"""README.md of a merged model: from what, by which formula, how strongly."""

from collections.abc import Mapping
from typing import Any

from trainer.merging.settings import MergeConfig
from trainer.result.model_card import card_head

FORMULAS: Mapping[str, tuple[str, str]] = {
    "wise-ft": ("WiSE-FT", "(1 - alpha) * theta0 + alpha * theta1"),
    "task-arithmetic": ("task arithmetic", "theta0 + scale * sum_i (theta_i - theta0)"),
    "ties": ("TIES", "theta0 + scale * TIES(theta_i - theta0)"),
}
"""Method -> its name and formula."""


def merge_card(config: MergeConfig, identity: Mapping[str, Any]) -> str:
    """The card as Markdown with the front matter that model hubs read."""
    base = str(identity["teacher"]["name"])
    title, formula = FORMULAS[config.method]
    lines = card_head(base, "merge", f"merged by {title}")
    lines += [f"The weights are `{formula}`, theta0 being those of `{base}`.", "", "| setting | value |"]
    lines += ["|---|---|", f"| initial model | `{base}` |"]
    lines += [f"| tuned model | `{name}` |" for name in config.tuned]
    lines += [f"| {name} | {value:g} |" for name, value in config.strengths().items()]
    lines += ["", "What was merged is recorded in `anneal.json`.", ""]
    return "\n".join(lines)
