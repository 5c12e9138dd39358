"""Merges of finished runs with the initial model: seconds each, no training.

merges/NAME   a model directory, as `anneal merge` leaves it; NAME is the run's, or `of`, a plus, method and strengths
"""

import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.cache import TeacherCache
from formats.errors import AnnealError, ConfigError, one_line
from formats.identity.fingerprint import ModelFingerprint
from formats.progress import Progress
from trainer.merging.methods import require_peft
from trainer.merging.settings import DEFAULTS, MergeConfig
from trainer.preflight.continuation import contents_of
from trainer.result.run_directory import read_record
from trainer.sweep.config import SweepConfig
from trainer.sweep.entries import MergeEntry
from trainer.sweep.names import safe, shortened, value_text
from trainer.sweep.plan import PlannedRun
from trainer.sweep.runs import is_finished

TOGETHER = ("soup",)
"""Methods that make one model of all runs of an entry; the others merge run by run."""


@dataclass(frozen=True, kw_only=True)
class PlannedMerge:
    """One merge: of which runs, how."""

    name: str
    runs: Sequence[PlannedRun]
    method: str
    strengths: dict[str, Any]
    """Setting of the method -> value."""

    def config(self, config: SweepConfig) -> MergeConfig:
        """As `anneal merge` would be given it."""
        out = Path(config.out)
        return MergeConfig(
            tuned=[str(run.directory(out)) for run in self.runs],
            initial=str(config.base["model"]),
            revision=config.base.get("revision"),
            out=str(self.directory(out)),
            method=self.method,
            **self.strengths,
        )

    def directory(self, out: Path) -> Path:
        """Where the merged model is."""
        return out / "merges" / self.name


def plan_merges(config: SweepConfig, runs: Sequence[PlannedRun]) -> list[PlannedMerge]:
    """Every merge once: those of single runs in the order of the runs, then those of several.

    Raises:
        ConfigError: an unknown name in `of`, a run that saves adapters alone, a soup of one run, no peft for ties, two
            merges of one name.
    """
    found: dict[str, PlannedMerge] = {}
    for run in runs:
        for entry in config.merges:
            if entry.method not in TOGETHER and applies(entry, run, runs):
                add_merges(found, entry, run.name, [run])
    for entry in config.merges:
        if entry.method in TOGETHER:
            chosen = [run for run in runs if applies(entry, run, runs)]
            if len(chosen) < 2:
                raise ConfigError(
                    f"a {entry.method} needs at least two runs, got {len(chosen)} "
                    f"({', '.join(run.name for run in chosen)}); name more of them in merges.of (--merge-of)"
                )
            words = [entry.of] if isinstance(entry.of, str) else sorted(entry.of)
            add_merges(found, entry, shortened(",".join(map(safe, words)), words), chosen)
    return list(found.values())


def add_merges(
    found: dict[str, PlannedMerge], entry: MergeEntry, begin: str, runs: Sequence[PlannedRun]
) -> None:
    """Add the merges of these runs, one for every combination of the entry's values."""
    if entry.method == "ties":
        require_peft()
    for run in runs:
        lora = run.settings.get("lora") or {}
        if lora and lora.get("merge") is False:
            raise ConfigError(
                f"a merge needs whole models, got {run.name} with lora.merge: false; leave it out of merges.of"
            )
    defaults = DEFAULTS[entry.method].items()
    axes = {name: (value,) for name, value in defaults if value is not None} | dict(entry.strengths)
    for values in itertools.product(*axes.values()):
        strengths = {
            name: value if isinstance(value, str) else float(value)
            for name, value in zip(axes, values, strict=True)
        }
        words = [entry.method, *(f"{name}={value_text(value)}" for name, value in strengths.items())]
        name = f"{begin}+{','.join(words)}"
        merge = PlannedMerge(name=name, runs=tuple(runs), method=entry.method, strengths=strengths)
        if found.setdefault(name, merge) != merge:
            raise ConfigError(
                f"merges must have different names, got {name} twice with different settings; give their texts or "
                "runs different names"
            )


def applies(entry: MergeEntry, run: PlannedRun, runs: Sequence[PlannedRun]) -> bool:
    """Whether an entry merges a run.

    Raises:
        ConfigError: `of` names neither an entry nor a run.
    """
    if entry.of == "all":
        return True
    words = (entry.of,) if isinstance(entry.of, str) else entry.of
    known = {"direct", *(n for r in runs for n in (r.name, r.seedless, r.entry) if n)}
    for word in words:
        if word not in known:
            raise ConfigError(
                f"merges.of must be direct, all, or names of entries or runs, got {word!r}; there are "
                f"{', '.join(sorted(known))}"
            )
    return ("direct" in words and run.direct) or not {run.name, run.seedless, run.entry}.isdisjoint(words)


def is_made(planned: PlannedMerge, out: Path) -> bool:
    """Whether a merge is there, whole, and of the runs' weights and the text as they are now."""
    runs = [run.directory(out) for run in planned.runs]
    if not all(is_finished(path) for path in (planned.directory(out), *runs)):
        return False
    record = read_record(planned.directory(out))
    try:
        if "by" in planned.strengths and record["by"] != contents_of(TeacherCache(planned.strengths["by"])):
            return False
        found = [entry["weights"] for entry in record["merge"]["tuned"]]
        ModelFingerprint.of(planned.directory(out))  # one that was damaged or deleted is made again
        return found == [ModelFingerprint.of(path).weights for path in runs]
    except (KeyError, TypeError, ValueError, OSError):
        return False


def make_merges(config: SweepConfig, merges: Sequence[PlannedMerge], progress: Progress) -> dict[str, str]:
    """Merge what is not there yet, of the runs that are finished; name -> why there is none."""
    from trainer.merging.merge_models import merge

    out, failed = Path(config.out), {}
    waiting = [planned for planned in merges if not is_made(planned, out)]
    progress.start("merges", len(merges), len(merges) - len(waiting), unit="merge")
    progress.running()
    for planned in waiting:
        missing = [run.name for run in planned.runs if not is_finished(run.directory(out))]
        if missing:
            failed[planned.name] = f"its run {missing[0]} has no result"
        else:
            try:
                shutil.rmtree(planned.directory(out), ignore_errors=True)  # of a run that was done again
                merge(planned.config(config))
            except (AnnealError, OSError) as error:
                failed[planned.name] = one_line(error, None, whole=True)
                progress.note(f"merge {planned.name} failed: {failed[planned.name]}")
        progress.advance(1)
    progress.finish()
    return failed
