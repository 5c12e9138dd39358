"""The run directories of a sweep: which are finished, which failed for good, and the rest through a pool.

runs/NAME      an ordinary run directory, as `anneal train` leaves it
logs/NAME.log  what the run said
failed/NAME.json   why it has no result
"""

import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from formats.cache import TeacherCache
from formats.disk.durable import atomic_write_json
from formats.errors import AnnealError, ConfigError, one_line
from formats.identity.fingerprint import resolve_model, weight_files
from formats.identity.tensor_hash import read_header
from formats.interruption import Interrupted
from formats.progress import Progress
from trainer.checkpoint import newest_checkpoint
from trainer.config import TrainConfig
from trainer.config_file import RESOLVED_NAME, load_config
from trainer.preflight.continuation import WEIGHTS, cache_contents, comparable, ewc_contents
from trainer.recipe import device_defaults, resolve_training
from trainer.result.lineage import own_weights
from trainer.result.run_directory import read_record
from trainer.sweep.names import digest
from trainer.sweep.plan import PlannedRun
from trainer.sweep.pools import ENDED, Job, Outcome, Pool

FOR_GOOD = "DivergenceError"
"""The failure that the same settings give again; others are tried again."""


class SweepStopped(Interrupted):
    """A signal ended the sweep; finished runs stay, those under way have a checkpoint, the same command continues."""


def is_finished(directory: Path) -> bool:
    """Whether a run has its result."""
    return read_record(directory).get("status") == "complete"


def decisive(run: PlannedRun, out: Path) -> dict[str, Any]:
    """The settings that decide what a run computes, flat; not what the machine decides where nothing was typed."""
    config = run.config(out)
    found = comparable(config.to_dict() | {"training": resolve_training(config)})
    return {key: value for key, value in found.items() if key not in of_the_machine(config.training)}


def of_the_machine(typed: Mapping[str, Any]) -> set[str]:
    """Arguments that were not typed and differ between machines."""
    names = {"use_cpu", "bf16", *device_defaults(typed, lora=True)}
    return {f"training.{name}" for name in names if typed.get(name) is None}


def read_by(config: TrainConfig) -> dict[str, str]:
    """What a run reads, by what is in it: caches, and the weights of models that are there.

    Raises:
        FormatError: a cache is missing or broken.
    """
    found = cache_contents("training", [TeacherCache(config.cache)])
    found |= cache_contents("mixed", [TeacherCache(cache.path) for cache in config.caches])
    tasks = config.ewc_tasks
    found |= ewc_contents(
        [TeacherCache(task.cache) for task in tasks],
        [None if task.model is None else weights_at(task.model) for task in tasks],
    )
    if (weights := weights_at(config.model, config.revision)) is not None:
        found[WEIGHTS] = weights
    return found


def weights_at(model: str, revision: str | None = None) -> str | None:
    """The fingerprint of a model's weights; None where there is no whole model, such as of a stage to come."""
    try:
        return own_weights(resolve_model(model, revision))
    except AnnealError:
        return None


