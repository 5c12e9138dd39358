"""The output directory of a build, and the only place that knows where its files lie.

    out/manifest.json      written last: from then on the directory is a cache
    out/shard-00000.arrow  committed one by one under their final names
    out/tokenizer.json     so that `inspect` can show text
    out/_build/            everything unfinished; removed after the manifest
        settings.json      identity, codec and shard sizes; the first command decides, others are compared
        generated-*.arrow  rows that the model wrote itself, a batch a file (`--generate`)
        sampler.json       what the engine that wrote them said of itself
        rows-00000.arrow   the staged rows of one shard-to-be
        plan.json          the shards and what was counted; its presence ends planning
        engine.json        what the first engine said of itself; every later one must say the same
        claims/            which worker is busy with what
        notes/             counts of a written shard, until the manifest takes them over
        partial/           shards that are being written

Only names of this list are ever deleted.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Any

from cache_builder.commit.claims import Claims, died_here, is_worked_on, live_local_owner, this_process
from cache_builder.commit.engine_record import EngineRecord
from cache_builder.commit.generated import generated_batches, read_generated, write_generated
from cache_builder.commit.plan import BuildSettings, Plan, require_work, sealed, unsealed
from cache_builder.commit.staging import StagedShard, cut, read_staged, stage
from formats.disk.durable import (
    TEMPORARY_SUFFIX,
    atomic_write_bytes,
    commit_exclusive,
    fsync_directory,
    temporary_name,
)
from formats.disk.manifest import MANIFEST_NAME, Manifest, ShardInfo, shard_name
from formats.disk.token_row import TokenRow
from formats.disk.unfinished_build import BUILD_DIRECTORY, PLAN_NAME
from formats.errors import AnnealError, ConfigError, FormatError
from formats.identity.teacher_identity import TeacherIdentity

TOKENIZER_NAME = "tokenizer.json"
SETTINGS_NAME, DISCARD_NAME = "settings.json", "discard"
ENGINE_NAME, SAMPLER_NAME = "engine.json", "sampler.json"
CLAIMS_NAME, NOTES_NAME, PARTIAL_NAME, OWNER_NAME = "claims", "notes", "partial", "owner.json"
_OURS = re.compile(r"shard-\d{5,}\.arrow|tokenizer\.json|\..*" + re.escape(TEMPORARY_SUFFIX))


class State(Enum):
    """What an output directory holds."""

    EMPTY = "nothing"
    UNFINISHED = "an unfinished build"
    FINISHED = "a cache"


class BuildDirectory:
    """Owns every file of a build. Any number of processes may hold one over the same path."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.working = out / BUILD_DIRECTORY
        """Where everything unfinished lives."""

    def __str__(self) -> str:
        return str(self.out)

    # --- the directory as a whole -------------------------------------------------------------------------

    def state(self) -> State:
        """Look at the directory.

        Raises:
            ConfigError: it is no directory, or holds something that this program did not make.
        """
        try:
            names = set(os.listdir(self.out))
        except FileNotFoundError:
            return State.EMPTY
        except OSError as error:
            raise ConfigError(
                f"--out must be a readable directory, got {self.out}: {error.strerror}"
            ) from None
        rule = f"--out must be new, empty, a cache or an unfinished build, got {self.out}"
        if MANIFEST_NAME in names:
            try:
                Manifest.read(self.out)
            except AnnealError as error:
                raise ConfigError(f"{rule} with a {MANIFEST_NAME} that cannot be read: {error}") from None
            return State.FINISHED
        if BUILD_DIRECTORY in names and self.working.is_dir():
            return State.UNFINISHED
        if names:
            raise ConfigError(f"{rule}, which holds {sorted(names)[0]}; choose another directory")
        return State.EMPTY

    def prepare(self) -> None:
        """Make the directory and its `_build/`, and prove that files can be written and flushed there.

        Raises:
            ConfigError: they cannot.
        """
        try:
            self.working.mkdir(parents=True, exist_ok=True)
            probe = self.working / f".probe.{os.getpid()}{TEMPORARY_SUFFIX}"
            atomic_write_bytes(probe, b"x" * 4096)
            probe.unlink()
            fsync_directory(self.out)
        except OSError as error:
            raise ConfigError(
                f"--out must be a directory that can be written, got {self.out}: {error.strerror or error}"
            ) from None

    def discard(self) -> None:
        """Delete a cache or an unfinished build, and nothing else that lies beside it.

        A marker goes first, so that a directory whose deletion was interrupted is still known as ours; the
        manifest next, so that nobody opens what is left.
        """
        self.working.mkdir(exist_ok=True)
        atomic_write_bytes(self.working / DISCARD_NAME, b"")
        (self.out / MANIFEST_NAME).unlink(missing_ok=True)
        fsync_directory(self.out)
        for name in os.listdir(self.out):
            if _OURS.fullmatch(name):
                (self.out / name).unlink(missing_ok=True)
        self.remove_working()

    def is_discarding(self) -> bool:
        """Whether an earlier `discard` was interrupted."""
        return (self.working / DISCARD_NAME).exists()

    def remove_working(self) -> None:
        """Delete `_build/`, its discard marker last, and temporary files that a killed process left beside
        it. Another worker may still be adding files: retried.
        """
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.out):
                if name.startswith(".") and _OURS.fullmatch(name):
                    (self.out / name).unlink(missing_ok=True)
        for _ in range(20):
            with contextlib.suppress(FileNotFoundError, OSError):
                for entry in list(os.scandir(self.working)):
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path, ignore_errors=True)
                    elif entry.name != DISCARD_NAME:
                        os.unlink(entry.path)
                (self.working / DISCARD_NAME).unlink(missing_ok=True)
                self.working.rmdir()
            if not self.working.exists():
                break
            time.sleep(0.05)
        fsync_directory(self.out)

    def leave_as_found(self, *, existed: bool) -> None:
        """Take `_build/` away again, and the directory too if it was made for this build."""
        self.remove_working()
        if not existed:
            with contextlib.suppress(OSError):
                self.out.rmdir()

    def how_far(self) -> str:
        """`12 of 40 shards are on the disk; run the same command again to go on`."""
        plan = None
        with contextlib.suppress(OSError, AnnealError):
            plan = self.read_plan()
        if plan is None and (num_rows := self.num_generated()):
            return f"{num_rows} generated rows are on the disk; run the same command again to go on"
        if plan is None:
            return "no shard is on the disk; run the same command again"
        num_done = len(plan.shards) - len(self.missing(range(len(plan.shards))))
        return f"{num_done} of {len(plan.shards)} shards are on the disk; run the same command again to go on"

    # --- claims -------------------------------------------------------------------------------------------

    def claims(self, heartbeat_seconds: float) -> Claims:
        """The claims of one worker, for a `with` statement."""
        return Claims(self.working / CLAIMS_NAME, heartbeat_seconds)

    def live_local_owner(self) -> int | None:
        """Process id of another live process of this machine that works on this build, if there is one."""
        return live_local_owner(self.working / CLAIMS_NAME)

    def has_workers(self) -> bool:
        """Whether an engine has started for this build, or somebody holds a claim on a part of it."""
        return (self.working / ENGINE_NAME).exists() or is_worked_on(self.working / CLAIMS_NAME)

    # --- settings and plan --------------------------------------------------------------------------------

    def settle_settings(self, settings: BuildSettings, *, any_size: bool = False) -> BuildSettings:
        """Make `settings` those of this build, or prove that they already are; returns the build's.

        Args:
            any_size: nobody asked for this `tokens_per_shard`, so that of a build which is here will do.

        Raises:
            ConfigError: a build with other settings is here; names them.
        """
        return self._compared(self._settle(SETTINGS_NAME, settings.to_bytes()), settings, any_size)

    def require_same(self, settings: BuildSettings, *, any_size: bool = False) -> None:
        """As `settle_settings`, of an unfinished build alone; writes nothing.

        Raises:
            ConfigError: a build with other settings is here; names them.
        """
        with contextlib.suppress(FileNotFoundError):  # nothing is settled yet
            self._compared((self.working / SETTINGS_NAME).read_bytes(), settings, any_size)

    def _compared(self, content: bytes, settings: BuildSettings, any_size: bool) -> BuildSettings:
        recorded = BuildSettings.from_bytes(content)
        if any_size:
            settings = replace(settings, tokens_per_shard=recorded.tokens_per_shard)
        recorded.require_same(settings, self.out, "an unfinished build")
        return settings

    def recorded_identity(self) -> TeacherIdentity | None:
        """The identity of the cache or of the unfinished build that is here; None if there is neither, or it is
        damaged.
        """
        with contextlib.suppress(AnnealError, OSError):
            if (self.out / MANIFEST_NAME).exists():
                return TeacherIdentity.from_dict(Manifest.read(self.out).identity)
            return BuildSettings.from_bytes((self.working / SETTINGS_NAME).read_bytes()).identity
        return None

    def read_plan(self) -> Plan | None:
        """The plan of this build; None while it is being made."""
        try:
            return Plan.from_bytes((self.working / PLAN_NAME).read_bytes())
        except FileNotFoundError:
            return None

    def write_plan(
        self,
        rows: Iterable[TokenRow],
        settings: BuildSettings,
        *,
        describe: Callable[[], Mapping[str, Any]] = dict,
        on_shard: Callable[[int, StagedShard], None] = lambda index, shard: None,
    ) -> Plan:
        """Tokenise the corpus into staged rows and commit the plan. Memory: one shard of tokens.

        An interrupted planning starts again and overwrites the staged rows with the same bytes.

        Args:
            rows: the corpus, read once.
            describe: called at the end, what the tokeniser counted.
            on_shard: called after each staged shard.

        Raises:
            CorpusError: there is nothing to capture.
            OSError: the disk is full or fails.
        """
        shards: list[StagedShard] = []
        for group in cut(rows, settings.rows_per_shard, settings.tokens_per_shard):
            shards.append(stage(self.working, len(shards), group, settings.capture.positions))
            on_shard(len(shards) - 1, shards[-1])
        plan = Plan(shards=tuple(shards), corpus=describe())
        require_work(plan.num_positions, plan.num_rows)
        atomic_write_bytes(self.working / PLAN_NAME, plan.to_bytes())
        return plan

    def read_rows(self, plan: Plan, index: int) -> list[TokenRow]:
        """The staged rows of one shard, checked against the plan.

        Raises:
            CorruptShardError: the file is not the one that was planned.
        """
        return read_staged(self.working, index, plan.shards[index])

    # --- generated rows -----------------------------------------------------------------------------------

    def write_generated(self, first: int, rows: Sequence[TokenRow]) -> None:
        """Commit the generated rows `first`, `first` + 1, ...; whole or not at all."""
        write_generated(self.working, first, rows)

    def read_generated(self, first: int, last: int) -> list[TokenRow] | None:
        """The generated rows first:last (last excluded) if they were committed together and their bytes are whole."""
        return read_generated(self.working, first, last)

    def num_generated(self) -> int:
        """Generated rows on the disk."""
        return sum(last - first for first, last in generated_batches(self.working))

    def settle_sampler(self, sampler: EngineRecord) -> None:
        """As `settle_engine`, for the engine that writes rows.

        Raises:
            IdentityMismatchError: another kind of engine wrote the first rows.
        """
        recorded = EngineRecord.from_bytes(self._settle(SAMPLER_NAME, sampler.to_bytes()), SAMPLER_NAME)
        recorded.require_same(sampler, self.out, "generated rows")

    # --- the engine ---------------------------------------------------------------------------------------

    def settle_engine(self, engine: EngineRecord) -> None:
        """Record this engine as that of the build, or prove that it equals the recorded one.

        Raises:
            IdentityMismatchError: another kind of engine captured the first shards.
        """
        recorded = EngineRecord.from_bytes(self._settle(ENGINE_NAME, engine.to_bytes()), ENGINE_NAME)
        recorded.require_same(engine, self.out)

    def read_engine(self) -> EngineRecord:
        """The recorded engine of a build that has committed at least one shard."""
        return EngineRecord.from_bytes((self.working / ENGINE_NAME).read_bytes(), ENGINE_NAME)

    def _settle(self, name: str, data: bytes) -> bytes:
        """Contents of a file that the first command decides."""
        path = self.working / name
        if not path.exists():
            temporary = temporary_name(path)
            temporary.write_bytes(data)
            commit_exclusive(temporary, path)
        return path.read_bytes()

    # --- shards -------------------------------------------------------------------------------------------

    def shard_path(self, index: int) -> Path:
        """Where shard number `index` is or will be."""
        return self.out / shard_name(index)

    def missing(self, indices: Iterable[int]) -> list[int]:
        """Those of `indices` that are not committed yet."""
        present = {path.name for path in self.out.glob("shard-*.arrow")}
        return [index for index in indices if shard_name(index) not in present]

    def num_bytes(self) -> int:
        """Bytes of all committed shards."""
        return sum(path.stat().st_size for path in self.out.glob("shard-*.arrow"))

    def new_partial(self, index: int) -> Path:
        """Where this process may write shard `index`; the file's directory names its owner."""
        directory = self.working / PARTIAL_NAME / f"{index:05d}-{uuid.uuid4().hex[:12]}"
        directory.mkdir(parents=True)
        (directory / OWNER_NAME).write_text(json.dumps(this_process()))
        return directory / shard_name(index)

    def drop_partial(self, path: Path) -> None:
        """Forget a place from `new_partial` whose file is gone."""
        with contextlib.suppress(OSError):
            (path.parent / OWNER_NAME).unlink(missing_ok=True)
            path.parent.rmdir()

    def sweep_partials(self) -> None:
        """Delete unfinished shard files of processes of this machine that are gone."""
        for directory in (self.working / PARTIAL_NAME).glob("*"):
            with contextlib.suppress(OSError, ValueError):
                if died_here({"process": json.loads((directory / OWNER_NAME).read_text())}):
                    shutil.rmtree(directory, ignore_errors=True)

    def write_note(self, index: int, info: ShardInfo) -> None:
        """Keep the counts of a written shard until the manifest takes them over."""
        note = self._note_path(index, info.sha256)
        note.parent.mkdir(exist_ok=True)
        atomic_write_bytes(note, sealed(asdict(info)))

    def commit_shard(self, index: int, path: Path) -> bool:
        """Give a written shard its final name; False if another worker was first."""
        return commit_exclusive(path, self.shard_path(index))

    def committed(self, plan: Plan, index: int) -> ShardInfo | None:
        """The counts of a committed shard; None if its bytes are not those that were written, or not those
        that were planned, or the note of its counts is damaged.
        """
        with open(self.shard_path(index), "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        note = self._note_path(index, sha256)
        try:
            info = ShardInfo(**unsealed(note.read_bytes(), note.name))
        except (FileNotFoundError, FormatError):
            return None
        return info if plan.shards[index].describes(info) and info.sha256 == sha256 else None

    def remove_shards(self, indices: Iterable[int]) -> None:
        """Delete committed shards whose bytes were damaged, so that they are captured again."""
        for index in indices:
            self.shard_path(index).unlink(missing_ok=True)
        fsync_directory(self.out)

    def write_file(self, name: str, data: bytes) -> str:
        """Write an auxiliary file of the cache; its SHA-256."""
        atomic_write_bytes(self.out / name, data)
        return hashlib.sha256(data).hexdigest()

    def _note_path(self, index: int, sha256: str) -> Path:
        return self.working / NOTES_NAME / f"{index:05d}-{sha256[:32]}.json"
