"""`run_chain`: from tasks to finished stages, controls and one retention matrix.

Order: everything that can be wrong in the settings, the texts and what the directory holds; held-out caches; stage by
stage, each with the cache that it needs; the controls; the matrix. The same command continues a chain that was stopped,
and ends with the same matrix.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from formats.cache import TeacherCache
from formats.disk.durable import atomic_write_json
from formats.errors import ConfigError, naming
from formats.identity.fingerprint import resolve_model
from formats.named_path import short_name
from formats.progress import Progress
from trainer.chain.caches import Build, CacheMaker, Look, is_cache
from trainer.chain.config import ChainConfig
from trainer.chain.plan import Need, Stage, heldout_needs, mixtures, plan_direct, plan_mixture, plan_stages
from trainer.chain.readings import read_model
from trainer.chain.report import REPORT_NAME, ChainReport, Row
from trainer.config_file import config_from_dict
from trainer.inputs import open_inputs
from trainer.loading import require_plain_weights
from trainer.result.lineage import own_weights
from trainer.result.run_directory import read_record
from trainer.sweep.pools import LocalPool, Pool
from trainer.sweep.runs import Runs, is_finished, require_same
from trainer.sweep.sweep import held, require_directory


@dataclass(frozen=True, kw_only=True)
class ChainPlan:
    """What a chain comes to, checked."""

    config: ChainConfig
    maker: CacheMaker
    heldout: Mapping[str, Need]
    stages: Sequence[Stage]
    direct: Sequence[Stage]
    """The control; empty where it is not asked for."""

    def text(self) -> str:
        """For people: a line per run."""
        out = Path(self.config.out)
        runs = {stage.name: stage for stage in [*self.stages, *self.direct]}
        names = [*runs, *mixtures(self.config)]
        width = max(map(len, names))
        lines = []
        for name in names:
            done = "finished" if is_finished(out / name) else "to do"
            start = (
                f"from {runs[name].after}" if name in runs and runs[name].after else "from the initial model"
            )
            lines.append(f"{name.ljust(width)}  {done.ljust(8)}  {start}")
        lines += [f"cache to build: {place}" for place in self._to_build()]
        return "\n".join(lines)

    def _to_build(self) -> list[str]:
        """Caches that are not there yet."""
        needs = [*self.heldout.values(), *(need for stage in self.stages for need in stage.needs)]
        return list(dict.fromkeys(need.place for need in needs if not is_cache(need.place)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values under stable keys; `after` is null for a run from the initial model."""
        out = Path(self.config.out)
        after = {stage.name: stage.after for stage in [*self.stages, *self.direct]}
        after |= dict.fromkeys(mixtures(self.config))
        return {
            "runs": [
                {"name": name, "after": start, "finished": is_finished(out / name)}
                for name, start in after.items()
            ],
            "caches": self._to_build(),
        }


def plan_chain(config: ChainConfig, build: Build | None = None, look: Look | None = None) -> ChainPlan:
    """Check everything that can be checked before a run.

    Args:
        build: builds the caches of corpora; without it every text must be a cache.
        look: opens every corpus whose cache is not there yet.

    Raises:
        AnnealError: as `train` would; the message names the stage.
    """
    if config.finished:
        raise ConfigError(
            "tasks with finished models have nothing to run; use anneal chain without --dry-run"
        )
    require_directory(Path(config.out))
    require_plain_weights(resolve_model(str(config.model)), "--model")
    maker = CacheMaker(out=Path(config.out), options=config.build, build=build, look=look)
    needs = heldout_needs(config, maker)
    maker.refuse_idle(*(need.text for need in needs.values()), *(str(t.train) for t in config.tasks.values()))
    stages = plan_stages(config, maker)
    direct = plan_direct(config, maker, stages) if "direct" in config.compare else []
    plan = ChainPlan(config=config, maker=maker, heldout=needs, stages=stages, direct=direct)
    for name, tasks in mixtures(config).items():
        plan_mixture(config, stages, tasks, name, None)
    for stage in [*stages, *direct]:
        _check_inputs(config, stage)
        if is_cache(str(stage.settings["cache"])):
            _require_same(stage, Path(config.out))
    return plan


def _check_inputs(config: ChainConfig, stage: Stage) -> None:
    """Open what a stage reads, as far as it is there, with the initial model in the place of a stage to come."""
    out = Path(config.out)
    settings = copy.deepcopy(dict(stage.settings)) | {"out": str(stage.directory(out))}
    if stage.after is not None and not is_finished(out / stage.after):
        settings["model"] = config.model
        if isinstance(settings.get("ewc"), list):
            settings["ewc"] = [{**task, "model": None} for task in settings["ewc"]]
    typed = config_from_dict(settings)
    paths = [typed.cache, *(cache.path for cache in typed.caches), *(task.cache for task in typed.ewc_tasks)]
    if all(map(is_cache, paths)):
        with naming(stage.name):
            open_inputs(typed)


