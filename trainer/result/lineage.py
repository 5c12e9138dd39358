"""Which models a model descends from: read from its `anneal.json`, and continued in that of the next one.

    "lineage": [{"name": "base", "weights": "1f0c...", "cache": null}, {"name": "mA", "weights": ..., "cache": ...}]

Oldest first, the model that a run starts from last; `weights` is its fingerprint, `cache` the id of the cache
it was trained on. A cache that any of them built says something about the model, so it may evaluate it, and
KL may hold to it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from formats.errors import AnnealError
from formats.identity.fingerprint import ModelFingerprint
from formats.named_path import short_name
from trainer.checkpoint import is_complete
from trainer.result.run_directory import read_record


@dataclass(frozen=True)
class Ancestor:
    """One model of a lineage."""

    name: str
    """For people: the last part of the directory or hub name that it was given as."""
    weights: str
    """Fingerprint of its weights: what it is known by."""
    cache: str | None = None
    """Id of the cache on which it was trained; None for a model that this program did not make."""


def own_weights(model_dir: Path) -> str | None:
    """The fingerprint of a model's weights; None for adapters alone."""
    try:
        return ModelFingerprint.of(model_dir).weights
    except AnnealError:
        return None


def ancestors_of(model_dir: Path) -> list[Ancestor]:
    """What a model was made from by its record, oldest first; empty when it has none.

    A record without a lineage, of an earlier version, names the initial model in its identity.
    """
    record = _record_of(model_dir)
    found = [_entry(entry) for entry in _list(record.get("lineage"))]
    if "lineage" not in record:
        found.append(_entry(_mapping(_mapping(record.get("identity")).get("teacher"))))
    return [entry for entry in found if entry is not None]


def lineage_of(model_dir: Path, name: str) -> list[Ancestor]:
    """The lineage of what is made from this model: its ancestors and itself.

    Args:
        model_dir: a whole model.
        name: as given.

    Raises:
        ConfigError: it is not a model.
        FormatError: a weight file is torn.
    """
    cache = _record_of(model_dir).get("cache")
    itself = Ancestor(
        short_name(name), ModelFingerprint.of(model_dir).weights, None if cache is None else str(cache)
    )
    return joined([ancestors_of(model_dir), [itself]])


def joined(lineages: Iterable[Sequence[Ancestor]]) -> list[Ancestor]:
    """Several lineages as one, every model once, in the order in which they come."""
    found: dict[str, Ancestor] = {}
    for lineage in lineages:
        for entry in lineage:
            found.setdefault(entry.weights, entry)
    return list(found.values())


def known_teachers(model_dir: Path) -> dict[str, str]:
    """Fingerprint -> name of every model whose caches say something about this one, by its record: ancestors, and
    the teacher that it was distilled from. Empty when nothing is recorded.
    """
    anchor = _entry(_mapping(_record_of(model_dir).get("kl_to")))
    entries = [*ancestors_of(model_dir), *([anchor] if anchor is not None else [])]
    return {entry.weights: entry.name for entry in entries}


def to_record(lineage: Iterable[Ancestor]) -> list[dict[str, Any]]:
    """As `anneal.json` holds it."""
    return [asdict(entry) for entry in lineage]


def _record_of(model_dir: Path) -> dict[str, Any]:
    """The record of a model; of a checkpoint that of its run, which says where both come from."""
    record = read_record(model_dir)
    return record or (read_record(model_dir.resolve().parent) if is_complete(model_dir) else {})


def _entry(entry: Any) -> Ancestor | None:
    if not isinstance(entry, dict) or not entry.get("weights"):
        return None
    cache = entry.get("cache")
    name = short_name(entry.get("name") or str(entry["weights"])[:12])
    return Ancestor(name, str(entry["weights"]), None if cache is None else str(cache))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
