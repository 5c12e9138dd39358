"""Checking a whole cache, shard by shard: what to run on a cache from somebody else."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from formats.cache_row import ReadableCache
from formats.errors import CorruptShardError, FormatError

_BLOCK = 1 << 22


def validate(cache: ReadableCache, full: bool) -> None:
    """Every file is there with the right size, settings and row count; `full` reads every byte.

    With `full`, each shard's SHA-256 and each row's content key, payload checksum and contents are checked
    (draws inside the head too, for which reading does not look) and the manifest's counts are compared with
    what the rows hold. Cost: one sequential pass.

    Raises:
        FormatError: the first problem found.
    """
    for problem in problems(cache, full):
        raise problem


def problems(cache: ReadableCache, full: bool) -> Iterator[FormatError]:
    """What `validate` would raise, of every file: the first problem of each."""
    checks: list[Callable[[], Any]] = [partial(cache.file, name) for name in cache.manifest.files]
    checks += [partial(_validate_shard, cache, number, full) for number in range(len(cache.manifest.shards))]
    for check in checks:
        try:
            check()
        except FormatError as error:
            yield error


def _validate_shard(cache: ReadableCache, number: int, full: bool) -> None:
    info, reader = cache.manifest.shards[number], cache.shard(number)
    if not full:
        return
    digest = hashlib.sha256()
    source = reader.source
    for offset in range(0, source.size, _BLOCK):
        digest.update(source.read(offset, min(_BLOCK, source.size - offset)))
    if digest.hexdigest() != info.sha256:
        raise CorruptShardError(
            f"{info.name} does not match its SHA-256 in the manifest; copy or build it again"
        )
    counts = dict.fromkeys(("num_tokens", "num_positions", "num_entries", "num_payload_bytes"), 0)
    for index in range(len(reader)):
        tokens, payload = reader.row(index)
        _, teacher = reader.teacher(index)
        try:
            teacher.validate_draws()  # everything else was checked when the row was decoded
        except ValueError as error:
            raise CorruptShardError(f"{info.name}, row {index}: {error}") from None
        counts["num_tokens"] += len(tokens)
        counts["num_positions"] += len(teacher)
        counts["num_entries"] += teacher.num_entries
        counts["num_payload_bytes"] += len(payload)
    for name, value in counts.items():
        if value != getattr(info, name):
            raise CorruptShardError(
                f"{info.name}: {name} must be {getattr(info, name)} as in the manifest, got {value}"
            )
