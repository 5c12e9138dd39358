"""`--ray ADDRESS`: a pool of engines on a Ray cluster, each capturing one shard of the plan at a time.

The driver plans, hands out shard numbers and finishes; a worker is an ordinary `Capture` over the shared
output directory. So a killed worker costs the shard it was on, a killed driver costs nothing that is
committed, and the same command (with or without --ray) resumes. A shard whose worker died `MAX_FAILURES`
times ends the build: the shard itself is then the likely cause.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cache_builder.build import build_cache
from cache_builder.commit.build_directory import BuildDirectory
from cache_builder.commit.capture import Capture
from cache_builder.commit.plan import Plan
from cache_builder.config import BuildConfig
from cache_builder.report import BuildReport
from cache_builder.source import BuildSource, open_source
from cache_builder.start import MakeTeacher, start_engine
from cache_builder.teachers.engine_args import gpus_per_engine
from formats.errors import AnnealError, ConfigError, one_line
from formats.progress import Progress
from formats.ray_cluster import connected, machines_of

MAX_FAILURES = 3


class WorkerDied(AnnealError):
    """Workers keep dying on one shard."""


@dataclass(frozen=True, kw_only=True)
class PoolSize:
    """How many workers, and what each takes from the cluster."""

    num_workers: int
    """Engines at a time."""
    num_cpus: float = 1.0
    """CPUs per engine."""
    num_gpus: float = 0.0
    """GPUs per engine."""

    @classmethod
    def of_cluster(
        cls, machines: Sequence[Mapping[str, float]], config: BuildConfig, num_workers: int | None
    ) -> "PoolSize":
        """As many engines as the machines have GPUs for (CPUs, where there is no GPU): an engine is on one of them.

        Args:
            machines: the resources of each.

        Raises:
            ConfigError: no machine has room for one engine, or the engine is split in a way that is refused.
        """
        num_gpus = gpus_per_engine(config.engine_args) if any(each.get("GPU") for each in machines) else 0
        room = 0
        for each in machines:
            gpus, cpus = int(each.get("GPU", 0)), int(each.get("CPU", 0))
            room += min(gpus // num_gpus, cpus) if num_gpus else cpus
        if room < 1:
            needs = f"{num_gpus} GPUs and a CPU" if num_gpus else "a CPU"
            found = ", ".join(f"{each.get('GPU', 0):g} and {each.get('CPU', 0):g}" for each in machines)
            raise ConfigError(
                f"--ray needs a machine with room for one engine, which takes {needs}, got GPUs and CPUs: "
                f"{found or 'none'}"
            )
        return cls(num_workers=min(num_workers or room, room), num_gpus=num_gpus)


class ShardWorker:
    """One engine; runs inside a Ray actor."""

    def __init__(self, config: BuildConfig, source: BuildSource, make_teacher: MakeTeacher) -> None:
        directory = BuildDirectory(config.directory)
        plan = directory.read_plan()
        if plan is None:
            raise AnnealError(
                f"every worker must see the output directory, got no plan in {config.directory} "
                "on this machine; use a shared file system"
            )
        any_size = config.tokens_per_shard is None
        source = replace(source, settings=directory.settle_settings(source.settings, any_size=any_size))
        self._capture = Capture(
            directory,
            source.settings,
            plan,
            lambda: make_teacher(config, source),
            heartbeat_seconds=config.heartbeat_seconds,
        )

    def capture(self, index: int) -> tuple[int, int, int]:
        """Capture one shard unless somebody else has; rows, tokens and bytes that this call committed."""
        before = (self._capture.num_rows, self._capture.num_tokens, self._capture.num_bytes)
        self._capture.run([index])
        after = (self._capture.num_rows, self._capture.num_tokens, self._capture.num_bytes)
        return after[0] - before[0], after[1] - before[1], after[2] - before[2]


class RayCapture(Capture):
    """A `Capture` whose work is done by the pool; takes the place of the local one in `build_cache`."""

    def __init__(self, *args: Any, start_worker: Callable[[], Any], num_workers: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self._start_worker, self._num_workers = start_worker, num_workers

    def run(self, indices: Any, *, wait: bool = True) -> None:
        import ray

        pending = self.directory.missing(indices)[::-1]
        failures: dict[int, int] = {}
        busy: dict[Any, tuple[int, Any]] = {}
        idle = [self._start_worker() for _ in range(min(self._num_workers, len(pending)))]
        began = time.monotonic()
        try:
            while pending or busy:
                while pending and idle:
                    index, worker = pending.pop(), idle.pop()
                    busy[worker.capture.remote(index)] = (index, worker)
                while idle:  # nothing is left for them, and a worker with a shard may wait for their room
                    ray.kill(idle.pop())
                (done, *_), _ = ray.wait(list(busy), num_returns=1)
                index, worker = busy.pop(done)
                try:
                    num_rows, num_tokens, num_bytes = ray.get(done)
                except ray.exceptions.RayActorError as error:
                    failures[index] = failures.get(index, 0) + 1
                    if failures[index] == MAX_FAILURES:
                        raise WorkerDied(
                            f"a shard must not kill its worker, got {MAX_FAILURES} dead workers "
                            f"on shard {index}: {one_line(error, 200, whole=True)}"
                        ) from error
                    self._progress.note(f"a worker died on shard {index}; another takes it")
                    pending.append(index)
                    idle.append(self._start_worker())
                except ray.exceptions.RayTaskError as error:
                    cause = error.cause
                    raise cause if isinstance(cause, AnnealError | OSError) else error from None
                else:
                    self.started = True
                    idle.append(worker)
                    self._count(num_rows, num_tokens, num_bytes)
        finally:
            self.seconds += time.monotonic() - began
            for worker in [*idle, *(worker for _, worker in busy.values())]:
                with contextlib.suppress(Exception):
                    ray.kill(worker)

    def _count(self, num_rows: int, num_tokens: int, num_bytes: int) -> None:
        self.num_shards += 1
        self.num_rows += num_rows
        self.num_tokens += num_tokens
        self.num_bytes += num_bytes
        self._progress.advance(num_rows, num_tokens)
        if num_bytes:
            self._progress.wrote(num_bytes, num_tokens)


def require_corpus(config: BuildConfig) -> None:
    """Refuse rows that the model is to write.

    Raises:
        ConfigError: there are such.
    """
    if config.generate is not None:
        raise ConfigError(
            "--ray captures a corpus, got --generate, whose rows one engine writes; build without --ray (several "
            "commands with the same --out share the capture)"
        )


def build_cache_with_ray(
    config: BuildConfig,
    address: str | None = None,
    *,
    num_workers: int | None = None,
    progress: Progress | None = None,
    source: BuildSource | None = None,
    make_teacher: MakeTeacher = start_engine,
    runtime_env: dict[str, Any] | None = None,
) -> BuildReport:
    """`build_cache` with the engines of a Ray cluster; the output directory must be shared by its machines.

    Args:
        address: of a running cluster, `auto` for the one this machine belongs to; None starts Ray on this
            machine.
        num_workers: engines at a time; None is as many as the cluster has room for.
        runtime_env: passed to Ray.

    Raises:
        ConfigError: Ray is not installed, not reachable, or has no room.
        WorkerDied: workers keep dying on one shard.
        AnnealError: whatever `build_cache` raises.
    """
    require_corpus(config)
    with connected(address, runtime_env):
        import ray

        source = source or open_source(config)
        size = PoolSize.of_cluster(machines_of(ray.nodes()), config, num_workers)
        actor = ray.remote(num_cpus=size.num_cpus, num_gpus=size.num_gpus)(ShardWorker)
        portable = source.portable()

        def make_capture(
            directory: BuildDirectory, settings: Any, plan: Plan, make: Any, **options: Any
        ) -> Capture:
            return RayCapture(
                directory,
                settings,
                plan,
                make,
                start_worker=lambda: actor.remote(config, portable, make_teacher),
                num_workers=size.num_workers,
                **options,
            )

        return build_cache(
            config, progress, source=source, make_teacher=make_teacher, make_capture=make_capture
        )
