"""How a model was made, read from its directory: the method, its strengths, and all else that decided it.

A training run leaves `anneal.yaml`, a merge a section of `anneal.json`. Models belong to one family when they
differ in a single strength and in nothing else, corpus, learning rate and seed included.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.errors import AnnealError
from trainer.config import TrainConfig
from trainer.config_file import RESOLVED_NAME, load_config
from trainer.merging.card import FORMULAS
from trainer.preflight.continuation import comparable
from trainer.result.run_directory import RECORD_NAME

DIRECT = "direct fine-tuning"


@dataclass(frozen=True)
class AppliedMethod:
    """One method, or several at once, with their strengths."""

    parts: tuple[tuple[str, Mapping[str, float]], ...]
    """(name, setting -> strength), settings spelt as in `anneal.yaml`; empty for direct fine-tuning."""
    rest: str = ""
    """Everything else that decided the weights, comparable as text."""

    @property
    def name(self) -> str:
        """Without strengths, such as `label annealing + L2`."""
        return " + ".join(name for name, _ in self.parts) or DIRECT

    @property
    def strengths(self) -> dict[str, float]:
        """Setting -> strength of all parts."""
        return {key: value for _, strengths in self.parts for key, value in strengths.items()}

    def text(self) -> str:
        """With strengths, such as `label annealing kl_coef 4 + L2 coef 0.1`; a temperature of 1 is left
        out.
        """
        words = []
        for name, strengths in self.parts:
            shown = {key: value for key, value in strengths.items() if (key, value) != ("temperature", 1)}
            words.append(
                " ".join([name, *(f"{key.rsplit('.', 1)[-1]} {value:g}" for key, value in shown.items())])
            )
        return " + ".join(words) or DIRECT


def method_of(directory: Path) -> AppliedMethod | None:
    """What the directory records, None where it records nothing that can be read."""
    try:
        record = json.loads((directory / RECORD_NAME).read_text(encoding="utf-8"))
        if "merge" in record:
            return _of_merge(dict(record["merge"]))
        return _of_run(load_config(directory / RESOLVED_NAME), record.get("cache"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, AnnealError):
        return None


def families_of(methods: Mapping[str, AppliedMethod | None]) -> dict[str, list[str]]:
    """Name -> labels of two or more models that differ in one strength alone, the weakest value first.

    A model is in one family at most; in a grid, the one along the strength that its method names first.
    """
    free = {label: method for label, method in methods.items() if method is not None}
    families: dict[str, list[str]] = {}
    for setting in dict.fromkeys(key for method in free.values() for key in method.strengths):
        groups: dict[Any, list[str]] = {}
        for label, method in free.items():
            if setting in method.strengths:
                others = tuple((key, value) for key, value in method.strengths.items() if key != setting)
                groups.setdefault((method.name, others, method.rest), []).append(label)
        for labels in groups.values():
            if len(labels) > 1:
                labels.sort(key=lambda label: free[label].strengths[setting])
                name = free[labels[0]].name
                taken = name in families or name in methods
                families[f"{name} ({labels[0]} to {labels[-1]})" if taken else name] = labels
        free = {
            label: method
            for label, method in free.items()
            if not any(label in labels for labels in families.values())
        }
    return families


def _of_merge(merge: dict[str, Any]) -> AppliedMethod:
    method, tuned = str(merge.pop("method")), merge.pop("tuned")
    strengths = {str(key): float(value) for key, value in merge.items()}
    weights = sorted(str(entry["weights"]) for entry in tuned)
    name, _ = FORMULAS.get(method, (method, ""))
    return AppliedMethod(((name, strengths),), json.dumps(weights))


def _of_run(config: TrainConfig, cache_id: Any) -> AppliedMethod:
    parts: list[tuple[str, dict[str, float]]] = []
    if config.kl_coef:
        name = "label annealing" if config.kl_direction == "forward" else "label annealing (reverse KL)"
        parts.append((name, {"kl_coef": config.kl_coef, "temperature": config.temperature}))
    if config.l2:
        parts.append(("L2", {"l2.coef": config.l2.coef}))
    if config.ewc:
        parts.append(("EWC", {"ewc.coef": config.ewc.coef}))
    if config.sfa:
        parts.append(("SFA", {"sfa.beta": config.sfa.beta, "sfa.period": config.sfa.period}))
    for number, cache in enumerate(config.caches):
        name = "replay" if cache.loss == "ce" else f"mixed text ({cache.loss})"
        parts.append((name, {f"caches.{number}.weight": cache.weight}))
    if config.lora:
        parts.append(("LoRA", {"lora.r": config.lora.r}))
    settings = comparable(config.to_dict())
    for setting in (key for _, strengths in parts for key in strengths):
        *outer, last = setting.split(".")
        node: Any = settings
        for part in outer:
            node = node[int(part)] if isinstance(node, list) else node[part]
        del node[last]
    settings["cache"] = cache_id or config.cache
    settings["texts"] = [cache.path for cache in config.caches] + ([config.ewc.cache] if config.ewc else [])
    return AppliedMethod(tuple(parts), json.dumps(settings, sort_keys=True, default=str))
