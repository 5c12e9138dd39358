"""The directory of a run: what may be there at the start, and how the result gets its place in one go.

anneal.yaml          the resolved settings; with them the same run can be made again
anneal.json          status (`running`, `complete`), the cache's identity, step 0, the evaluation
checkpoint-N/        while the run goes on
unpublished/         a result that does not compute what the trained model does
config.json, model.safetensors, tokenizer.json, README.md ...   the result; config.json comes last, so that
                     nothing takes half a model for a model
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.disk.durable import atomic_write_bytes, fsync_directory, fsync_file
from formats.errors import ConfigError
from trainer.checkpoint import newest_checkpoint, sweep
from trainer.config_file import RESOLVED_NAME, parse_yaml, save_config
from trainer.recipe import RUNTIME_ARGUMENTS

RECORD_NAME = "anneal.json"
STAGING_NAME = ".result.staging"
UNPUBLISHED_NAME = "unpublished"
FREE_SETTINGS = frozenset(
    {"cache", "model", "out", "eval_caches", "keep_checkpoints", "save_dtype", "verify_saved"}
)
"""Settings that may change between an interrupted run and its continuation; caches and model are compared by
identity.
"""


def comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide what a run computes, flat."""
    flat = {key: value for key, value in settings.items() if key not in FREE_SETTINGS and key != "training"}
    for key, value in settings.get("training", {}).items():
        if not key.startswith(RUNTIME_ARGUMENTS):
            flat[f"training.{key}"] = value
    if flat.get("ewc"):  # its cache may have moved: the Fisher information remembers its identity
        flat["ewc"] = {k: v for k, v in flat["ewc"].items() if k != "cache"}
    flat["caches"] = [{k: v for k, v in cache.items() if k != "path"} for cache in settings.get("caches", [])]
    return flat


@dataclass
class RunDirectory:
    """An output directory that was found usable.

    Use `RunDirectory.open`.
    """

    path: Path
    """The directory."""
    record: dict[str, Any]
    """Contents of anneal.json."""
    checkpoint: Path | None = None
    """The newest complete checkpoint of an interrupted run."""

    @classmethod
    def open(cls, path: Path, settings: Mapping[str, Any], identity: Mapping[str, Any]) -> "RunDirectory":
        """Create the directory, or find an interrupted run of the same settings in it.

        Raises:
            ConfigError: it cannot be written, holds something else, a finished run, or a run of other
            settings.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            contents = sorted(entry.name for entry in path.iterdir())
            probe = path / f".probe-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"--out must be a directory that can be written, got {path}: {error.strerror}"
            ) from None
        if not contents or contents == [RESOLVED_NAME]:
            directory = cls(path, {"status": "running", "identity": dict(identity)})
            save_config(settings, path / RESOLVED_NAME)
            directory.write_record()
            return directory
        record = _read_record(path)
        if record is None:
            raise ConfigError(
                f"--out must be new, empty or an interrupted run, got {path} which holds {contents[0]}"
                f"{' and more' if len(contents) > 1 else ''}; choose another directory"
            )
        if record.get("status") == "complete":
            raise ConfigError(
                f"--out must be new, empty or an interrupted run, got {path} which holds a finished run; "
                "choose another directory"
            )
        before = comparable(parse_yaml((path / RESOLVED_NAME).read_text(encoding="utf-8"), RESOLVED_NAME))
        now = comparable(json.loads(json.dumps(dict(settings))))
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                raise ConfigError(
                    f"an interrupted run continues with its own settings, but {key} was "
                    f"{before.get(key)!r} and is "
                    f"{now.get(key)!r}; use the same settings or another --out"
                )
        if record.get("identity") != dict(identity):
            raise ConfigError(
                "an interrupted run continues with its own cache, but --out holds a run on another "
                "one; use the same cache or another --out"
            )
        sweep(path)
        shutil.rmtree(path / STAGING_NAME, ignore_errors=True)
        return cls(path, record, newest_checkpoint(path))

    def write_record(self, **updates: Any) -> None:
        """Update anneal.json atomically."""
        self.record |= updates
        text = json.dumps(self.record, indent=1, sort_keys=True, ensure_ascii=False)
        atomic_write_bytes(self.path / RECORD_NAME, text.encode())

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


def recorded_initial(model_dir: Path) -> str | None:
    """Fingerprint of the weights that a model was made from, by its `anneal.json`; None when it has none."""
    try:
        record = json.loads((model_dir / RECORD_NAME).read_text(encoding="utf-8"))
        return str(record["identity"]["teacher"]["weights"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((path / RECORD_NAME).read_text(encoding="utf-8"))
        return record if isinstance(record, dict) and (path / RESOLVED_NAME).is_file() else None
    except (OSError, ValueError):
        return None
