"""`run_sweep`: from a base and what varies to finished runs, their merges and one table.

Order: everything that can be wrong in the settings, the caches and what the directory holds; the runs; the search; the
merges; the table. The same command continues a sweep that was stopped, and ends with the same table.
"""

import contextlib
import itertools
import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from formats.disk.durable import atomic_write_json, locked
from formats.disk.output_file import is_in_a_file
from formats.errors import ConfigError, naming
from formats.progress import Progress, counted
from trainer.objective import Objective
from trainer.sweep.compared import check_yardsticks, comparison_of, gain_kept, selection_of
from trainer.sweep.config import SweepConfig
from trainer.sweep.merges import PlannedMerge, make_merges, plan_merges
from trainer.sweep.plan import PlannedRun, estimated_tokens, kl_settings, make_run, plan_runs
from trainer.sweep.pools import LocalPool, Pool
from trainer.sweep.report import REPORT_NAME, SweepReport
from trainer.sweep.runs import Runs, is_finished, require_same
from trainer.sweep.search import START, search
from trainer.sweep.shares import measure_in_shares


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """The runs and merges that a sweep comes to, checked."""

    config: SweepConfig
    runs: Sequence[PlannedRun]
    merges: Sequence[PlannedMerge]

    def text(self) -> str:
        """For people: a line per run, then counts and tokens."""
        out = Path(self.config.out)
        tokens = {run.name: estimated_tokens(run) for run in self.runs}
        width = max(len(run.name) for run in self.runs)
        lines = [
            f"{run.name.ljust(width)}  {tokens[run.name]:>13,} tokens"
            f"{'  finished' if is_finished(run.directory(out)) else ''}"
            for run in self.runs
        ]
        finished = sum(is_finished(run.directory(out)) for run in self.runs)
        counts = f"{counted(len(self.runs), 'run')}, {finished} of them finished; {counted(len(self.merges), 'merge')}"
        if self.config.search:
            counts += f"; a search of at most {self.config.search_runs} values of kl_coef beside them"
        return "\n".join([*lines, "", counts, f"about {sum(tokens.values()):,} tokens to train on"])

    def to_dict(self) -> dict[str, object]:
        """Plain values under stable keys; `tokens` are about those that a run trains on."""
        out = Path(self.config.out)
        return {
            "runs": [
                {
                    "name": run.name,
                    "settings": dict(run.varied),
                    "tokens": estimated_tokens(run),
                    "finished": is_finished(run.directory(out)),
                }
                for run in self.runs
            ],
            "merges": [merge.name for merge in self.merges],
            "search_runs": self.config.search_runs if self.config.search else 0,
        }


def plan_sweep(config: SweepConfig) -> SweepPlan:
    """Check everything that can be checked before a run.

    Raises:
        AnnealError: as `train`, `merge` and `compare` would; the message names the run.
    """
    require_directory(Path(config.out))
    runs = plan_runs(config)
    check_inputs(config, [*runs, *first_probes(config, runs)])
    for run in runs:
        require_same(run, Path(config.out))
    check_yardsticks(config)  # a model that was replaced since is said above
    return SweepPlan(config=config, runs=runs, merges=plan_merges(config, runs))


def check_inputs(config: SweepConfig, runs: Sequence[PlannedRun]) -> None:
    """Find the model, open every cache of every run and find the rows and positions that it acts on, each combination
    once.

    Raises:
        AnnealError: as `train`; the message names the first run.
    """
    from trainer.inputs import open_inputs, rows_of

    seen = set()
    for run in runs:
        typed = run.config(Path(config.out))
        settings = typed.to_dict()
        names = [
            "cache",
            "model",
            "revision",
            "caches",
            "eval_caches",
            "ewc",
            "allow_different_student",
            "loss",
        ]
        names += list(Objective.__dataclass_fields__)
        with_kl = settings["kl_coef"] > 0
        key = json.dumps([with_kl, {name: settings[name] for name in names}], sort_keys=True)
        if key not in seen:
            seen.add(key)
            with naming(f"run {run.name}"):
                rows_of(typed, open_inputs(typed))


