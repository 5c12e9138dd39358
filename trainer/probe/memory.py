"""Exact memorisation: of how many tokens of a text the model's most probable token is the right one.

Tirumala et al. 2022 (arXiv 2205.10770): the share of contexts of the training text whose argmax is what follows,
teacher-forced. What a model would get right anyway is no memory, so text of the same kind that was not trained on
stands beside it.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from formats.errors import ConfigError
from formats.progress import Progress
from formats.table import aligned
from trainer.evaluation.evaluate import evaluate


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of one model."""

    trained: float
    """Exact memorisation of the text that it was trained on."""
    num_tokens: int
    control: float | None = None
    """The same of text that it was not trained on."""
    num_control_tokens: int = 0

    @property
    def memorised(self) -> float | None:
        """The difference; None without a control."""
        return None if self.control is None else self.trained - self.control

    @property
    def stderr(self) -> float | None:
        """Of the difference, as if tokens were independent: a lower bound."""
        if self.control is None:
            return None
        parts = ((self.trained, self.num_tokens), (self.control, self.num_control_tokens))
        return math.sqrt(sum(share * (1 - share) / count for share, count in parts))


def probe_memory(
    models: Mapping[str, Path],
    text: str,
    control: str | None = None,
    *,
    limit: int | None = None,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> dict[str, Memory]:
    """Label -> memorisation of a text, of whose cache only the tokens are read.

    Raises:
        ConfigError: a text without tokens that carry loss, or the text as its own control.
        AnnealError: as `evaluate`.
    """
    if control is not None and os.path.realpath(control) == os.path.realpath(text):
        raise ConfigError(
            f"--control must be text that the model was not trained on, got {control}, which is --text"
        )
    texts = {"trained": text} | ({"control": control} if control is not None else {})
    found = {}
    for label, directory in models.items():
        results = evaluate(
            directory, texts, limit=limit, dtype=dtype, kl=False, progress=progress, label=f"{label}: "
        )
        for name, result in results.items():
            if not result["num_tokens"]:
                raise ConfigError(f"memory needs tokens that carry loss, got none in {texts[name]}")
        other = results.get("control")
        found[label] = Memory(
            trained=float(results["trained"]["accuracy"]),
            num_tokens=int(results["trained"]["num_tokens"]),
            control=None if other is None else float(other["accuracy"]),
            num_control_tokens=0 if other is None else int(other["num_tokens"]),
        )
    return found


def memory_text(found: Mapping[str, Memory]) -> str:
    """For people: a line per model."""
    rows: list[tuple[str, ...]] = [("model", "exact memorisation", "not trained on", "memorised")]
    for label, memory in found.items():
        difference = "-"
        if memory.memorised is not None and memory.stderr is not None:
            difference = f"{100 * memory.memorised:+.1f} +- {100 * memory.stderr:.1f}"
        control = "-" if memory.control is None else f"{100 * memory.control:.1f} %"
        rows.append((label, f"{100 * memory.trained:.1f} %", control, difference))
    first = next(iter(found.values()))
    note = f"of {first.num_tokens:,} tokens"
    if first.control is None:
        note += "; what a model gets right without having seen it counts too: name such text with --control"
    else:
        note += f" and {first.num_control_tokens:,}; +-: one standard error, as if tokens were independent"
    return aligned(rows) + "\n\n" + note


def memory_to_dict(found: Mapping[str, Memory]) -> list[dict[str, Any]]:
    """Plain values under stable keys."""
    return [
        {"label": label, **asdict(memory), "memorised": memory.memorised, "stderr": memory.stderr}
        for label, memory in found.items()
    ]