def was_read_by(record: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a finished run, as far as its record says it."""
    found = {**(record.get("run") or {}), **(record.get("ewc") or {})}
    if WEIGHTS in found and found[WEIGHTS] is None:  # the cache's identity says it
        found[WEIGHTS] = ((record.get("identity") or {}).get("teacher") or {}).get("weights")
    return found


def require_same(run: PlannedRun, out: Path) -> None:
    """Refuse a directory whose run is another one than this, or of other caches or weights than are there now.

    Raises:
        ConfigError: names the run, the first setting that differs and both values, or what of it is damaged.
    """
    directory = run.directory(out)
    if not is_finished(directory) and newest_checkpoint(directory) is None:
        return  # nothing there that would be continued
    config = run.config(out)
    now = decisive(run, out)
    ignored = of_the_machine(config.training)
    again = f"put it back, or remove {directory}, and the same command trains it again"
    try:
        typed = load_config(directory / RESOLVED_NAME)
        if is_finished(directory):
            for file in weight_files(directory):
                if file.suffix == ".safetensors":
                    read_header(file)
    except (AnnealError, OSError) as error:
        raise ConfigError(
            f"{directory} must be whole, as its run left it, got {one_line(error)}; {again}"
        ) from None
    before = comparable(typed.to_dict())  # younger settings take their default
    before = {key: value for key, value in before.items() if key not in ignored}
    record = read_record(directory)
    facts = was_read_by(record)
    if record.get("ewc"):  # then its models are known by their weights, wherever they are
        now, before = without_ewc_models(now), without_ewc_models(before)
    for key, contents in read_by(config).items():
        # What an earlier version did not record cannot be compared; caches it did.
        if key in facts or key.startswith(("the training", "the mixed")):
            before[key], now[key] = facts.get(key), contents
    for key in sorted({*now, *before}):
        was, is_now = before.get(key), now.get(key)
        if json.dumps(was, default=str) != json.dumps(is_now, default=str) and was != is_now:
            raise ConfigError(
                f"a run keeps its settings, but in {directory} {key} was {was!r} and is {is_now!r}; use the "
                "same settings or another --out"
            )


def without_ewc_models(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without where the models of `ewc` are."""

    def without_model(task: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in task.items() if key != "model"}

    ewc = settings.get("ewc")
    if isinstance(ewc, list):
        ewc = [without_model(task) for task in ewc]
    elif ewc is not None:
        ewc = without_model(ewc)
    return {**settings, "ewc": ewc}


class Runs:
    """The runs of one sweep and what became of them.

    Args:
        out: the sweep's directory.
        pool: what trains them.
        progress: a phase over the runs of each `complete`, or over all that are `counted`.
    """

    def __init__(self, out: Path, pool: Pool, progress: Progress) -> None:
        self.out, self.pool, self.progress = out, pool, progress
        self.failed: dict[str, str] = {}
        """Name of a run -> why it has no result."""
        self._counted: list[Path] = []
        """Directories of the runs of the phase under way; empty between phases."""
        self._begun = 0
        """How many of them are done or under way."""

    @contextmanager
    def counted(self, what: str, directories: Sequence[Path], done: int | None = None) -> Iterator[None]:
        """One phase over all these runs, however few of them each `complete` in this block trains.

        Args:
            what: name of the phase.
            directories: those of the runs.
            done: how many need no training; those that are finished by default.
        """
        self._counted = list(directories)
        self._begun = sum(map(is_finished, directories)) if done is None else done
        self.progress.start(what, len(self._counted), self._begun, unit="run")
        self.progress.running()
        try:
            yield
        finally:
            self._counted = []
            self.progress.finish()

    def complete(self, runs: Sequence[PlannedRun], what: str = "sweep") -> None:
        """Train what is not finished, in a phase of its own unless `counted` began one.

        Raises:
            SweepStopped: a signal ended it.
        """
        waiting = [run for run in runs if not is_finished(run.directory(self.out)) and not self.diverged(run)]
        if self._counted:
            self._train(waiting)
            return
        directories = [run.directory(self.out) for run in runs]
        with self.counted(what, directories, len(runs) - len(waiting)):
            self._train(waiting)

    def _train(self, waiting: Sequence[PlannedRun]) -> None:
        jobs = [self._job(run) for run in waiting]
        known = {run.name: run for run in waiting}
        total = len(self._counted)
        caught: Sequence[int] = ()

        def started(job: Job) -> None:
            self._begun += 1
            self.progress.note(f"run {self._begun} of {total}: {job.name} (log: {job.log})")

        def ended(job: Job, outcome: Outcome) -> None:
            if "interrupted" in outcome:
                self.failed[job.name] = f"stopped by {outcome['interrupted']}; the same command continues it"
                return  # not done, and not counted
            if caught and outcome.get("kind") == ENDED:  # before it could save, or by a second signal
                self.failed[job.name] = "stopped; the same command starts it again"
                return
            if "error" in outcome:
                self._fail(known[job.name], outcome)
                self.progress.note(f"run {job.name} failed: {outcome['error']}")
            else:
                self._place(job.name).unlink(missing_ok=True)
                self.failed.pop(job.name, None)
            self.progress.advance(1)

        if jobs:
            with stopping(self.pool) as caught:
                self.pool.run(jobs, started, ended)
            if caught:
                finished = sum(map(is_finished, self._counted))
                raise SweepStopped(
                    caught[0],
                    f"stopped by {signal.Signals(caught[0]).name} with {finished} of {total} runs finished; "
                    "the same command continues",
                )

    def _job(self, run: PlannedRun) -> Job:
        settings = {**run.settings, "out": str(run.directory(self.out))}
        return Job(name=run.name, settings=settings, log=self.out / "logs" / f"{run.name}.log")

    def _place(self, name: str) -> Path:
        return self.out / "failed" / f"{name}.json"

    def _fail(self, run: PlannedRun, outcome: Outcome) -> None:
        self.failed[run.name] = str(outcome["error"])
        record = {**outcome, "settings": self._digest(run)}
        self._place(run.name).parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(self._place(run.name), record)

    def _digest(self, run: PlannedRun) -> str:
        """Eight letters that stand for what a run computes, from its settings and what it reads."""
        try:
            reads = read_by(run.config(self.out))
        except AnnealError:  # gone meanwhile, and perhaps why it failed
            reads = {}
        return digest(decisive(run, self.out) | reads)

    def diverged(self, run: PlannedRun) -> bool:
        """Whether a run diverged before with these settings, caches and weights: it would again."""
        try:
            record = json.loads(self._place(run.name).read_text(encoding="utf-8"))
            again = record["kind"] == FOR_GOOD and record["settings"] == self._digest(run)
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if again:
            self.failed[run.name] = str(record["error"])
        return bool(again)


@contextmanager
def stopping(pool: Pool) -> Iterator[list[int]]:
    """In this block SIGINT and SIGTERM stop the pool in order, and a second one at once; yields those that came."""
    caught: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if len(caught) == 1:
            pool.stop()
        else:
            pool.kill()

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
