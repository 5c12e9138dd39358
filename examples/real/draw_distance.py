"""Draw a sweep of the board by distance: gain kept against KL(initial || model), the mean over the source texts.

    python examples/real/draw_distance.py real-out/maths.json docs/results.png

Perplexity counts a model that has become surer of short answers as one that gained; KL counts it as changed.
"""

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

from trainer.evaluation.tradeoff_picture import plot_tradeoff

FAMILIES = (
    (r"direct,lr=\S+\+wise-ft,alpha=(?P<at>.+)", "direct, averaged with the initial model"),
    (r"kl_coef=1,lr=[^+]+\+wise-ft,alpha=(?P<at>.+)", "label annealing, averaged with the initial model"),
    (r"kl_coef=(?P<at>[\d.]+),lr=[^+]+", "label annealing, kl_coef"),
    (r"direct.*", "direct fine-tuning"),
    (r"own-kl.*", "KL to text that the model wrote"),
    (r"kl_coef=1,kl_on=target.*", "label annealing at the answers only"),
    (r"lora\.r=16,lr=.*", "LoRA"),
    (r"l2.*", "L2"),
    (r"sfa.*", "SFA"),
)
"""Name of a run -> whom it is joined with, and what is written beside it."""


def points(sweep: dict[str, Any]) -> tuple[dict[str, dict[str, float]], dict[str, list[str]]]:
    """(label -> what was kept and what was learnt, family -> its labels) of a sweep's JSON."""
    found: dict[str, dict[str, float]] = {}
    families: dict[str, list[str]] = {}
    for model in sweep["comparison"]["models"]:
        name, initial = model["label"], model["label"] == sweep["comparison"]["initial"]
        matches = ((re.fullmatch(pattern, name), family) for pattern, family in FAMILIES)
        match, family = next(((match, family) for match, family in matches if match), (None, name))
        at = (match.groupdict() if match else {}).get("at")
        label = "initial model" if initial else f"{family} {at}" if at else family
        distance = 0.0 if initial else statistics.mean(text["kl"] for text in model["source"].values())
        found[label] = {"source": distance, "target": 100 * model["gain_kept"]}
        if at:
            families.setdefault(family, []).append(label)
    for labels in families.values():
        labels.sort(key=lambda label: float(label.rpartition(" ")[2]))
    return found, families


def main() -> None:
    """Read the sweep, write the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("sweep", metavar="SWEEP", type=Path, help="what `anneal sweep` wrote: sweep.json")
    parser.add_argument("out", type=Path, help=".png, .svg or .pdf")
    arguments = parser.parse_args()
    if not arguments.sweep.is_file():
        parser.error(f"SWEEP must be a sweep's sweep.json, got {arguments.sweep}, which does not exist")
    found, families = points(json.loads(arguments.sweep.read_text(encoding="utf-8")))
    plot_tradeoff(
        found,
        arguments.out,
        initial="initial model",
        families=families,
        source_label="KL(initial || model), nats, mean over the source texts",
        target_label="gain kept on the answers, %",
        higher_is_better={"source": False, "target": True},
    )


if __name__ == "__main__":
    main()
