"""Published numbers as inputs: the label annealing paper's Tables 1 and 2, and eight rows of docs/retention.md."""

import json
import math
from pathlib import Path

from trainer.bench.model_identity import model_identity
from trainer.comparison.metric import Metric
from trainer.comparison.standing import Point

ITEMS = {"math": 5000, "gsm8k": 1319, "humaneval": 164, "mmlu": 14042, "triviaqa": 17944}
"""Items of the evaluation sets, for standard errors: sqrt(p (1 - p) / n)."""

TASKS = ("math", "gsm8k", "humaneval", "mmlu", "triviaqa")
INITIAL = {"initial": (15.92, 51.17, 28.77, 65.03, 67.99)}
TABLE_1 = {  # Yang et al. 2024, Table 1: Llama-3-8B on 179M tokens of mathematical text
    **INITIAL,
    "direct": (17.10, 62.01, 38.31, 62.54, 53.80),
    "l2": (16.78, 62.24, 38.32, 62.24, 53.51),
    "annealed": (17.94, 61.78, 35.24, 64.62, 65.87),
}
TABLE_2 = {  # Table 2: the same model on 30M tokens of code instructions
    **INITIAL,
    "direct": (1.19, 37.07, 54.53, 64.82, 64.60),
    "l2": (11.36, 34.87, 53.00, 64.87, 64.48),
    "annealed": (17.16, 52.69, 51.06, 64.63, 67.24),
}
SIDES_1 = {"source": ["humaneval", "mmlu", "triviaqa"], "target": ["gsm8k", "math"]}
SIDES_2 = {"source": ["math", "gsm8k", "mmlu", "triviaqa"], "target": ["humaneval"]}

RETENTION = {  # docs/retention.md as of commit 943902e: (source, target) perplexity
    "tiny-base": (25.31, 486.89),
    "kl-0": (31.64, 190.40),
    "kl-1": (27.55, 202.18),
    "kl-16": (25.76, 325.06),
    "kl-4": (26.02, 264.02),
    "wise-0.25": (25.68, 339.26),
    "wise-0.5": (26.85, 247.99),
    "wise-0.75": (28.95, 205.88),
}


def text_metrics() -> tuple[Metric, Metric]:
    """One source and one target text."""
    source, target = (
        Metric(side=side, name="text", kind="text", measure="perplexity", higher_is_better=False)
        for side in ("source", "target")
    )
    return source, target


def retention_points(*labels: str) -> list[Point]:
    """The rows of these labels, by default all."""
    source, target = text_metrics()
    return [
        Point(label=label, values={source.key: RETENTION[label][0], target.key: RETENTION[label][1]})
        for label in labels or RETENTION
    ]


def write_bench(directory: Path, percents: tuple[float, ...], **changed) -> Path:
    """bench.json of a model as if its tasks had given these numbers; no single items."""
    results = []
    for task, percent in zip(TASKS, percents, strict=True):
        value, number = percent / 100, ITEMS[task]
        error = math.sqrt(value * (1 - value) / number)
        results.append(
            {
                "task": task,
                "settings": {"num_fewshot": 4, "limit": None, **changed},
                "metrics": {"acc,none": {"value": value, "stderr": error, "higher_is_better": True}},
                "primary": "acc,none",
                "num_items": number,
                "num_truncated": 0,
                "samples": "",
                "samples_sha256": "",
            }
        )
    content = {"format": 1, "model": model_identity(directory), "results": results}
    (directory / "bench.json").write_text(json.dumps(content))
    return directory