def _require_same(stage: Stage, out: Path) -> None:
    """Refuse to go on with another run than the one that the directory holds."""
    if stage.after is not None and is_finished(stage.directory(out)):
        lineage = read_record(stage.directory(out)).get("lineage") or [{}]
        if lineage[-1].get("weights") != own_weights(out / stage.after):
            raise ConfigError(
                f"{stage.name} must start from {stage.after}, but was trained from other weights than are there now; "
                f"remove {stage.directory(out)} and the stages after it, or use another --out"
            )
    with naming(stage.name):
        require_same(stage, out)


def run_chain(
    config: ChainConfig,
    *,
    build: Build | None = None,
    look: Look | None = None,
    pool: Pool | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> ChainReport:
    """Train all stages and controls and evaluate them; finished ones are skipped, stopped ones continue.

    Args:
        config: what to run.
        build, look: as `plan_chain`.
        pool: what trains; one run after another on this machine by default.
        limit: only the first rows of each held-out text.
        progress: a phase over the runs and one per evaluation; silent by default.

    Raises:
        AnnealError: before anything runs, as `plan_chain`; or a cache could not be built. A run that fails is no error:
            it is in the report, and the chain ends there.
        SweepStopped: SIGINT or SIGTERM ended it.
    """
    progress = progress or Progress()
    plan = plan_chain(config, build, look)
    out = Path(config.out)
    with held(out, "chain"):
        for need in plan.heldout.values():
            plan.maker.make(need.text, need.model, need.place)
        runs = Runs(out, pool or LocalPool(), progress)
        order = list({stage.name: stage for stage in [*plan.stages, *plan.direct]}.values())
        singles: list[Stage] = []
        with runs.counted("chain", [out / name for name in [*(s.name for s in order), *mixtures(config)]]):
            if _run_all(plan, runs, order):
                singles = [
                    plan_mixture(config, plan.stages, tasks, name, _lengths)
                    for name, tasks in mixtures(config).items()
                ]
                _run_all(plan, runs, singles)
        report = ChainReport(
            config=config,
            columns=list(plan.heldout),
            rows=_rows(config, plan, singles, limit, progress),
            failed=dict(runs.failed),
        )
        atomic_write_json(out / REPORT_NAME, report.to_dict())
    return report


def _lengths(place: str) -> np.ndarray:
    """int [rows]: tokens of each row of a cache."""
    return TeacherCache(place).lengths()


def _run_all(plan: ChainPlan, runs: Runs, stages: Sequence[Stage]) -> bool:
    """Train one after another what is not finished, each after its caches; whether all of them have a result."""
    out = Path(plan.config.out)
    complete = True
    for stage in stages:
        before = [stage.after, *(need.after for need in stage.needs)]
        if not all(is_finished(out / name) for name in before if name is not None):
            complete = False
            continue
        for need in stage.needs:
            runs.progress.clear()  # a build writes to the same terminal
            plan.maker.make(need.text, need.model, need.place)
        _require_same(stage, out)
        runs.complete([stage])
        complete = complete and is_finished(stage.directory(out))
    return complete


def _rows(
    config: ChainConfig, plan: ChainPlan, singles: Sequence[Stage], limit: int | None, progress: Progress
) -> list[Row]:
    """Every finished model with its evaluations."""
    out = Path(config.out)
    texts = {name: need.place for name, need in plan.heldout.items()}

    def row(label: str, kind: str, directory: Path, stage: int | None = None, task: str | None = None) -> Row:
        found: dict[str, Any] = read_model(
            label, directory, texts, out / "evaluations", limit=limit, progress=progress
        )
        return Row(label=label, kind=kind, directory=str(directory), results=found, stage=stage, task=task)

    base = str(config.model)
    found = [row(short_name(base), "initial", resolve_model(base), 0)]
    for kind, stages in (("stage", plan.stages), ("direct", plan.direct)):
        for number, stage in enumerate(stages, 1):
            if is_finished(stage.directory(out)):
                label = stage.name.removeprefix("stages/").removeprefix("controls/")
                found.append(row(label, kind, stage.directory(out), number, stage.task))
    for stage in singles:
        if is_finished(stage.directory(out)):
            label = stage.name.removeprefix("controls/")
            kind = "multitask" if label == "multitask" else "never-seen"
            task = label.removeprefix("without-") if kind == "never-seen" else None
            found.append(row(label, kind, stage.directory(out), None, task))
    return found
