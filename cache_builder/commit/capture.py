"""The first half of a capture: claim a shard, read its staged rows, run the engine over them, hand the rest
on.

Any number of processes run this over one directory. Each takes the first shard that nobody has committed or
claimed; when only others' shards are left it waits for them, and takes over those whose owner stopped
renewing its claim.
"""

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from cache_builder.commit.build_directory import BuildDirectory
from cache_builder.commit.claims import Claims
from cache_builder.commit.engine_record import EngineRecord
from cache_builder.commit.plan import BuildSettings, Plan
from cache_builder.commit.shard_committer import ShardCommitter, Step, claim_name, no_step
from formats.disk.manifest import ShardInfo
from formats.errors import AnnealError
from formats.progress import Progress

if TYPE_CHECKING:
    from cache_builder.teachers.protocol import Teacher

MAX_POLL_SECONDS = 1.0
Engine = TypeVar("Engine")


class EngineStartError(AnnealError):
    """The engine did not start: not installed, unknown settings, not enough memory."""


def started(make: Callable[[], Engine]) -> Engine:
    """What `make` starts.

    Raises:
        EngineStartError: it did not start, for a reason that is not an error of ours already.
    """
    try:
        return make()
    except AnnealError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise EngineStartError(f"the engine must start, got {type(error).__name__}: {reason}") from error


class Capture:
    """The work of one process: owns the engine, which starts with the first claimed shard."""

    def __init__(
        self,
        directory: BuildDirectory,
        settings: BuildSettings,
        plan: Plan,
        make_teacher: Callable[[], "Teacher"],
        *,
        heartbeat_seconds: float = 10.0,
        progress: Progress | None = None,
        step: Step = no_step,
    ) -> None:
        self.directory, self.settings, self.plan = directory, settings, plan
        self._make_teacher = make_teacher
        self._teacher: Teacher | None = None
        self._heartbeat = heartbeat_seconds
        self._progress = progress or Progress()
        self._step = step
        self.started = False
        """Whether an engine ran."""
        self.seconds = 0.0
        """Time spent capturing, without the start of the engine."""
        self.num_rows = self.num_tokens = self.num_positions = self.num_bytes = self.num_shards = 0
        """What this process has committed."""

    def close(self) -> None:
        """Stop the engine."""
        teacher, self._teacher = self._teacher, None
        if teacher is not None:
            teacher.close()

    def teacher(self) -> "Teacher":
        """The running engine, started on first use and checked against the build's other engines."""
        if self._teacher is None:
            self._progress.note(f"starting the engine ({self.settings.identity.teacher.get('engine')})")
            self._teacher = started(self._make_teacher)
            self.started = True
            self.directory.settle_engine(EngineRecord.of(self._teacher))
        return self._teacher

    def run(self, indices: Iterable[int], *, wait: bool = True) -> None:
        """Capture all missing shards of `indices`; returns when they are committed, by whomever.

        Args:
            indices: shard numbers of the plan.
            wait: False returns when only shards claimed by others are left.

        Raises:
            AnnealError: the engine returned something that cannot be stored, or another engine built this
                cache.
            OSError: the disk is full or fails.
        """
        wanted = list(indices)
        self.directory.sweep_partials()
        with self.directory.claims(self._heartbeat) as claims:
            index = self._claim(wanted, claims, set(), wait)
            if index is None:
                return
            teacher = self.teacher()
            self._progress.running()
            committer = ShardCommitter(
                self.directory,
                self.settings,
                teacher.vocab_size,
                claims,
                step=self._step,
                on_commit=self._committed,
            )
            began = time.monotonic()
            with committer:
                while index is not None:
                    self._prefill(index, teacher, committer)
                    index = self._claim(wanted, claims, committer.in_flight(), wait)
            self.seconds += time.monotonic() - began

    def _claim(self, wanted: list[int], claims: Claims, in_flight: set[int], wait: bool) -> int | None:
        """The next shard that is ours; None when nothing is left to do."""
        while True:
            left = [index for index in self.directory.missing(wanted) if index not in in_flight]
            for index in left:
                name = claim_name(index)
                if not claims.acquire(name):
                    continue
                self._step(f"claimed {index}")
                if self.directory.shard_path(index).exists():  # committed since the directory was listed
                    claims.release(name)
                    continue
                return index
            if not left or not wait:
                return None
            time.sleep(min(MAX_POLL_SECONDS, self._heartbeat))

    def _prefill(self, index: int, teacher: "Teacher", committer: ShardCommitter) -> None:
        rows = self.directory.read_rows(self.plan, index)
        committer.begin(index)
        # One shard is one unit for the engine: its numbers must not depend on what came before.
        for row, topk in zip(rows, teacher.prefill(rows), strict=True):
            committer.row(row, topk)
            self._progress.advance(1, len(row))
        self._step(f"prefilled {index}")
        committer.end(index)

    def _committed(self, info: ShardInfo, created: bool) -> None:
        self.num_shards += 1
        self.num_rows += info.num_rows
        self.num_tokens += info.num_tokens
        self.num_positions += info.num_positions
        self.num_bytes += info.num_bytes
        self._progress.wrote(info.num_bytes, info.num_tokens)
