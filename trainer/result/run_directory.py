"""The directory of a run: what may be there at the start, and how the result gets its place in one go.

anneal.yaml          the resolved settings; with them the same run can be made again
anneal.json          status (`running`, `complete`), the cache's identity, what decides the steps, step 0, evaluation
checkpoint-N/        while the run goes on
unpublished/         a result that does not compute what the trained model does
config.json, model.safetensors, tokenizer.json, README.md ...   the result; config.json comes last, so that
                     nothing takes half a model for a model

A directory holds a run from its first complete checkpoint on. Before that there is nothing to continue: a command
that fails takes away what it wrote, and what a killed one left is started over, by these settings or by others.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from formats.disk.durable import atomic_write_json, fsync_directory, fsync_file, locked, read_json_object
from formats.errors import ConfigError
from trainer.checkpoint import newest_checkpoint, sweep
from trainer.config_file import RESOLVED_NAME, save_config
from trainer.preflight.continuation import require_same_run
from trainer.retention.fisher_file import remove_fisher

RECORD_NAME = "anneal.json"
STAGING_NAME = ".result.staging"
UNPUBLISHED_NAME = "unpublished"
STATUSES = ("running", "complete")
"""What anneal.json says of a run; that of a merged model says neither."""


@dataclass
class RunDirectory:
    """An output directory that was found usable.

    Use `RunDirectory.open`, and as a context: `with directory:` takes away what it wrote when the run fails before its
    first checkpoint.
    """

    path: Path
    """The directory."""
    record: dict[str, Any]
    """Contents of anneal.json."""
    checkpoint: Path | None = None
    """The newest complete checkpoint of an interrupted run."""
    owner: bool = True
    """Whether this process writes here: one of a run does."""
    was_there: bool = False
    """Whether the directory existed before."""
    _lock: int | None = field(default=None, repr=False)

    @classmethod
    def open(
        cls, path: Path, settings: Mapping[str, Any], identity: Mapping[str, Any], *, owner: bool = True
    ) -> "RunDirectory":
        """Create the directory, or find an interrupted run in it.

        Args:
            path: `--out`.
            settings: resolved, for anneal.yaml.
            identity: of the target cache.
            owner: False in the processes that leave writing to another one.

        Raises:
            ConfigError: it cannot be written, holds something else, a finished run, a run on another cache, or one
                that is under way.
        """
        was_there = path.is_dir()
        try:
            path.mkdir(parents=True, exist_ok=True)
            if owner:
                probe = path / f".probe-{os.getpid()}"
                probe.write_bytes(b"")
                probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"--out must be a directory that can be written, got {path}: {error.strerror}"
            ) from None
        record, checkpoint = look_into(path, identity)
        if checkpoint is None:
            fresh = {"status": "running", "identity": dict(identity)}
            directory = cls(path, fresh, None, owner, was_there)
            directory._begin(settings)
            return directory
        directory = cls(path, record, checkpoint, owner, was_there)
        directory._lock_it()
        if owner:
            sweep(path)
            shutil.rmtree(path / STAGING_NAME, ignore_errors=True)
        return directory

    def _begin(self, settings: Mapping[str, Any]) -> None:
        """A new run, or one that was killed before its first checkpoint and starts over."""
        if not self.owner:
            return
        self._lock_it()
        self._take_away()
        save_config(settings, self.path / RESOLVED_NAME)
        self.write_record()

    def _lock_it(self) -> None:
        """Hold the directory while this process lives, where its file system can.

        Raises:
            ConfigError: another process holds it.
        """
        if not self.owner:
            return
        self._lock = os.open(self.path, os.O_RDONLY)
        if not locked(self._lock):
            self.release()
            raise ConfigError(
                f"--out must belong to one run, got {self.path} in which another process trains; "
                "wait for it, or choose another directory"
            )

    def release(self) -> None:
        """Let another process have the directory."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            self.release()

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After a failure without a checkpoint the directory is as it was, but for the logs of reporters."""
        failed = self.owner and kind is not None
        if failed and newest_checkpoint(self.path) is not None:
            shutil.rmtree(self.staging, ignore_errors=True)  # of no use, and the disk may be full
        elif failed:
            self._take_away()
            with contextlib.suppress(OSError):
                if any(entry.name != RECORD_NAME for entry in self.path.iterdir()):
                    return self.release()  # not empty: the record says that it may be started over
                (self.path / RECORD_NAME).unlink(missing_ok=True)
                if not self.was_there:
                    self.path.rmdir()
        self.release()

    def _take_away(self) -> None:
        """Remove what a run without a checkpoint wrote, except its record."""
        sweep(self.path)
        remove_fisher(self.path)
        shutil.rmtree(self.path / STAGING_NAME, ignore_errors=True)
        (self.path / RESOLVED_NAME).unlink(missing_ok=True)

    def require_same_run(self, facts: Mapping[str, Any]) -> None:
        """Record what decides the steps of a new run; compare it where a run continues.

        Raises:
            ConfigError: the run would be another one; names the difference and both values.
        """
        if self.checkpoint is not None:
            require_same_run(self.record.get("run", {}), facts)
        elif self.owner:
            self.write_record(run=dict(facts))

    def write_record(self, **updates: Any) -> None:
        """Update anneal.json atomically."""
        self.record |= updates
        atomic_write_json(self.path / RECORD_NAME, self.record, allow_nan=True)

    @property
    def staging(self) -> Path:
        """Where the result is written before it takes its place."""
        return self.path / STAGING_NAME

    def set_aside(self) -> Path:
        """Keep a result that must not be published where its owner finds it; returns the place."""
        place = self.path / UNPUBLISHED_NAME
        shutil.rmtree(place, ignore_errors=True)
        os.replace(self.staging, place)
        return place

    def publish(self, **record: Any) -> None:
        """Move the staged result into place, config.json last, and mark the run complete."""
        mask = os.umask(0)
        os.umask(mask)
        for file in sorted(path for path in self.staging.rglob("*") if path.is_file()):
            file.chmod(0o666 & ~mask)  # safetensors writes files that only their owner can read
            fsync_file(file)
        entries = sorted(self.staging.iterdir(), key=lambda path: (path.name == "config.json", path.name))
        for entry in entries:
            target = self.path / entry.name
            if target.is_dir():  # left by an interrupted publication
                shutil.rmtree(target)
            os.replace(entry, target)
        self.staging.rmdir()
        shutil.rmtree(self.path / UNPUBLISHED_NAME, ignore_errors=True)  # of an attempt that was refused
        fsync_directory(self.path)
        self.write_record(status="complete", **record)


def look_into(path: Path, identity: Mapping[str, Any]) -> tuple[dict[str, Any], Path | None]:
    """The record and the newest checkpoint of the interrupted run in `--out`, if there is one; nothing is written.

    Args:
        path: `--out`, which need not exist.
        identity: of the target cache.

    Raises:
        ConfigError: it is no directory, or holds something else, a finished run, or a run on another cache.
    """
    contents = []
    try:
        if path.exists():
            contents = sorted(entry.name for entry in path.iterdir())
        place = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            code = errno.EACCES if place.is_dir() else errno.ENOTDIR
            raise OSError(code, os.strerror(code))
    except OSError as error:
        raise ConfigError(
            f"--out must be a directory that can be written, got {path}: {error.strerror}"
        ) from None
    record = _read_record(path)
    if record is None and RECORD_NAME in contents and not read_record(path):
        raise ConfigError(
            f"--out must be new, empty or an interrupted run, got {path} whose {RECORD_NAME} is damaged; "
            "choose another directory"
        )
    if record is None and contents and contents != [RESOLVED_NAME]:
        raise ConfigError(
            f"--out must be new, empty or an interrupted run, got {path} which holds {contents[0]}"
            f"{' and more' if len(contents) > 1 else ''}; choose another directory"
        )
    if record is not None and record.get("status") == "complete":
        raise ConfigError(
            f"--out must be new, empty or an interrupted run, got {path} which holds a finished run; "
            "choose another directory"
        )
    checkpoint = newest_checkpoint(path)
    if checkpoint is None or record is None:
        return {}, None
    if record.get("identity") != dict(identity):
        raise ConfigError(
            "an interrupted run continues with its own cache, but --out holds a run on another "
            "one; use the same cache or another --out"
        )
    return record, checkpoint


def read_record(directory: Path) -> dict[str, Any]:
    """What the `anneal.json` of a run or a merged model says; empty where there is none that can be read."""
    return read_json_object(directory / RECORD_NAME)


def _read_record(path: Path) -> dict[str, Any] | None:
    record = read_record(path)
    return record if record.get("status") in STATUSES else None
