"""`anneal cache build`: plan, capture, finish; every step durable, repeatable, and safe beside other workers.

    write    with `--generate` only: the model writes the rows itself, committed batch by batch
    plan     tokenise the corpus once into staged rows; commit `_build/plan.json`
    capture  each shard: claim, prefill, temporary file, flush, exclusive commit, flush of the directory
    finish   read every shard back, write the manifest, remove `_build/`

The same command at any later time, on any number of machines, continues at the first missing shard; the
result has the same bytes as an undisturbed build. docs/reliability.md states what is promised and what is
not.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from cache_builder.commit.build_directory import BuildDirectory, State
from cache_builder.commit.capture import Capture
from cache_builder.commit.finish import finish
from cache_builder.commit.plan import BuildSettings, Plan, selected_shards
from cache_builder.commit.shard_committer import Step, no_step
from cache_builder.commit.signals import BuildInterrupted, interruptible
from cache_builder.commit.staging import StagedShard
from cache_builder.config import BuildConfig
from cache_builder.foresee import foresee
from cache_builder.generation.generate import GeneratedRows
from cache_builder.report import BuildReport
from cache_builder.source import BuildSource, open_source
from cache_builder.start import MakeSampler, MakeTeacher, start_engine, start_sampler
from cache_builder.teachers.fast_dtype import dtype_note
from formats.disk.manifest import Manifest
from formats.disk.token_row import TokenRow
from formats.errors import AnnealError, ConfigError
from formats.identity.teacher_identity import TeacherIdentity
from formats.progress import Progress, counted

if TYPE_CHECKING:
    from cache_builder.teachers.protocol import Teacher

PLAN_CLAIM, FINISH_CLAIM = "plan", "finish"
POLL_SECONDS = 1.0
KEPT = "the cache that was there is there still"


class BuildError(AnnealError):
    """The machine failed the build: a full disk, an I/O error. The message says how far it got."""


def build_cache(
    config: BuildConfig,
    progress: Progress | None = None,
    *,
    source: BuildSource | None = None,
    make_teacher: MakeTeacher = start_engine,
    make_sampler: MakeSampler = start_sampler,
    make_capture: Callable[..., Capture] = Capture,
    step: Step = no_step,
) -> BuildReport:
    """Build a cache, or continue one, or say that it is complete.

    Args:
        progress: told about every phase; `ConsoleProgress()` for a terminal, silent by default.
        source: model, tokenizer and corpus, opened already; by default opened from `config`.
        make_teacher: starts the engine when the first shard is claimed; for people with a teacher of their
            own, which must draw tail tokens at `config.draw_rate`.
        make_sampler: starts the engine that writes rows, where `config.generate` asks for some.
        make_capture: does the work of one process; the Ray pool has its own.
        step: called between the operations of the protocol; for fault tests.

    Raises:
        ConfigError, CorpusError: bad settings or input; nothing was written then.
        IdentityMismatchError: the unfinished build was begun with another engine.
        BuildError: the disk is full or fails; what is committed stays, the same command resumes.
        BuildInterrupted: Ctrl-C or SIGTERM; likewise.
    """
    directory = BuildDirectory(config.directory)
    progress = progress or Progress()
    with interruptible():
        was_finished = directory.state() is State.FINISHED
        try:
            return _build(config, directory, progress, source, make_teacher, make_sampler, make_capture, step)
        except BuildInterrupted as signal:
            left = KEPT if was_finished and directory.state() is State.FINISHED else directory.how_far()
            signal.message = f"interrupted: {left}"
            raise
        except OSError as error:
            finished = directory.state() is State.FINISHED
            if finished and not was_finished:  # another worker cleared up under our hands
                return _complete(directory, was_complete=False)
            left = KEPT if finished else directory.how_far()
            raise BuildError(
                f"writing to {error.filename or directory} failed: {error.strerror or error}; {left}"
            ) from error
        finally:
            progress.finish()


def _build(
    config: BuildConfig,
    directory: BuildDirectory,
    progress: Progress,
    source: BuildSource | None,
    make_teacher: MakeTeacher,
    make_sampler: MakeSampler,
    make_capture: Callable[..., Capture],
    step: Step,
) -> BuildReport:
    state = directory.state()
    reopen = (lambda: open_source(config)) if source is None else None
    source = source or open_source(config)
    settings = source.settings
    if state is not State.EMPTY and (config.overwrite or directory.is_discarding()):
        _refuse_if_busy(directory)
        if not directory.is_discarding():
            foresee(config, source, state, progress)  # what is refused then leaves all as it was
        directory.discard()
        progress.note(f"discarded {state.value} in {directory}")
        state = State.EMPTY
    if state is State.FINISHED:
        require_same_cache(directory, settings)
        directory.remove_working()
        return _complete(directory, was_complete=True)
    existed = directory.out.exists()
    directory.prepare()
    if directory.state() is State.FINISHED:
        # Another worker wrote the manifest and cleared up since we looked; what we just made is not a build.
        directory.remove_working()
        return _complete(directory, was_complete=True)
    source = _settle(directory, source, reopen, any_size=config.tokens_per_shard is None)
    step("settings")
    open_rows = _rows_of(directory, source, config, make_sampler, progress, step)
    plan, planned_here = _plan(directory, source, open_rows, config, progress, existed=existed, step=step)
    capture = make_capture(
        directory,
        source.settings,
        plan,
        lambda: _started(make_teacher, config, source, progress),
        heartbeat_seconds=config.heartbeat_seconds,
        progress=progress,
        step=step,
    )
    try:
        indices = selected_shards(config.shards, len(plan.shards))
        manifest = _capture_and_finish(capture, indices, source, config.heartbeat_seconds, progress, step)
    except AnnealError:
        unused = not capture.started and not directory.num_bytes() and not directory.has_workers()
        if planned_here and unused:
            # No engine captured anything, nor does one of another worker: the next command may ask for another one.
            _leave_as_found(directory, existed=existed)
        raise
    finally:
        capture.close()
    progress.finish()
    if manifest is not None:
        return _complete(directory, was_complete=False, capture=capture)
    left = directory.missing(range(len(plan.shards)))
    return BuildReport(
        out=str(directory),
        complete=False,
        was_complete=False,
        num_shards=len(plan.shards),
        num_shards_done=len(plan.shards) - len(left),
        num_rows=plan.num_rows,
        num_tokens=plan.num_tokens,
        num_positions=plan.num_positions,
        num_bytes=directory.num_bytes(),
        num_rows_captured=capture.num_rows,
        num_tokens_captured=capture.num_tokens,
        seconds=capture.seconds,
    )


def _started(
    make_teacher: MakeTeacher, config: BuildConfig, source: BuildSource, progress: Progress
) -> "Teacher":
    teacher = make_teacher(config, source)
    if note := dtype_note(config.dtype, source.checkpoint_dtype, teacher.describe()):
        progress.note(note)
    return teacher


def _capture_and_finish(
    capture: Capture,
    indices: list[int],
    source: BuildSource,
    heartbeat_seconds: float,
    progress: Progress,
    step: Step,
) -> Manifest | None:
    """Capture until all selected shards are there; the manifest if with them all shards are."""
    directory, plan = capture.directory, capture.plan
    everything = range(len(plan.shards))
    while True:
        num_done = sum(plan.shards[i].num_rows for i in set(indices) - set(directory.missing(indices)))
        if num_done:
            progress.note(f"resuming: {directory.how_far().partition(';')[0]}")
        progress.start("capture", sum(plan.shards[i].num_rows for i in indices), num_done)
        capture.run(indices)
        progress.finish()
        if directory.missing(everything):
            return None
        with directory.claims(heartbeat_seconds) as claims:
            while not claims.acquire(FINISH_CLAIM):
                time.sleep(min(POLL_SECONDS, heartbeat_seconds))
            result = finish(directory, source.settings, plan, source.tokenizer_json, step=step)
        if isinstance(result, Manifest):
            return result
        progress.note(f"captured again: {counted(len(result), 'shard')} whose bytes were damaged on the disk")
        indices = result


def _settle(
    directory: BuildDirectory,
    source: BuildSource,
    reopen: Callable[[], BuildSource] | None,
    *,
    any_size: bool,
) -> BuildSource:
    """Make the settings those of the build that is here. Workers that begin at once have each asked the clock for
    the template's time; the first one's holds for all.

    Raises:
        ConfigError: a build with other settings is here; names them.
    """
    try:
        settings = directory.settle_settings(source.settings, any_size=any_size)
    except ConfigError:
        if reopen is None or "template_time" not in source.settings.identity.preprocessing:
            raise
        source = reopen()
        settings = directory.settle_settings(source.settings, any_size=any_size)
    return replace(source, settings=settings)


def _plan(
    directory: BuildDirectory,
    source: BuildSource,
    open_rows: Callable[[], Iterable[TokenRow]],
    config: BuildConfig,
    progress: Progress,
    *,
    existed: bool,
    step: Step,
) -> tuple[Plan, bool]:
    """The plan in the directory, and whether it was made here and now; awaited while another worker is planning."""
    if (plan := directory.read_plan()) is not None:
        return plan, False
    with directory.claims(config.heartbeat_seconds) as claims:
        waits = False
        while not claims.acquire(PLAN_CLAIM):
            if not waits and source.recipe is not None:
                progress.note("another worker writes the rows; waiting for it")
            waits = True
            time.sleep(min(POLL_SECONDS, config.heartbeat_seconds))
            if (plan := directory.read_plan()) is not None:
                return plan, False
        if (plan := directory.read_plan()) is not None:
            return plan, False
        try:
            return _make_plan(directory, source, open_rows, progress, step), True
        except AnnealError:
            # Bad input: leave the place as it was found.
            _leave_as_found(directory, existed=existed)
            raise


def _leave_as_found(directory: BuildDirectory, *, existed: bool) -> None:
    """Unless rows were generated: they cost too much to be thrown away."""
    if not directory.num_generated():
        directory.leave_as_found(existed=existed)


def _rows_of(
    directory: BuildDirectory,
    source: BuildSource,
    config: BuildConfig,
    make_sampler: MakeSampler,
    progress: Progress,
    step: Step,
) -> Callable[[], Iterable[TokenRow]]:
    """Opens the rows of a corpus, or those that the model writes."""
    recipe = source.recipe
    if recipe is None:
        return source.open_rows
    return lambda: GeneratedRows(
        directory,
        recipe,
        recipe.batch_rows(source.settings.tokens_per_shard),
        lambda: make_sampler(config, source),
        tokenizer=source.tokenizer,
        progress=progress,
        step=step,
    )


def _make_plan(
    directory: BuildDirectory,
    source: BuildSource,
    open_rows: Callable[[], Iterable[TokenRow]],
    progress: Progress,
    step: Step,
) -> Plan:
    progress.note(source.sample() if source.sample else "\n".join(source.announcements))
    rows = open_rows()
    if isinstance(rows, GeneratedRows):
        rows.write_missing()
    progress.start("tokenise" if source.recipe is None else "plan", None)

    def staged(index: int, shard: StagedShard) -> None:
        progress.advance(shard.num_rows, shard.num_tokens)
        step(f"staged {index}")

    plan = directory.write_plan(
        rows, source.settings, describe=lambda: source.describe(rows), on_shard=staged
    )
    progress.finish()
    step("planned")
    progress.note(
        f"planned {counted(plan.num_rows, 'row')}, {plan.num_tokens:,} tokens, {plan.num_positions:,} positions "
        f"in {counted(len(plan.shards), 'shard')}"
    )
    if plan.notes:
        progress.note("; ".join(plan.notes))
    return plan


def require_same_cache(directory: BuildDirectory, settings: BuildSettings) -> None:
    """A finished cache is only left alone when it is the one that this command would build."""
    manifest = Manifest.read(directory.out)
    stored = TeacherIdentity.from_dict(manifest.identity).to_dict()
    # The engine recorded more of itself than can be asked for; compare what was asked for.
    wanted = settings.identity.to_dict()["teacher"]
    stored["teacher"] = {key: value for key, value in stored["teacher"].items() if key in wanted}
    BuildSettings(
        identity=TeacherIdentity.from_dict(stored),
        capture=manifest.capture,
        codec=manifest.codec.to_dict(),
        rows_per_shard=settings.rows_per_shard,
        tokens_per_shard=settings.tokens_per_shard,
    ).require_same(settings, directory.out, "a finished cache")


def _refuse_if_busy(directory: BuildDirectory) -> None:
    """Never pull a build away from under a worker that is alive on this machine."""
    if pid := directory.live_local_owner():
        raise ConfigError(
            f"--overwrite needs a build that nobody works on, but process {pid} is building in {directory}; "
            "stop it first"
        )


def _complete(
    directory: BuildDirectory, *, was_complete: bool, capture: Capture | None = None
) -> BuildReport:
    manifest = Manifest.read(directory.out)
    return BuildReport(
        out=str(directory),
        complete=True,
        was_complete=was_complete,
        num_shards=len(manifest.shards),
        num_shards_done=len(manifest.shards),
        num_rows=manifest.num_rows,
        num_tokens=manifest.num_tokens,
        num_positions=manifest.num_positions,
        num_bytes=manifest.num_bytes,
        num_rows_captured=capture.num_rows if capture else 0,
        num_tokens_captured=capture.num_tokens if capture else 0,
        seconds=capture.seconds if capture else 0.0,
        identity=manifest.identity,
    )
