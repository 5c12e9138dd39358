"""evaluations.json: what a model's evaluations on caches found, so that none is paid for twice.

MODEL/evaluations.json           one entry per cache and settings
WORK/LABEL-HASH.json             the same beside each other, where the models' directories are not to be written to; the
                                 label, for people, is the one that the model had first

An entry is found by everything that decides its numbers: the weights, configuration and vocabulary of the model, the
digest of the cache, dtype, row limit, kind of device and the versions of this program's evaluation, torch and
transformers. Nothing is ever compared by time or by name, so a stale entry is not found, and one of other weights is
dropped at the next write.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from formats.cache import TeacherCache
from formats.disk.durable import atomic_write_bytes, one_at_a_time
from formats.identity.fingerprint import sha256_json
from trainer.evaluation.evaluate import Result

EVALUATIONS_NAME = "evaluations.json"
FORMAT = 1
EVALUATION_VERSION = 1
"""Goes up when `evaluate` computes something else, or more."""


class EvaluationFile:
    """The remembered evaluations of one model. Losing the file costs time, nothing else.

    Args:
        directory: the model.
        model: its identity (`model_identity`).
        label: its name in a comparison, for the file's name in `work`.
        work: a folder for the files of all models; None puts them beside the models.
    """

    def __init__(
        self, directory: Path, model: Mapping[str, str], label: str, work: str | Path | None = None
    ) -> None:
        self.model = dict(model)
        self.path = directory / EVALUATIONS_NAME
        if work is not None:
            name, digest = re.sub(r"[^\w.-]+", "_", label)[:60], sha256_json(self.model)[:16]
            known = sorted(Path(work).glob(f"*-{digest}.json"))
            self.path = known[0] if known else Path(work) / f"{name}-{digest}.json"

    @staticmethod
    def key(cache: TeacherCache, *, dtype: str, device: str, limit: int | None) -> dict[str, Any]:
        """What decides the numbers beside the model, as plain values."""
        num_rows = len(cache)
        return {
            "cache": cache.digest,
            "dtype": dtype,
            "device": device.partition(":")[0],
            "limit": None if limit is None or limit >= num_rows else limit,
            "evaluation": EVALUATION_VERSION,
            "torch": version("torch"),
            "transformers": version("transformers"),
        }

    def find(self, key: Mapping[str, Any]) -> Result | None:
        """The result under these settings, of this model; None if it has to be computed."""
        for entry in self._entries():
            if entry["settings"] == dict(key):
                return dict(entry["result"])
        return None

    def complete(
        self,
        keys: Mapping[str, Mapping[str, Any]],
        compute: Callable[[Sequence[str], Callable[[str, Result], None]], Mapping[str, Result]],
        forget: Callable[[str], None] = lambda reason: None,
    ) -> dict[str, Result]:
        """A result for every key: what is known, and the rest computed, each once and written down at once.

        Args:
            keys: name -> what decides its numbers; names of equal keys are computed under the first of them.
            compute: given names and what to call with each name and result, returns the results of all of them.
            forget: called with a sentence for every result that could not be written down.
        """
        found = {name: known for name, key in keys.items() if (known := self.find(key)) is not None}
        pending: list[str] = []
        for name, key in keys.items():
            if name not in found and not any(keys[other] == key for other in pending):
                pending.append(name)

        def remember(name: str, result: Result) -> None:
            if not self.add(keys[name], result):
                forget(
                    f"{self.path} cannot be written: evaluations are not remembered; name a folder with --work"
                )

        if pending:
            found |= compute(pending, remember)
        for name, key in keys.items():
            if name not in found:
                found[name] = next(found[other] for other in pending if keys[other] == key)
        return {name: found[name] for name in keys}

    def add(self, key: Mapping[str, Any], result: Result) -> bool:
        """Remember a result; False where the place cannot be written, which is no error.

        That of a model that has diverged is not remembered: JSON has no word for what is not a number.
        """
        if any(isinstance(value, float) and not math.isfinite(value) for value in result.values()):
            return True
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_RDONLY | os.O_CREAT, 0o666))  # an empty one knows nothing
            with one_at_a_time(self.path):  # comparisons of one model may end together
                entries = [entry for entry in self._entries() if entry["settings"] != dict(key)]
                entries.append({"settings": dict(key), "result": dict(result)})
                content = {"format": FORMAT, "model": self.model, "evaluations": entries}
                atomic_write_bytes(self.path, json.dumps(content, indent=1).encode())
        except OSError:
            return False
        return True

    def _entries(self) -> list[dict[str, Any]]:
        """All entries of this very model; none of a file that is torn, of another format, or of other weights."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT or content["model"] != self.model:
                return []
            return [entry for entry in content["evaluations"] if {"settings", "result"} <= set(entry)]
        except (OSError, ValueError, KeyError, TypeError):
            return []
