"""Readings of tasks from each model's bench.json: of the weights on disk, under settings that all models share.

A task that bench.json holds in parts, such as `mmlu` as `mmlu_anatomy`, `mmlu_astronomy`, ..., is all of its parts'
items together.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from formats.errors import ConfigError, FormatError, IdentityMismatchError
from trainer.bench.bench_file import BenchEntry, BenchFile, require_fresh
from trainer.bench.paired import common_entries, metric_of
from trainer.comparison.metric import Metric, task_of
from trainer.comparison.reading import Items, Reading

BITS = "bits_per_byte"
LOWER_IS_BETTER = (BITS, "brier_score", "ter")
"""Where bench.json gives no direction; perplexities besides."""
OF_A_RUN = ("num_fewshot", "limit", "seed", "chat_template", "backend", "dtype", "engine_args", "lm_eval")
"""Settings of a result that are no part of its task."""
IF_USED = ("seed", "chat_template")
"""Those that a result leaves out where they do nothing."""


def load_results(
    directories: Mapping[str, Path],
    identities: Mapping[str, Mapping[str, str]],
    bench: str | Path | None = None,
    entries: Collection[str] | None = None,
) -> dict[str, BenchFile]:
    """Label -> results.

    Args:
        directories: label -> model.
        identities: label -> `model_identity` of what is on disk now.
        bench: what was given as `anneal bench --out`; None reads beside the models.
        entries: keys of the entries that count (`BenchEntry.key`); None for all that are there.

    Raises:
        FormatError: a model has no results, or not ours.
        IdentityMismatchError: results of other weights than those on disk.
    """
    found = {}
    for label, directory in directories.items():
        place = directory if bench is None else Path(bench) / label
        found[label] = BenchFile.read(place)
        require_fresh(found[label], identities[label], str(directory))
        if entries is not None:
            known = found[label].entries
            found[label].entries = {key: entry for key, entry in known.items() if key in entries}
    return found


def read_task(
    results: Mapping[str, BenchFile], word: str, *, side: str, name: str
) -> tuple[Metric, dict[str, Reading]]:
    """One metric and its reading for every model.

    Args:
        results: label -> from `load_results`.
        word: `TASK`, `TASK:SHOTS`, `TASK:METRIC` or `TASK:SHOTS:METRIC`, the metric as `metric` or `metric,filter`;
            by default the one that says whether an item is right.

    Raises:
        ConfigError: a model has no such task or metric, all have it under several settings, or the metric has no
            direction.
        IdentityMismatchError: no settings that all models have the task under, or its parts were run under unequal
            ones.
        FormatError: items are missing, damaged, or not the same for all.
    """
    task, shots, wanted = task_of(word)
    files = list(results.values())
    tasks = _parts(files, task)
    if not tasks:
        raise ConfigError(
            f"--{side} takes caches and tasks, got {word}: there is no such directory, and no result of a task of "
            f"that name in {files[0].directory}; run anneal bench"
        )
    entries = [common_entries(files, part, shots) for part in tasks]
    _require_one_setting(task, [of_part[0] for of_part in entries])
    key = ",".join(metric_of(entries[0][0], wanted))
    higher = _direction(entries[0][0], key)
    metric = Metric(
        side=side, name=name, kind="task", measure=key, higher_is_better=higher, where=" ".join(tasks)
    )
    readings = {}
    for number, (label, file) in enumerate(results.items()):
        own = [of_part[number] for of_part in entries]
        readings[label] = _reading(file, own, metric)
    _require_same_items(readings, word)
    return metric, readings


def _parts(files: list[BenchFile], task: str) -> list[str]:
    """The task itself, or what the first model has below its name."""
    names = list(dict.fromkeys(entry.task for entry in files[0].entries.values()))
    if task in names or any(task == entry.task for file in files for entry in file.entries.values()):
        return [task]
    return sorted(name for name in names if name.startswith(task + "_"))


def _require_one_setting(task: str, parts: Sequence[BenchEntry]) -> None:
    """Refuse parts that were run in different ways.

    Raises:
        IdentityMismatchError: naming the first setting and two parts.
    """
    limit = max(part.settings.get("limit") or 0 for part in parts)
    for name in OF_A_RUN:
        found = {part.task: part.settings.get(name) for part in parts}
        if name == "limit":  # a part that has fewer items is whole under it
            found |= {
                part.task: limit or None
                for part in parts
                if found[part.task] is None and part.num_items <= limit
            }
        elif name in IF_USED:
            found = {part: value for part, value in found.items() if value not in (None, "")}
        first = next(iter(found), "")
        for part, value in found.items():
            if value != found[first]:
                raise IdentityMismatchError(
                    f"{task}: its parts are one metric under equal settings, got {name} {found[first]!r} in {first} "
                    f"and {value!r} in {part}; name one part, or run anneal bench on all of them at once"
                )


def _direction(entry: BenchEntry, key: str) -> bool:
    found = entry.metrics[key].get("higher_is_better")
    name = key.rpartition(",")[0]
    if found is None and (name.endswith("perplexity") or name in LOWER_IS_BETTER):
        return False
    if found is None:
        raise ConfigError(
            f"a metric needs a direction to be compared, got none for {name} of {entry.task}; name another one with "
            f"{entry.task}:METRIC, one of {', '.join(entry.metrics)}"
        )
    return bool(found)


def _reading(file: BenchFile, entries: list[BenchEntry], metric: Metric) -> Reading:
    """Several entries are joined item by item, or by their numbers of items where the items are not known."""
    name, _, filter_name = metric.measure.rpartition(",")
    values, errors, sizes, items = [], [], [], []
    for entry in entries:
        if metric.measure not in entry.metrics:
            raise ConfigError(
                f"{entry.task} has no {metric.measure}, got {', '.join(entry.metrics)}; choose one of them"
            )
        value = entry.metrics[metric.measure]["value"]
        values.append(math.nan if value is None else float(value))
        errors.append(entry.metrics[metric.measure].get("stderr"))
        sizes.append(entry.num_items)
        items.append(_items(file, entry, name, filter_name, metric) if entry.samples else None)
    total = sum(sizes)
    if len(entries) == 1:
        value, stderr = values[0], errors[0]
    else:
        pairs = list(zip(values, sizes, strict=True))
        value = metric.value(sum(metric.score(v) * n for v, n in pairs) / total)
        known = [(e, n) for e, n in zip(errors, sizes, strict=True) if e is not None]
        stderr = (
            math.sqrt(sum((e * n) ** 2 for e, n in known)) / total if len(known) == len(entries) else None
        )
    joined = _joined(items)
    if joined is not None and len(entries) > 1:
        value = metric.value(float(joined.scores_N.sum() / joined.weights_N.sum()))
    if joined is not None and not _is_mean(joined, metric, value):
        joined = None
    return Reading(
        value=value,
        stderr=stderr,
        items=joined,
        details={"num_items": total, "settings": entries[0].settings if len(entries) == 1 else {}},
    )


def _items(file: BenchFile, entry: BenchEntry, name: str, filter_name: str, metric: Metric) -> Items | None:
    samples = file.samples(entry, filter_name)
    if name not in samples.metrics:
        return None
    values = samples.metrics[name]
    weights = samples.weights.get(name)
    if weights is None:
        scores, weights = (values if metric.higher_is_better else -values), np.ones(len(values))
    else:  # summed log-likelihoods, in nats, over words, bytes or tokens
        scores = values / math.log(2) if name == BITS else values
    names = tuple(f"{item} {digest}" for item, digest in zip(samples.items, samples.doc_hashes, strict=True))
    return Items(scores, weights, samples.num_choices, names)


def _joined(parts: list[Items | None]) -> Items | None:
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return Items(
        np.concatenate([part.scores_N for part in known]),
        np.concatenate([part.weights_N for part in known]),
        np.concatenate([part.num_choices_N for part in known]),
        tuple(name for part in known for name in part.names),
    )


def _is_mean(items: Items, metric: Metric, value: float) -> bool:
    """Whether the value is the mean of its items: of a median or an F1 the items tell something else."""
    score = float(items.scores_N.sum() / items.weights_N.sum()) if len(items.scores_N) else math.nan
    return math.isclose(score, metric.score(value), rel_tol=1e-6, abs_tol=1e-9)


def _require_same_items(readings: Mapping[str, Reading], word: str) -> None:
    known = {label: reading.items for label, reading in readings.items() if reading.items is not None}
    first = next(iter(known.values()), None)
    for label, items in known.items():
        if first is not None and items.names != first.names:
            raise FormatError(
                f"equal settings must give equal items, got others for {word} in {label}; run anneal bench again"
            )
