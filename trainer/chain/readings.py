"""Evaluations of models on held-out texts, one pass each, remembered beside the chain or probe that asked for them.

Only the tokens of a text are read, so whoever built its cache is of no account as long as the vocabulary is the same.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from formats.cache import TeacherCache
from formats.errors import ConfigError
from formats.progress import Progress
from trainer.bench.model_identity import model_identity
from trainer.comparison.evaluation_file import EvaluationFile
from trainer.evaluation.evaluate import Result, evaluate
from trainer.loading import default_device


def read_model(
    label: str,
    directory: Path,
    texts: Mapping[str, str],
    work: Path,
    *,
    limit: int | None = None,
    progress: Progress | None = None,
    kl: bool = False,
) -> dict[str, Result]:
    """One model on texts: name -> what `evaluate` returns, rows included.

    Args:
        label: for the progress and the name of the file in `work`.
        directory: a whole model, or adapters.
        texts: name -> cache.
        work: folder of remembered evaluations.
        limit: only the first rows of each text.
        kl: also read the caches' teacher, which must then be the model or an ancestor of it.

    Raises:
        ConfigError: a text has no tokens that carry loss.
        AnnealError: as `evaluate`.
    """
    memory = EvaluationFile(directory, model_identity(directory), label, work)
    caches = {name: TeacherCache(path) for name, path in texts.items()}
    keys: dict[str, dict[str, Any]] = {
        name: {**EvaluationFile.key(cache, dtype="float32", device=default_device(), limit=limit), "kl": kl}
        for name, cache in caches.items()
    }

    def compute(pending: Sequence[str], remember: Callable[[str, Result], None]) -> Mapping[str, Result]:
        return evaluate(
            directory,
            {name: texts[name] for name in pending},
            limit=limit,
            kl=kl,
            progress=progress,
            label=f"{label}: ",
            per_row=True,
            on_result=remember,
        )

    found = memory.complete(keys, compute)  # a place that cannot be written costs time, nothing else
    for name, result in found.items():
        if result["ce"] is None:
            raise ConfigError(f"{name} needs tokens that carry loss, got none in {texts[name]}")
    return found
