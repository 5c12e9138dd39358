"""bench.json: the results of one model, tied to its weights, each to every setting that made it.

MODEL/bench.json            all results, one entry per task and settings
MODEL/bench/*.parquet       the items of each entry

Results of other weights are never mixed in: when the model has changed, the old file is set aside under a name of
its own, with its items, and taken back when the old weights are. Several processes may add to one model: `bench` is
locked while one reads and writes.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from formats.disk.durable import atomic_write_bytes, one_at_a_time, temporary_name
from formats.errors import ConfigError, FormatError, IdentityMismatchError
from formats.identity.fingerprint import sha256_json
from trainer.bench.samples import Samples, read_samples

BENCH_NAME = "bench.json"
SAMPLES_DIRECTORY = "bench"
FORMAT = 1


@dataclass(frozen=True)
class BenchEntry:
    """One task under one set of settings."""

    task: str
    settings: dict[str, Any]
    """Everything that must be equal for two results to be comparable."""
    metrics: dict[str, dict[str, Any]]
    """`metric,filter` -> value, stderr (None if it has none), higher_is_better."""
    primary: str
    """The `metric,filter` that says whether an item is right, else the first one."""
    num_items: int
    num_truncated: int
    """Items whose prompt was longer than the model's context and was cut at its left."""
    samples: str
    """File of the items, relative to bench.json."""
    samples_sha256: str
    about: dict[str, Any] = field(default_factory=dict)
    """For the reader, not compared: seconds, batch size, versions of the engines."""

    @property
    def key(self) -> str:
        """Hash of the task and its settings."""
        return entry_key(self.task, self.settings)


def entry_key(task: str, settings: Mapping[str, Any]) -> str:
    """Hash of a task and its settings."""
    return sha256_json([task, dict(settings)])


def aside_name(model: Mapping[str, str]) -> str:
    """Where the results of a model are while its directory holds other weights."""
    return f"bench-{sha256_json(dict(model))[:12]}.json"


@dataclass
class BenchFile:
    """The results in one directory. Use `open_for` to add to them and `load_bench` to read them."""

    directory: Path
    model: dict[str, str]
    """`model_identity` of the model."""
    entries: dict[str, BenchEntry]
    """Key -> entry."""

    @classmethod
    def open_for(cls, directory: Path, model: Mapping[str, str]) -> tuple["BenchFile", Path | None]:
        """Results of these weights, empty if there are none, and where results of other weights were put.

        Those that were set aside before are taken back.

        Raises:
            ConfigError: the directory cannot be written.
            FormatError: bench.json is not ours.
        """
        try:
            (directory / SAMPLES_DIRECTORY).mkdir(parents=True, exist_ok=True)
            probe = temporary_name(directory / BENCH_NAME)
            probe.write_bytes(b"")
            probe.unlink()
            with one_at_a_time(directory / SAMPLES_DIRECTORY):
                return cls._opened(directory, dict(model))
        except OSError as error:
            raise ConfigError(
                f"results are written into the model's directory, got {directory}: {error.strerror}; "
                "name another one with --out"
            ) from None

    @classmethod
    def _opened(cls, directory: Path, model: dict[str, str]) -> tuple["BenchFile", Path | None]:
        path, aside = directory / BENCH_NAME, None
        if path.is_file():
            found = cls.read(directory)
            if found.model == model:
                return found, None
            aside = directory / aside_name(found.model)
            path.replace(aside)
        kept = directory / aside_name(model)
        if kept.is_file():
            kept.replace(path)
            return cls.read(directory), aside
        return cls(directory, model, {}), aside

    @classmethod
    def read(cls, directory: Path, name: str = BENCH_NAME) -> "BenchFile":
        """Read bench.json, of whatever weights, or results that were set aside under another name.

        Raises:
            FormatError: missing, or not ours.
        """
        path = directory / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise FormatError(
                    f"bench.json must have format {FORMAT}, got {content['format']} in {path}; "
                    "use the version of anneal that wrote it"
                )
            entries = [BenchEntry(**entry) for entry in content["results"]]
            return cls(directory, dict(content["model"]), {entry.key: entry for entry in entries})
        except FileNotFoundError:
            raise FormatError(
                f"a model needs results to be compared, got no {BENCH_NAME} in {directory}; run anneal bench"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"{path} must be a result of anneal bench, got {error}; move it away") from None

    def samples_of(self, task: str, settings: Mapping[str, Any]) -> str:
        """Where the items of a task belong, relative to bench.json: of these weights alone."""
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in task)
        return (
            f"{SAMPLES_DIRECTORY}/{name}.{sha256_json([self.model, entry_key(task, settings)])[:12]}.parquet"
        )

    def add(self, entry: BenchEntry, samples: bytes) -> None:
        """Write the items, then the results with the new entry; a kill in between leaves the old results.

        Where another process has set these weights' results aside meanwhile, they go there.
        """
        target = self.directory / entry.samples
        target.parent.mkdir(exist_ok=True)
        with one_at_a_time(target.parent):
            atomic_write_bytes(target, samples)
            name = BENCH_NAME
            if (self.directory / name).is_file() and BenchFile.read(self.directory).model != self.model:
                name = aside_name(self.model)
            if (self.directory / name).is_file():  # another process may have added to it
                self.entries = {**BenchFile.read(self.directory, name).entries, **self.entries}
            self.entries[entry.key] = entry
            content = {
                "format": FORMAT,
                "model": self.model,
                "results": [asdict(entry) for entry in self.entries.values()],
            }
            text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
            atomic_write_bytes(self.directory / name, text.encode())

    def complete(self, key: str) -> BenchEntry | None:
        """The entry of a key, if its items are still there, whole."""
        entry = self.entries.get(key)
        try:
            data = (self.directory / entry.samples).read_bytes() if entry else b""
        except OSError:
            return None
        return entry if entry and hashlib.sha256(data).hexdigest() == entry.samples_sha256 else None

    def samples(self, entry: BenchEntry, filter_name: str) -> Samples:
        """The items of an entry.

        Raises:
            FormatError: they are missing or not those of the entry.
        """
        if self.complete(entry.key) is None:
            raise FormatError(
                f"the items of {entry.task} must be those of bench.json, got another or no file "
                f"{self.directory / entry.samples}; run anneal bench again"
            )
        return read_samples(self.directory / entry.samples, filter_name)


def require_fresh(results: BenchFile, model: Mapping[str, str], name: str) -> None:
    """Refuse results that were measured on another model than the one on disk now.

    Raises:
        IdentityMismatchError: naming what has changed.
    """
    changed = [key for key in model if results.model.get(key) != model[key]]
    if changed:
        key = changed[0]
        raise IdentityMismatchError(
            f"{results.directory / BENCH_NAME}: results must be of the weights on disk, got {key} "
            f"{str(results.model.get(key))[:12]} while {name} now has {model[key][:12]}; run anneal bench again"
        )
