"""Reading results side by side: only of the weights on disk, only under equal settings, item by item."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from formats.errors import ConfigError, FormatError, IdentityMismatchError
from formats.identity.fingerprint import resolve_model
from trainer.bench.bench_file import BenchEntry, BenchFile, require_fresh
from trainer.bench.model_identity import model_identity


@dataclass(frozen=True)
class PairedItems:
    """One metric of one task, for two models, on the same items. N items."""

    task: str
    metric: str
    """`metric,filter`."""
    items: np.ndarray
    """[N] int32: numbers of the items."""
    num_choices: np.ndarray
    """[N] int32: choices to pick from; 0 where the model writes its answer."""
    first: np.ndarray
    """[N] float64: the metric of the first model; for a log-likelihood, its sum in nats."""
    second: np.ndarray
    """[N] float64: of the second."""
    weights: np.ndarray
    """[N] float64: what a sum is divided by (words, bytes); 1 for other metrics."""


def load_bench(model: str | Path, results: str | Path | None = None) -> BenchFile:
    """The results of a model, if they are of the weights that it has now.

    Args:
        model: its directory or hub name.
        results: the directory with bench.json; by default the model's own.

    Raises:
        ConfigError: no such model.
        FormatError: there are no results, or not ours.
        IdentityMismatchError: they were measured on other weights.
    """
    directory = resolve_model(model)
    found = BenchFile.read(Path(results) if results is not None else directory)
    require_fresh(found, model_identity(directory), str(model))
    return found


def paired(
    first: BenchFile, second: BenchFile, tasks: Sequence[str] | None = None, metric: str | None = None
) -> dict[str, PairedItems]:
    """Bring the items of two models together.

    Args:
        first, second: from `load_bench`.
        tasks: names; by default all that both have.
        metric: `metric` or `metric,filter`; by default the one that says whether an item is right.

    Returns:
        task -> its items. Of settings that both have a task under and that differ in their limit alone, those with the
        most items.

    Raises:
        ConfigError: a task that one of them has no result for, or no common task, or an unknown metric, or a task
            that both have under several settings.
        IdentityMismatchError: a task that they have under different settings only; the message names them.
        FormatError: items are missing or damaged.
    """
    common = sorted({e.task for e in first.entries.values()} & {e.task for e in second.entries.values()})
    wanted = list(tasks) if tasks is not None else common
    if not wanted:
        raise ConfigError(
            f"two models are compared on common tasks, got none in {first.directory} and {second.directory}; "
            "run anneal bench on both at once"
        )
    return {task: _pair(first, second, task, metric) for task in wanted}


def _pair(first: BenchFile, second: BenchFile, task: str, metric: str | None) -> PairedItems:
    a, b = common_entries((first, second), task)
    name, filter_name = metric_of(a, metric)
    left, right = first.samples(a, filter_name), second.samples(b, filter_name)
    for one, owner in ((left, first), (right, second)):
        if name not in one.metrics:
            raise ConfigError(
                f"a metric must have a value per item, got {name} of {task} in {owner.directory}; choose from "
                f"{', '.join(one.metrics)}"
            )
    if not np.array_equal(left.items, right.items) or left.doc_hashes != right.doc_hashes:
        raise FormatError(
            f"equal settings must give equal items, got others for {task} in {first.directory} and "
            f"{second.directory}; run anneal bench again"
        )
    return PairedItems(
        task=task,
        metric=f"{name},{filter_name}",
        items=left.items,
        num_choices=left.num_choices,
        first=left.metrics[name],
        second=right.metrics[name],
        weights=left.weights.get(name, np.ones(len(left.items))),
    )


def common_entries(files: Sequence[BenchFile], task: str, shots: int | None = None) -> list[BenchEntry]:
    """The result of each model for one task, all under equal settings.

    Args:
        files: one of each model.
        task: its name.
        shots: examples in the prompt; None for whatever there is.

    Of settings that differ in their limit alone, those with the most items: a larger limit holds the smaller one.

    Raises:
        ConfigError: a model has no result of the task, or all have it under several settings.
        IdentityMismatchError: there are no settings that all have it under; the message names a difference.
    """
    of_task = []
    for results in files:
        found = [entry for entry in results.entries.values() if entry.task == task]
        of_task.append({e.key: e for e in found if shots is None or e.settings.get("num_fewshot") == shots})
        if not of_task[-1]:
            what = task if shots is None else f"{task} with {shots} shots"
            raise ConfigError(
                f"a comparison needs results of all models, got none for {what} in {results.directory}; "
                "run anneal bench"
            )
    shared = sorted(set(of_task[0]).intersection(*of_task[1:]))
    if shared:
        best = max(shared, key=lambda key: of_task[0][key].num_items)
        _require_one(task, of_task[0][best], [of_task[0][key] for key in shared])
        return [entries[best] for entries in of_task]
    at = next(i for i in range(1, len(files)) if not set(of_task[0]).intersection(*of_task[1 : i + 1]))
    first, second = list(of_task[0].values())[-1], list(of_task[at].values())[-1]
    differing = [
        f"{key} {first.settings.get(key)!r} and {second.settings.get(key)!r}"
        for key in sorted({*first.settings, *second.settings})
        if first.settings.get(key) != second.settings.get(key)
    ]
    raise IdentityMismatchError(
        f"{task}: results are compared under equal settings, got "
        f"{'; '.join(differing) or 'none that all models have'} ({files[0].directory}, {files[at].directory}); "
        "run anneal bench on all at once"
    )


def _require_one(task: str, best: BenchEntry, shared: Sequence[BenchEntry]) -> None:
    """Refuse to choose between settings that ask something else; a smaller limit asks less of the same.

    Raises:
        ConfigError: naming the settings that differ, with their values.
    """
    settings = [entry.settings for entry in shared]
    differing = [
        name
        for name in sorted({name for of_one in settings for name in of_one} - {"limit"})
        if any(not _agree(name, of_one.get(name), best.settings.get(name)) for of_one in settings)
    ]
    if differing:
        values = [f"{name} {', '.join(sorted({repr(s.get(name)) for s in settings}))}" for name in differing]
        way = f"{task}:SHOTS" if differing == ["num_fewshot"] else "anneal bench --out DIR and --bench DIR"
        raise ConfigError(
            f"{task}: results are compared under one setting, got several that all models have it under "
            f"({'; '.join(values)}); choose with {way}"
        )


def _agree(name: str, value: Any, other: Any) -> bool:
    """Whether two results agree on a setting; a seed that drew nothing is None and agrees with any."""
    return value == other or (name == "seed" and None in (value, other))


def metric_of(entry: BenchEntry, metric: str | None) -> tuple[str, str]:
    """(metric, filter) of `metric` or `metric,filter`; of None the one that says whether an item is right.

    Raises:
        ConfigError: the task has no such metric.
    """
    wanted = metric or entry.primary
    for key in entry.metrics:
        if wanted in (key, key.rpartition(",")[0]):
            name, _, filter_name = key.rpartition(",")
            return name, filter_name
    raise ConfigError(
        f"{entry.task} has the metrics {', '.join(entry.metrics)}, got {wanted!r}; choose one of them"
    )
