"""What models' own records say for a comparison: who was fine-tuned directly, and who differs by a seed alone."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.errors import AnnealError
from formats.identity.fingerprint import sha256_json
from trainer.config_file import RESOLVED_NAME
from trainer.evaluation.recorded_method import AppliedMethod
from trainer.plain_yaml import parse_yaml
from trainer.preflight.continuation import WEIGHTS
from trainer.result.run_directory import RECORD_NAME

SEEDS = ("seed", "data_seed")
"""Of `training`: what a group of runs may differ in, beside where they were written."""


def is_direct(method: AppliedMethod | None, of_some: bool = False) -> bool:
    """Whether a record says plain fine-tuning: no KL, no penalty, no other text, no merge.

    Args:
        method: of the record.
        of_some: adapters and frozen parameters are plain fine-tuning, too.
    """
    if method is None:
        return False
    return all(of_some and name.split(" ")[0] in ("LoRA", "freeze") for name, _ in method.parts)


@dataclass(frozen=True)
class Recipe:
    """How a model was made, apart from its seed."""

    digest: str
    """Equal for models that were made alike: of the same settings, from the same weights and texts."""
    seeds: tuple[Any, ...]
    """Of the order of rows and of the model; of a merge those of its models."""


def recipe_of(directory: Path, recipes: Mapping[str, Recipe]) -> Recipe | None:
    """How a model was made, equal for runs that differ in `training.seed`, `training.data_seed` and `out` alone.

    Args:
        directory: of the model.
        recipes: weights -> recipe of the other models of the comparison: merges of runs that are one recipe are one
            recipe, too.

    None where the directory records nothing.
    """
    try:
        record = json.loads((directory / RECORD_NAME).read_text(encoding="utf-8"))
        if "merge" in record:
            merge = dict(record["merge"])
            weights = [str(model["weights"]) for model in merge.pop("tuned")]
            digests = [recipes[w].digest if w in recipes else w for w in weights]
            seeds = tuple(recipes[w].seeds if w in recipes else w for w in weights)
            contents = [_initial_weights(record), record.get("by")]
            return Recipe(sha256_json(["merge", merge, digests, contents]), seeds)
        text = (directory / RESOLVED_NAME).read_text(encoding="utf-8")
        settings = dict(parse_yaml(text, str(directory / RESOLVED_NAME)))
        training = dict(settings.get("training") or {})
        seed = training.get("seed") or 0
        data_seed = training.get("data_seed")
        return Recipe(
            sha256_json(["run", _without_seeds(settings), _was_read(record)]),
            (seed, seed if data_seed is None else data_seed),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, AnnealError):
        return None


def _was_read(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a run read by what was in it, as far as its record says: paths may hold something else by now."""
    run = record.get("run") or {}
    found = {key: value for key, value in run.items() if key.startswith("the ")}  # its caches
    weights = run.get(WEIGHTS) or _initial_weights(record)
    return {**found, **(record.get("ewc") or {}), WEIGHTS: weights}


def _initial_weights(record: Mapping[str, Any]) -> str | None:
    """As the identity has them: of a run, that of its cache."""
    weights = ((record.get("identity") or {}).get("teacher") or {}).get("weights")
    return None if weights is None else str(weights)


def _without_seeds(settings: dict[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in settings.items() if key != "out"}
    training = settings.get("training")
    if isinstance(training, dict):
        settings["training"] = {key: value for key, value in training.items() if key not in SEEDS}
    return settings


def groups_of(
    directories: Mapping[str, Path], weights: Mapping[str, str], *, alone: str | None = None
) -> dict[str, list[str]]:
    """Label of a line -> labels of the models on it, in the given order.

    Args:
        directories: label -> model.
        weights: label -> fingerprint of its weights.
        alone: the initial model, which is a line of its own.

    Two labels of equal weights stay apart, and so do two of equal seeds: neither is a second seed.
    """
    recipes: dict[str, Recipe] = {}
    for _ in range(2):  # runs first, then merges of them
        for label, directory in directories.items():
            if label != alone and (recipe := recipe_of(directory, recipes)) is not None:
                recipes[weights[label]] = recipe
    together: dict[str, list[str]] = {}
    for label in directories:
        recipe = recipes.get(weights[label]) if label != alone else None
        key = f"alone {label}"
        if recipe is not None:
            others = [weights[other] for other in together.get(recipe.digest, ())]
            if not any(weights[label] == w or recipe.seeds == recipes[w].seeds for w in others):
                key = recipe.digest
        together.setdefault(key, []).append(label)
    found: dict[str, list[str]] = {}
    for labels in together.values():
        found[_common_name(labels, {*directories, *found})] = labels
    return found


def without_seed(name: str) -> str:
    """The name that a sweep's run, or a merge of it, shares with those of other seeds."""
    return re.sub(r",(data_)?seed=\d+", "", name)


def _common_name(labels: list[str], taken: set[str]) -> str:
    """The labels without the `,seed=N` and `,data_seed=N` of a sweep; else what they begin with, without a dangling
    `-seed`; the first label where that says nothing.
    """
    if len(labels) == 1:
        return labels[0]
    plain = {without_seed(label) for label in labels}
    if len(plain) == 1 and not plain & (taken - set(labels)):
        return plain.pop()
    first, last = min(labels), max(labels)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    common = first[:length].rstrip("-_., ")
    for word in ("data_seed", "seed", "s", "run"):
        if common.endswith(("-" + word, "_" + word, "." + word)):
            common = common[: -len(word) - 1].rstrip("-_., ")
            break
    name = common or labels[0]
    return name if name not in taken - set(labels) else " ".join(labels)
