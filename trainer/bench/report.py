"""What a benchmark found, as a table for people and as plain values."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.table import aligned
from trainer.bench.bench_file import BENCH_NAME, BenchEntry


@dataclass(frozen=True)
class ModelResults:
    """One model on all tasks of a command."""

    label: str
    directory: Path
    """Where bench.json is."""
    entries: dict[str, BenchEntry]
    """Task -> result."""
    ran: tuple[str, ...]
    """Tasks that this command ran; the others were found."""


@dataclass(frozen=True)
class BenchReport:
    """All models on all tasks."""

    models: tuple[ModelResults, ...]
    groups: dict[str, Any]
    """Name -> lm_eval.api.group.Group."""

    def group_metrics(self, model: ModelResults) -> dict[str, dict[str, Any]]:
        """Group -> `metric,filter` -> value, stderr; the harness's own averages over the group's tasks."""
        flat = {
            name: {
                "sample_len": entry.num_items,
                **{key: metric["value"] for key, metric in entry.metrics.items()},
                **{_stderr(key): metric["stderr"] for key, metric in entry.metrics.items()},
            }
            for name, entry in model.entries.items()
        }
        found: dict[str, dict[str, Any]] = {}
        for name, group in self.groups.items():
            values = group.aggregate(flat)
            found[name] = {
                key: {
                    "value": value,
                    "stderr": e if isinstance(e := values.get(_stderr(key)), float) else None,
                    "num_items": values.get("sample_len"),
                }
                for key, value in values.items()
                if "," in key and "_stderr," not in key and isinstance(value, int | float)
            }
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        return {
            "models": [
                {
                    "label": model.label,
                    "results": str(model.directory / BENCH_NAME),
                    "tasks": {
                        name: {
                            "metrics": entry.metrics,
                            "num_items": entry.num_items,
                            "num_truncated": entry.num_truncated,
                            "settings": entry.settings,
                            "samples": str(model.directory / entry.samples),
                        }
                        for name, entry in model.entries.items()
                    },
                    "groups": self.group_metrics(model),
                }
                for model in self.models
            ]
        }

    def text(self) -> str:
        """A table: a line per task and metric, a column per model."""
        rows = [["task", "metric", "shots", "items", *(model.label for model in self.models)]]
        rows += self._group_lines()
        rows += self._task_lines()
        lines = [
            aligned(rows, left=2),
            "",
            "+- one standard error, over items; arrows point to better",
            *self._notes(),
        ]
        return "\n".join(lines)

    def _task_lines(self) -> Iterator[list[str]]:
        for name, entry in self.models[0].entries.items():
            for key, metric in entry.metrics.items():
                cells = [_cell(model.entries[name].metrics.get(key, {})) for model in self.models]
                arrow = {True: " ^", False: " v"}.get(metric["higher_is_better"], "")
                yield [
                    name,
                    _metric_name(key) + arrow,
                    str(entry.settings["num_fewshot"]),
                    f"{entry.num_items:,}",
                    *cells,
                ]

    def _group_lines(self) -> Iterator[list[str]]:
        metrics = [self.group_metrics(model) for model in self.models]
        for name, values in metrics[0].items():
            for key, metric in values.items():
                cells = [_cell(found[name].get(key, {})) for found in metrics]
                yield [f"{name} (all)", _metric_name(key), "", f"{metric['num_items']:,}", *cells]

    def _notes(self) -> Iterator[str]:
        for model in self.models:
            for name, entry in model.entries.items():
                if entry.num_truncated:
                    yield (
                        f"{model.label}: {entry.num_truncated:,} of {entry.num_items:,} items of {name} were longer "
                        "than the model's context and were cut at the left"
                    )


def _stderr(key: str) -> str:
    name, _, filter_name = key.partition(",")
    return f"{name}_stderr,{filter_name}"


def _metric_name(key: str) -> str:
    name, _, filter_name = key.partition(",")
    return name if filter_name == "none" else f"{name} ({filter_name})"


def _cell(metric: Mapping[str, Any]) -> str:
    value, error = metric.get("value"), metric.get("stderr")
    if value is None:
        return "-"
    return f"{value:.4f}" + (f" +-{error:.4f}" if error is not None else "")
