"""What a sweep came to: the table of its models, the one that is recommended, and sweep.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.sweep.merges import PlannedMerge
from trainer.sweep.plan import PlannedRun

if TYPE_CHECKING:
    from trainer.comparison.comparison import Comparison
    from trainer.selection.selection import Selection

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
    """Of the finished models; None where no run was finished."""
    selection: "Selection | None" = None
    """What the rules pick; None where there is nothing to pick from."""
    searches: Sequence[Mapping[str, Any]] = field(default_factory=list)
    """What `--search` found, one for each learning rate, temperature or other setting that is crossed."""

    def text(self) -> str:
        """For people."""
        parts = [self.comparison.text()] if self.comparison is not None else ["no run was finished"]
        parts += [self.selection.text()] if self.selection is not None else []
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
                    "runs": [run.name for run in merge.runs],
                    "method": merge.method,
                    "strengths": merge.strengths,
                    "error": self.failed.get(merge.name),
                }
                for merge in self.merges
            ],
            "search": list(self.searches),
            "comparison": self.comparison.to_dict() if self.comparison is not None else None,
            "selection": self.selection.to_dict() if self.selection is not None else None,
        }
