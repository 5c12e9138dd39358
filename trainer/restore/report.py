"""What restoring came to: a line per tuned model, and restore.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from formats.finite_json import finite_json
from formats.progress import counted
from formats.table import aligned
from trainer.chain.report import KEPT
from trainer.evaluation.evaluate import Result
from trainer.restore.shares import Shares

REPORT_NAME = "restore.json"
FIELDS = (*KEPT, "kept", "num_known")


@dataclass(frozen=True, kw_only=True)
class Restored:
    """One tuned model before and after."""

    label: str
    directory: str
    tuned: Mapping[str, Result]
    """Source text -> evaluation."""
    restored: Mapping[str, Result]
    control: Mapping[str, Result]
    """The initial model after the same text at the same rate."""
    memorised: float | None = None
    """Share of the tuning text's tokens that the tuned model has right (exact memorisation); None without that text."""
    memorised_after: float | None = None
    """The same of the restored model."""


@dataclass(kw_only=True)
class RestoreReport:
    """The end of a restoring."""

    initial_label: str
    initial: Mapping[str, Result]
    models: Sequence[Restored]
    memorised_by_initial: float | None
    num_rows: int
    num_tokens: int
    learning_rates: Mapping[str, float]
    """Label -> rate, of the model and of its control."""
    failed: Mapping[str, str]

    @cached_property
    def shares(self) -> dict[str, dict[str, Shares]]:
        """Label -> text -> shares in nats."""
        return {
            model.label: {
                text: Shares.of(
                    initial=-self.initial[text]["ce"],
                    tuned=-model.tuned[text]["ce"],
                    control=-model.control[text]["ce"],
                    restored=-model.restored[text]["ce"],
                )
                for text in self.initial
            }
            for model in self.models
        }

    def text(self) -> str:
        """For people: a table per source text, and how to read it."""
        parts = [self.table(text) for text in self.initial]
        parts += [f"failed: {name}: {line}" for name, line in sorted(self.failed.items())]
        if self.models:
            first = next(iter(self.initial))
            before, after = self.initial[first]["perplexity"], self.models[0].control[first]["perplexity"]
            parts.append(
                f"restored by {counted(self.num_rows, 'row')}, {self.num_tokens:,} tokens; the same text takes "
                f"{self.initial_label} from perplexity {before:.2f} to {after:.2f} on {first} (the control)"
            )
        parts.append(
            "lost: nats against the initial model; is gone: what the restored model lacks against the control; one seed"
        )
        return "\n\n".join(parts)

    def table(self, text: str) -> str:
        """Of one source text."""
        head = (text, "perplexity", "restored", "lost", "comes back", "is gone", "still right", "memorised")
        rows: list[tuple[str, ...]] = [(*head, "entropy", "ECE")]
        memory = _share(self.memorised_by_initial)
        control = self.models[0].control[text] if self.models else self.initial[text]
        numbers = _two(self.initial[text], control)
        rows.append((self.initial_label, *numbers, "", "", "", "", memory, *_last(self.initial[text])))
        for model in self.models:
            shares = self.shares[model.label][text]
            back = "-" if shares.back is None else f"{100 * shares.back:.0f} %"
            before, after = model.tuned[text].get("kept"), model.restored[text].get("kept")
            still = "-"
            if before is not None and after is not None:
                still = f"{100 * before:.1f} -> {100 * after:.1f} %"
            rows.append(
                (
                    model.label,
                    *_two(model.tuned[text], model.restored[text]),
                    f"{shares.lost:+.4f}",
                    back,
                    f"{shares.gone:+.4f}",
                    still,
                    _share(model.memorised),
                    *_last(model.tuned[text]),
                )
            )
        verdicts = [f"{model.label}: {self.shares[model.label][text].verdict()}" for model in self.models]
        return aligned(rows) + "\n\n" + "\n".join(verdicts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under stable keys, the same when it is run again."""
        shown = {
            "initial": {
                "label": self.initial_label,
                "source": _results(self.initial),
                "memorised": self.memorised_by_initial,
            },
            "models": [
                {
                    "label": model.label,
                    "directory": model.directory,
                    "tuned": _results(model.tuned),
                    "restored": _results(model.restored),
                    "control": _results(model.control),
                    "memorised": model.memorised,
                    "memorised_after": model.memorised_after,
                    "learning_rate": self.learning_rates[model.label],
                    "shares": {
                        text: {
                            "lost": s.lost,
                            "gone": s.gone,
                            "hidden": s.hidden,
                            "back": s.back,
                            "verdict": s.verdict(),
                        }
                        for text, s in self.shares[model.label].items()
                    },
                }
                for model in self.models
            ],
            "text": {"num_rows": self.num_rows, "num_tokens": self.num_tokens},
            "failed": dict(self.failed),
        }
        return finite_json(shown)


def _results(results: Mapping[str, Result]) -> dict[str, dict[str, Any]]:
    return {text: {key: result.get(key) for key in FIELDS} for text, result in results.items()}


def _two(before: Result, after: Result) -> tuple[str, str]:
    return f"{before['perplexity']:.2f}", f"{after['perplexity']:.2f}"


def _last(result: Result) -> tuple[str, str]:
    return f"{result['entropy']:.2f}", f"{result['calibration_error']:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
