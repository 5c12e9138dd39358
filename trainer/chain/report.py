"""What a chain came to: the table of perplexities, what follows from the matrix, and matrix.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from formats.finite_json import finite_json
from formats.table import aligned
from trainer.chain.config import ChainConfig
from trainer.chain.matrix import FORMULAS, Summary
from trainer.evaluation.evaluate import Result

REPORT_NAME = "matrix.json"
KEPT = (
    "ce",
    "perplexity",
    "accuracy",
    "entropy",
    "confidence",
    "calibration_error",
    "num_tokens",
    "num_rows",
)
"""What matrix.json says of every cell."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model of a chain."""

    label: str
    kind: str
    """initial, stage, direct, multitask or never-seen; of finished models also release."""
    directory: str
    results: Mapping[str, Result]
    """Column -> evaluation."""
    stage: int | None = None
    """After how many stages; 0 is the initial model."""
    task: str | None = None
    """What it learnt last, or, never-seen, what it did not learn."""

    def goodness(self, columns: Sequence[str], metric: str) -> np.ndarray:
        """[columns], higher is better: nats or a share; minus infinity of a model whose numbers are none."""
        values = [self.results[name][metric] for name in columns]
        found = np.array(values, np.float64) * (1.0 if metric == "accuracy" else -1.0)
        return np.where(np.isnan(found), -np.inf, found)


@dataclass(kw_only=True)
class ChainReport:
    """The end of a chain."""

    config: ChainConfig
    columns: Sequence[str]
    """Held-out texts, tasks first."""
    rows: Sequence[Row]
    failed: Mapping[str, str]
    """Name of a run -> why it has no result."""

    @property
    def metric(self) -> str:
        """ce or accuracy."""
        return self.config.metric

    @property
    def tasks(self) -> list[str]:
        """In the order of the chain."""
        return list(self.config.tasks)

    @property
    def shown(self) -> list[Row]:
        """Every model once: stages that the control `direct` shares are rows of both."""
        found: dict[tuple[str, str], Row] = {}
        for row in self.rows:
            found.setdefault((row.label, row.directory), row)
        return list(found.values())

    def matrix(self, kind: str = "stage") -> np.ndarray | None:
        """R, [stages + 1, tasks], of the chain or of the control `direct`; None while a stage is missing."""
        rows = [row for row in self.rows if row.kind in ("initial", kind)]
        if len(rows) != len(self.tasks) + 1:
            return None
        return np.stack([row.goodness(self.tasks, self.config.metric) for row in rows])

    @cached_property
    def summaries(self) -> dict[str, Summary]:
        """`chain` and, where it was made, `direct` -> what their matrix comes to."""
        metric = self.config.metric
        multitask = next((r.goodness(self.tasks, metric) for r in self.rows if r.kind == "multitask"), None)
        unseen = {r.task: r.goodness(self.tasks, metric) for r in self.rows if r.kind == "never-seen"}
        never = None
        if len(unseen) == len(self.tasks):
            never = np.array([unseen[task][number] for number, task in enumerate(self.tasks)])
        found = {}
        for name, kind in (("chain", "stage"), ("direct", "direct")):
            matrix = self.matrix(kind)
            if matrix is not None:
                found[name] = Summary.of(matrix, multitask=multitask, never_seen=never)
        return found

    def text(self) -> str:
        """For people."""
        parts = [self.table(), self.summary_text()]
        parts += [f"failed: {name}: {line}" for name, line in sorted(self.failed.items())]
        return "\n\n".join(part for part in parts if part)

    def table(self) -> str:
        """A line per model, a column per text."""
        return cells_table(self.shown, self.columns, self.metric, " after")

    def summary_text(self) -> str:
        """The summaries side by side, and the formulas of those that are shown."""
        if not self.summaries:
            return ""
        shown = [n for n in FORMULAS if any(s.values[n] is not None for s in self.summaries.values())]
        unit = "share of tokens" if self.config.metric == "accuracy" else "nats"
        lines = [(unit, *self.summaries)]
        for name in shown:
            values = [summary.values[name] for summary in self.summaries.values()]
            lines.append((name, *("-" if value is None else f"{value:+.4f}" for value in values)))
        width = max(map(len, shown))
        formulas = [f"{name.ljust(width)}  {FORMULAS[name]}" for name in shown]
        R = "accuracy" if self.config.metric == "accuracy" else "minus the cross-entropy"
        formulas.append(f"R[i][j]: {R} after i of n stages on task j, higher is better; one seed")
        return aligned(lines) + "\n\n" + "\n".join(formulas)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under stable keys, without times, the same when the chain is run again."""
        matrices = {name: self.matrix(kind) for name, kind in (("chain", "stage"), ("direct", "direct"))}
        shown = {
            "tasks": self.tasks,
            "columns": list(self.columns),
            "metric": self.config.metric,
            "rows": [
                {
                    "label": row.label,
                    "kind": row.kind,
                    "stage": row.stage,
                    "task": row.task,
                    "directory": row.directory,
                    "results": {
                        column: {key: result.get(key) for key in KEPT}
                        for column, result in row.results.items()
                    },
                }
                for row in self.rows
            ],
            "R": {name: matrix.tolist() for name, matrix in matrices.items() if matrix is not None},
            "summary": {name: summary.values for name, summary in self.summaries.items()},
            "failed": dict(self.failed),
        }
        return finite_json(shown)


def cells_table(rows: Sequence[Row], columns: Sequence[str], metric: str, after: str = "") -> str:
    """A line per model, a column per text; `after` follows the measure's name above the labels."""
    title = "token accuracy" if metric == "accuracy" else "perplexity"
    lines = [(row.label, *(cell_text(row.results[name], metric) for name in columns)) for row in rows]
    return aligned([(title + after, *columns), *lines])


def cell_text(result: Result, metric: str) -> str:
    """One cell of the table."""
    if metric == "accuracy":
        return f"{100 * result['accuracy']:.1f} %"
    return f"{result['perplexity']:.2f}"
