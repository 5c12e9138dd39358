"""Merging and measuring in the processes of a pool: each takes a share of the models.

Without it a sweep of a hundred runs, eight at a time, would then merge and evaluate its models one by one. Everything
is left where the steps that follow look for it: merges in their directories, results in `evaluations/` and `bench/`. So
those steps find their work done, whatever became of a process: what is missing, they do themselves.
"""

import math
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from formats.errors import AnnealError, one_line
from formats.progress import Progress
from trainer.comparison.metric import is_task
from trainer.sweep.compared import bench_settings, initial_of
from trainer.sweep.config import SweepConfig
from trainer.sweep.merges import PlannedMerge, is_made
from trainer.sweep.pools import Job, Outcome, Pool
from trainer.sweep.runs import SweepStopped, is_finished, stopping

LARGEST_SHARE = 8
"""Models per process at most: a process takes some seconds to start, and the bar moves when one ends."""


@dataclass(frozen=True, kw_only=True)
class ModelWork:
    """One model of a share: where it is, and how it is made if it is a merge that is not there yet."""

    label: str
    directory: str
    merge: Mapping[str, Any] | None = None
    """Fields of a `MergeConfig`."""


def measure_in_shares(
    config: SweepConfig,
    runs: Mapping[str, Path],
    merges: Sequence[PlannedMerge],
    pool: Pool,
    progress: Progress,
) -> None:
    """Have every model merged and measured by the pool, where it has room for more than one process.

    Args:
        runs: label -> directory of the finished runs.
        merges: all that are planned; those whose runs have no result are left out.

    Raises:
        SweepStopped: a signal ended it; what was measured stays.
    """
    if pool.parallel < 2:
        return
    out = Path(config.out)
    work = [ModelWork(label=label, directory=str(path)) for label, path in initial_of(config, runs).items()]
    work += [ModelWork(label=label, directory=str(path)) for label, path in runs.items()]
    for planned in merges:
        if all(is_finished(run.directory(out)) for run in planned.runs):
            made = is_made(planned, out)
            work.append(
                ModelWork(
                    label=planned.name,
                    directory=str(planned.directory(out)),
                    merge=None if made else asdict(planned.config(config)),
                )
            )
    texts = [
        (side, name, word)
        for side in ("source", "target")
        for name, word in getattr(config, side).items()
        if not is_task(word)
    ]
    bench = bench_settings(config)
    if bench is None:
        work = unmeasured(work, texts, out / "evaluations", config.eval_dtype)
    if not work:
        return
    shares = divide(work, pool.parallel)
    jobs = [
        Job(
            name=f"share {number}",
            work="measure",
            settings={
                "models": [asdict(model) for model in share],
                "texts": texts,
                "work": str(out / "evaluations"),
                "dtype": config.eval_dtype,
                "bench": None if bench is None else asdict(bench),
            },
            log=out / "logs" / f"measure-{number}.log",
        )
        for number, share in enumerate(shares, start=1)
    ]
    sizes = {job.name: len(share) for job, share in zip(jobs, shares, strict=True)}
    progress.start("measure", len(work), 0, unit="model")
    progress.running()

    def ended(job: Job, outcome: Outcome) -> None:
        if "error" in outcome:
            progress.note(f"{job.name}: {outcome['error']} (log: {job.log})")
        progress.advance(sizes[job.name])

    try:
        with stopping(pool) as caught:
            pool.run(jobs, lambda job: None, ended)
        if caught:
            name = signal.Signals(caught[0]).name
            raise SweepStopped(caught[0], f"stopped by {name} while measuring; the same command continues")
    finally:
        progress.finish()


def unmeasured(
    work: Sequence[ModelWork], texts: Sequence[tuple[str, str, str]], evaluations: Path, dtype: str
) -> list[ModelWork]:
    """The models that have to be made, or of which some text is not remembered."""
    from trainer.bench.model_identity import model_identity
    from trainer.comparison.evaluation_file import EvaluationFile
    from trainer.comparison.text_readings import keys_of, open_texts

    if not evaluations.is_dir():
        return list(work)
    keys = keys_of(open_texts({(side, name): word for side, name, word in texts}), dtype=dtype).values()

    def is_known(model: ModelWork) -> bool:
        directory = Path(model.directory)
        memory = EvaluationFile(directory, model_identity(directory), model.label, evaluations)
        return all(memory.find(key) is not None for key in keys)

    return [model for model in work if model.merge is not None or not is_known(model)]


def divide(work: Sequence[ModelWork], parallel: int) -> list[list[ModelWork]]:
    """Shares of nearly equal size, at most `LARGEST_SHARE`: every n-th model, since neighbours cost alike."""
    count = max(min(parallel, len(work)), math.ceil(len(work) / LARGEST_SHARE))
    return [list(work[number::count]) for number in range(count)]


def measure_share(settings: Mapping[str, Any]) -> Outcome:
    """Merge and measure one share; runs in a process of the pool.

    One model that fails leaves the others; the step that follows meets the same failure and says it in full.
    """
    from trainer.bench.bench import bench_models
    from trainer.bench.model_identity import model_identity
    from trainer.bench.settings import BenchSettings
    from trainer.comparison.evaluation_file import EvaluationFile
    from trainer.comparison.text_readings import open_texts, read_texts
    from trainer.merging.merge_models import merge
    from trainer.merging.settings import MergeConfig

    caches = open_texts({(side, name): word for side, name, word in settings["texts"]})
    bench = None if settings["bench"] is None else BenchSettings(**settings["bench"])
    failed: list[str] = []
    for entry in settings["models"]:
        model = ModelWork(**entry)
        directory = Path(model.directory)
        try:
            if model.merge is not None:
                shutil.rmtree(directory, ignore_errors=True)  # of a run that was done again
                merge(MergeConfig(**model.merge))
            if bench is not None:
                bench_models({model.label: str(directory)}, bench, Progress())
            if caches:
                memory = EvaluationFile(directory, model_identity(directory), model.label, settings["work"])
                read_texts(
                    model.label,
                    directory,
                    caches,
                    memory,
                    dtype=settings["dtype"],
                    device=None,
                    limit=None,
                    progress=Progress(),
                )
        except (AnnealError, OSError, RuntimeError) as error:
            failed.append(f"{model.label}: {one_line(error, None, whole=True)}")
    return {"error": "; ".join(failed), "kind": "Measure"} if failed else {"done": True}
