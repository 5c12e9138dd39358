"""Readings of texts: every model is evaluated once on every cache; what was found before is not computed again.

The evaluation that a run records is not reused: it was measured on the weights before they were rounded to the saved
dtype, and on rows that the record does not name.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from formats.cache import TeacherCache
from formats.disk.manifest import MANIFEST_NAME
from formats.errors import ConfigError, FormatError, IdentityMismatchError
from formats.progress import Progress
from trainer.bench.model_identity import model_identity
from trainer.comparison.evaluation_file import EvaluationFile
from trainer.comparison.metric import PERPLEXITY, Metric, could_be_task
from trainer.comparison.reading import Items, Reading
from trainer.evaluation.evaluate import Result, evaluate, require_related
from trainer.loading import default_device, load_tokenizer, open_cache

ROWS = ("row_ce", "row_tokens")


def open_texts(words: Mapping[tuple[str, str], str]) -> dict[Metric, TeacherCache]:
    """(side, name) -> cache as metric -> opened cache.

    Raises:
        FormatError: a cache is missing, unfinished or broken.
        IdentityMismatchError: they were built with different initial models.
    """
    found = {}
    for (side, name), word in words.items():
        metric = Metric(
            side=side, name=name, kind="text", measure=PERPLEXITY, higher_is_better=False, where=str(word)
        )
        found[metric] = open_text(word)
    weights = {metric: cache.identity.teacher.get("weights") for metric, cache in found.items()}
    if None not in weights.values() and len(set(weights.values())) > 1:
        one, *others = found
        other = next(metric for metric in others if weights[metric] != weights[one])
        raise IdentityMismatchError(
            "--source and --target must be caches of one initial model, got "
            + " and ".join(f"{found[m].path} ({str(weights[m])[:12]})" for m in (one, other))
            + "; build both with the initial model"
        )
    return found


def open_text(word: str) -> TeacherCache:
    """The cache that a source or target names.

    Raises:
        FormatError: there is none; of a directory that has the name of a task, with what to write for the task.
    """
    try:
        return TeacherCache(word)
    except FormatError as error:
        if type(error) is FormatError and could_be_task(word) and not (Path(word) / MANIFEST_NAME).exists():
            raise FormatError(f"{error}, or write {word}:METRIC for the task of that name") from None
        raise


def require_readable(caches: Mapping[Metric, TeacherCache], directory: Path, *, is_initial: bool) -> None:
    """Refuse caches that mean nothing for this model, before anything is evaluated.

    Raises:
        ConfigError: the model has no tokenizer.
        IdentityMismatchError: naming the part that differs.
    """
    tokenizer = load_tokenizer(directory)
    for cache in caches.values():
        require_related(cache, directory, tokenizer)
        if is_initial:
            open_cache(str(cache.path), directory, tokenizer)


def read_texts(
    label: str,
    directory: Path,
    caches: Mapping[Metric, TeacherCache],
    memory: EvaluationFile,
    *,
    dtype: str,
    device: str | None,
    limit: int | None,
    progress: Progress,
    forget: Callable[[str], None] = lambda reason: None,
) -> dict[Metric, Reading]:
    """Readings of one model on all caches.

    Args:
        memory: results of earlier calls, and the place for new ones, which are written one by one.
        forget: called with a sentence for every result that could not be written down.

    Raises:
        ConfigError: a cache has no tokens that carry loss.
        IdentityMismatchError: the model is another one than `memory` is of: it was replaced meanwhile.
    """
    keys = keys_of(caches, dtype=dtype, device=device, limit=limit)
    names = _phases(caches)

    def compute(pending: Sequence[str], remember: Callable[[str, Result], None]) -> Mapping[str, Result]:
        def remember_if_same(name: str, result: Result) -> None:
            require_unchanged(directory, memory.model)
            remember(name, result)

        require_unchanged(directory, memory.model)
        return evaluate(
            directory,
            {name: caches[names[name]].path for name in pending},
            dtype=dtype,
            device=device,
            limit=limit,
            progress=progress,
            label=f"{label}: ",
            per_row=True,
            on_result=remember_if_same,
        )

    found = memory.complete({name: keys[metric] for name, metric in names.items()}, compute, forget)
    return {metric: _reading(found[name], metric) for name, metric in names.items()}


def require_unchanged(directory: Path, model: Mapping[str, str]) -> None:
    """Refuse a model that is another one by now, whose results would be remembered as those of the first.

    Raises:
        IdentityMismatchError: naming what has changed.
    """
    now = model_identity(directory)
    for key in model:
        if now.get(key) != model[key]:
            raise IdentityMismatchError(
                f"a model must stay as it is while it is compared, got other {key} in {directory} than at the start "
                f"({model[key][:12]}, now {str(now.get(key))[:12]}); start again when nothing writes to it"
            )


def keys_of(
    caches: Mapping[Metric, TeacherCache], *, dtype: str, device: str | None = None, limit: int | None = None
) -> dict[Metric, dict[str, Any]]:
    """Under which keys the readings of these caches are remembered."""
    place = default_device(device)
    return {
        metric: EvaluationFile.key(cache, dtype=dtype, device=place, limit=limit)
        for metric, cache in caches.items()
    }


def _phases(caches: Mapping[Metric, TeacherCache]) -> dict[str, Metric]:
    """What a phase of the progress is called -> the metric: the text's name, with its side where both sides have one.

    A text may be called as another one's phase would be; then all are called by their keys, which differ.
    """
    names = [metric.name for metric in caches]
    found = {f"{m.side} {m.name}" if names.count(m.name) > 1 else m.name: m for m in caches}
    return found if len(found) == len(caches) else {metric.key: metric for metric in caches}


def _reading(result: Result, metric: Metric) -> Reading:
    if result["perplexity"] is None:
        raise ConfigError(f"--{metric.side} needs tokens that carry loss, got none in {metric.where}")
    value = float(result["perplexity"])
    items = None
    if all(name in result for name in ROWS):
        ce, tokens = (np.asarray(result[name], np.float64) for name in ROWS)
        counts = tokens > 0
        items = Items(-ce[counts], tokens[counts], np.zeros(int(counts.sum()), np.int32))
    details: dict[str, Any] = {key: found for key, found in result.items() if key not in ROWS}
    return Reading(value=math.inf if math.isnan(value) else value, items=items, details=details)
