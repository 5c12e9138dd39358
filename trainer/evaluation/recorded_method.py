"""How a model was made, read from its directory: the method and its strengths.

A training run leaves `anneal.yaml`, a merge a section of `anneal.json`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.errors import AnnealError
from formats.named_path import short_name
from trainer.config import TrainConfig
from trainer.config_file import RESOLVED_NAME, load_config
from trainer.merging.settings import DEFAULTS as MERGES
from trainer.merging.settings import FORMULAS, setting_text
from trainer.result.run_directory import RECORD_NAME

DIRECT = "direct fine-tuning"
MERGE_ORDER = list(dict.fromkeys(name for settings in MERGES.values() for name in settings))


@dataclass(frozen=True)
class AppliedMethod:
    """One method, or several at once, with their strengths."""

    parts: tuple[tuple[str, Mapping[str, float]], ...]
    """(name, setting -> strength), settings spelt as in `anneal.yaml`; empty for direct fine-tuning."""

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
        return _of_run(load_config(directory / RESOLVED_NAME))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, AnnealError):
        return None


def _of_merge(merge: dict[str, Any]) -> AppliedMethod:
    method, _ = str(merge.pop("method")), merge.pop("tuned")
    name, _ = FORMULAS.get(method, (method, ""))
    words, strengths = [name], {}
    for key in sorted(merge, key=MERGE_ORDER.index):
        if isinstance(merge[key], str | list):
            values = merge[key] if isinstance(merge[key], list) else [merge[key]]
            shown = [short_name(setting_text(value)) for value in values]
            words.append(f"{key} {','.join(shown)}")
        else:
            strengths[key] = float(merge[key])
    return AppliedMethod(((" ".join(words), strengths),))


def _of_run(config: TrainConfig) -> AppliedMethod:
    parts: list[tuple[str, dict[str, float]]] = []
    if config.kl_coef:
        name = {"ce": "KL on mixed text", "kl": "distillation"}.get(config.loss, "label annealing")
        name += "" if config.kl_direction == "forward" else " (reverse KL)"
        strength = (
            {"kl_coef": config.kl_coef} if config.kl_budget is None else {"kl_budget": config.kl_budget}
        )
        parts.append((name, strength | {"temperature": config.temperature}))
    for name, value in config.changed().items():
        parts.append(
            ("label smoothing", {name: value}) if isinstance(value, float) else (f"{name} {value}", {})
        )
    if config.l2:
        parts.append(("L2", {"l2.coef": config.l2.coef}))
    if len(tasks := config.ewc_tasks) == 1:
        parts.append(("EWC", {"ewc.coef": tasks[0].coef}))
    elif tasks:
        name = f"EWC of {len(tasks)} tasks"
        parts.append((name, {f"ewc.{number}.coef": task.coef for number, task in enumerate(tasks)}))
    if config.sfa:
        parts.append(("SFA", {"sfa.beta": config.sfa.beta, "sfa.period": config.sfa.period}))
    for number, cache in enumerate(config.caches):
        name = "replay" if cache.loss == "ce" else f"mixed text ({cache.loss})"
        amount = {"weight": cache.weight} if cache.share is None else {"share": cache.share}
        parts.append((name, {f"caches.{number}.{key}": float(value or 0) for key, value in amount.items()}))
    if config.freeze:
        parts.append((f"freeze {','.join(config.freeze)}", {}))
    if config.fake_quantize != "none":
        parts.append((f"fake_quantize {config.fake_quantize}", {}))
    if config.lora:
        parts.append(("LoRA", {"lora.r": config.lora.r}))
    return AppliedMethod(tuple(parts))
