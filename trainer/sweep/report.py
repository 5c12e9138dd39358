"""What a sweep came to: the table of its models, the one that is recommended, and sweep.json.

`comparison_of` and `gain_kept` are the only places that know how models are compared.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formats.disk.durable import atomic_write_bytes
from formats.errors import ConfigError
from formats.progress import Progress
from trainer.sweep.config import SweepConfig
from trainer.sweep.merges import PlannedMerge
from trainer.sweep.plan import PlannedRun

if TYPE_CHECKING:
    from trainer.evaluation.compare import Comparison

REPORT_NAME = "sweep.json"


@dataclass(kw_only=True)
class SweepReport:
    """The end of a sweep."""

    out: Path
    runs: Sequence[PlannedRun]
    merges: Sequence[PlannedMerge]
    failed: Mapping[str, str]
    """Name of a run or merge -> why there is none."""
    comparison: "Comparison | None"
    """None where no run was finished."""
    searches: Sequence[Mapping[str, Any]] = field(default_factory=list)
    """What `--search` found, one for each learning rate or other setting that is crossed."""

    def text(self) -> str:
        """For people."""
        parts = [self.comparison.text()] if self.comparison is not None else ["no run was finished"]
        parts += [str(search["line"]) for search in self.searches]
        parts += [f"failed: {name}: {line}" for name, line in sorted(self.failed.items())]
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under stable keys, without times, the same when the sweep is run again."""
        return {
            "runs": [
                {
                    "name": run.name,
                    "settings": dict(run.varied),
                    "entry": run.entry,
                    "direct": run.direct,
                    "error": self.failed.get(run.name),
                }
                for run in self.runs
            ],
            "merges": [
                {
                    "name": merge.name,
                    "run": merge.run.name,
                    "method": merge.method,
                    "strengths": merge.strengths,
                    "error": self.failed.get(merge.name),
                }
                for merge in self.merges
            ],
            "search": list(self.searches),
            "comparison": self.comparison.to_dict() if self.comparison is not None else None,
        }

    def write(self) -> Path:
        """Put sweep.json into the sweep's directory."""
        path = self.out / REPORT_NAME
        text = json.dumps(self.to_dict(), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        atomic_write_bytes(path, text.encode() + b"\n")
        return path


def comparison_of(config: SweepConfig, models: Mapping[str, Path], progress: Progress) -> "Comparison":
    """Compare finished models with each other and with the initial one.

    Raises:
        ConfigError: more than one source or target.
    """
    from trainer.evaluation.compare import compare

    texts = {}
    for name in ("source", "target"):
        given = getattr(config, name)
        if len(given) != 1:
            raise ConfigError(f"a sweep is compared on one {name}, got {', '.join(given)}; keep one")
        (texts[name],) = given.values()
    return compare(models, **texts, initial=initial_of(config, models), progress=progress)


def initial_of(config: SweepConfig, models: Mapping[str, Path]) -> dict[str, str]:
    """Label -> the initial model."""
    model = str(config.base["model"])
    label = model.rstrip("/").rsplit("/", 1)[-1]
    return {label if label and label not in models else "initial": model}


def gain_kept(comparison: "Comparison", label: str, direct: str) -> float | None:
    """The share of direct fine-tuning's gain on the target, ln(ppl0 / ppl) / ln(ppl0 / ppl_direct).

    None where direct fine-tuning gains nothing, or a perplexity is not finite.
    """
    found = {model.label: model.perplexity("target") for model in comparison.models}
    initial = found[comparison.models[0].label]
    if not all(map(math.isfinite, (initial, found[label], found[direct]))) or found[direct] >= initial:
        return None
    return math.log(initial / found[label]) / math.log(initial / found[direct])