def first_probes(config: SweepConfig, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The runs with which the searches begin; none without `search`."""
    if not config.search:
        return []
    starts = itertools.product(groups(runs), kl_settings(config))
    return [make_run(config, {**probes[0].varied, **of_kl, "kl_coef": START}) for probes, of_kl in starts]


def run_sweep(
    config: SweepConfig, *, pool: Pool | None = None, progress: Progress | None = None
) -> SweepReport:
    """Run, merge and compare; finished runs are skipped, stopped ones continue.

    Args:
        config: what to run.
        pool: what trains; one run after another on this machine by default.
        progress: a phase over the runs, one over the merges, those of the comparison; silent by default.

    Raises:
        AnnealError: before anything runs, as `plan_sweep`. A run that fails is no error: it is in the report.
        SweepStopped: SIGINT or SIGTERM ended it.
    """
    progress = progress or Progress()
    plan = plan_sweep(config)
    out = Path(config.out)
    with held(out):
        pool = pool or LocalPool()
        runs = Runs(out, pool, progress)
        runs.complete(plan.runs)
        planned, searches = list(plan.runs), list[dict[str, object]]()
        if config.search:
            for probes, of_kl in itertools.product(groups(plan.runs), kl_settings(config)):
                found, more = search_one(config, probes, runs, progress, of_kl)
                searches.append(found)
                names = {run.name for run in planned}
                planned += [run for run in more if run.name not in names]
        merges = plan_merges(config, planned)
        finished = {run.name: run.directory(out) for run in planned if is_finished(run.directory(out))}
        if finished:
            measure_in_shares(config, finished, merges, pool, progress)
        failed = {**runs.failed, **make_merges(config, merges, progress)}
        made: list[PlannedRun | PlannedMerge] = [*planned, *merges]
        models = {
            item.name: item.directory(out)
            for item in made
            # A merge that could not be made again is still there, of a run that is not.
            if item.name not in failed and is_finished(item.directory(out))
        }
        yardsticks = [run.name for run in planned if run.direct and run.entry is None]
        comparison = comparison_of(config, models, progress, yardsticks=yardsticks) if models else None
        report = SweepReport(
            out=out,
            runs=planned,
            merges=merges,
            failed=failed,
            comparison=comparison,
            selection=selection_of(config, comparison) if comparison is not None else None,
            searches=searches,
        )
        atomic_write_json(out / REPORT_NAME, report.to_dict())
    return report


def require_directory(out: Path) -> None:
    """Refuse a place for runs that is something else; nothing is written.

    Raises:
        ConfigError: it is a file, or below one.
    """
    if is_in_a_file(out):
        raise ConfigError(f"--out must be a directory that can be written, got {out}: Not a directory")


@contextlib.contextmanager
def held(out: Path, what: str = "sweep") -> Iterator[None]:
    """A directory for this process alone, where its file system can; `what` is done there, for the message.

    Raises:
        ConfigError: it cannot be written, or another process works in it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(
            f"--out must be a directory that can be written, got {out}: {error.strerror}"
        ) from None
    try:
        if not locked(descriptor):
            raise ConfigError(
                f"--out must belong to one {what}, got {out} in which another one is under way; wait for it"
            )
        yield
    finally:
        os.close(descriptor)


class NoShare(Exception):
    """Why a search has no share of direct fine-tuning's gain, and ends."""


def groups(runs: Sequence[PlannedRun]) -> list[list[PlannedRun]]:
    """The direct runs that differ in their seed only, together: a search each."""
    found: dict[tuple[tuple[str, str], ...], list[PlannedRun]] = {}
    for run in runs:
        if run.direct and run.entry is None:
            found.setdefault(run.crossed, []).append(run)
    return list(found.values())


def search_one(
    config: SweepConfig,
    direct: Sequence[PlannedRun],
    runs: Runs,
    progress: Progress,
    of_kl: Mapping[str, object],
) -> tuple[dict[str, object], list[PlannedRun]]:
    """Search beside these direct runs with these settings of the KL term; what was found, and the runs it took."""
    out = Path(config.out)
    made: list[PlannedRun] = []

    def share_of(kl_coef: float) -> float | None:
        probes = [make_run(config, {**run.varied, **of_kl, "kl_coef": kl_coef}) for run in direct]
        for probe in probes:
            require_same(probe, out)
        made.extend(probes)
        runs.complete(probes, f"search: kl_coef {kl_coef:g}")
        both = [*direct, *probes]
        missing = [run for run in both if not is_finished(run.directory(out))]
        for run in missing:
            if not runs.diverged(run):  # no word on its kl_coef: its process died, the disk was full
                raise NoShare(f"{run.name} has no result, the same command goes on")
        if missing:
            return None
        models = {run.name: run.directory(out) for run in both}
        comparison = comparison_of(config, models, progress, yardsticks=[direct[0].name])
        if gain_kept(comparison, direct[0].name) is None:
            raise NoShare("direct fine-tuning gains nothing on the target")
        shares = [gain_kept(comparison, probe.name) for probe in probes]
        found = [share for share in shares if share is not None]
        return statistics.fmean(found) if len(found) == len(shares) else None

    varied = {k: value for k, value in direct[0].varied.items() if k not in ("kl_coef", "training.seed")}
    varied |= of_kl
    where = f" ({', '.join(f'{key} {value}' for key, value in sorted(varied.items()))})" if varied else ""
    nothing: dict[str, object] = {"settings": varied, "keeps": None, "loses": None, "tried": []}
    if not all(is_finished(run.directory(out)) for run in direct):
        return {**nothing, "line": f"search: direct fine-tuning has no result{where}"}, made
    try:
        bracket = search(share_of, config.keep_gain, config.search_runs)
    except NoShare as reason:
        return {**nothing, "line": f"search: {reason}{where}"}, made
    return {
        "settings": varied,
        "keeps": bracket.keeps,
        "loses": bracket.loses,
        "tried": [{"kl_coef": value, "gain_kept": share} for value, share in bracket.tried],
        "line": bracket.line(config.keep_gain) + where,
    }, made
