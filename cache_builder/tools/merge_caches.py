"""`anneal cache merge`: one cache out of several of the same teacher.

All that decides the numbers must agree (teacher, tokenizer, preprocessing, codec); the corpora may differ.
Rows with a content key that came before are left out. A shard without such rows is copied as it is, byte for
byte; the others are written anew, which passes their rows through the codec once more.

Memory: 40 bytes per row.
"""

import contextlib
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cache_builder.commit.build_directory import DISCARD_NAME, BuildDirectory, State
from formats.cache import TeacherCache
from formats.disk.durable import TEMPORARY_SUFFIX, atomic_write_bytes
from formats.disk.manifest import Manifest, ShardInfo
from formats.disk.output_file import refuse_address
from formats.disk.shard import ShardReader, ShardWriter
from formats.disk.token_row import KEY_BYTES
from formats.errors import AnnealError, ConfigError, IdentityMismatchError
from formats.identity.fingerprint import sha256_json
from formats.identity.teacher_identity import DESCRIPTIVE, Difference, TeacherIdentity
from formats.progress import Progress, counted, format_bytes

MERGE_NAME = "merge"
CORPUS_LIKE = frozenset(
    {("preprocessing", key) for key in ("format", "text_column", "chat_template_kwargs", "template_time")}
)
"""Parts of the preprocessing that follow from the corpus; they may differ."""


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What was merged."""

    out: str
    """The new cache."""
    num_caches: int
    """Caches merged."""
    num_rows: int
    """Rows of the new cache."""
    num_duplicates: int
    """Rows left out because their content key came before."""
    num_bytes: int
    """Bytes of all shards."""
    num_copied: int
    """Shards copied as they were."""
    num_rewritten: int
    """Shards written anew without their duplicates."""

    def text(self) -> str:
        """A line or two."""
        return (
            f"{self.out}: {counted(self.num_rows, 'row')} from {self.num_caches} caches, "
            f"{counted(self.num_duplicates, 'duplicate')} left out, {format_bytes(self.num_bytes)} "
            f"({counted(self.num_copied, 'shard')} copied, {self.num_rewritten} rewritten)"
        )


def merge_caches(
    caches: Sequence[str | Path], out: str | Path, progress: Progress | None = None
) -> MergeReport:
    """Write the rows of all `caches`, in this order, to the new directory `out`.

    An interrupted merge starts again when the command is repeated; one that fails leaves nothing behind.

    Raises:
        IdentityMismatchError: two caches differ in more than their corpus; names the parts.
        ConfigError: fewer than two caches, or `out` holds something.
        FormatError: one of them is no cache, or damaged.
    """
    progress = progress or Progress()
    if len(caches) < 2:
        raise ConfigError(f"a merge takes at least two caches, got {len(caches)}")
    if remote := [str(path) for path in caches if "://" in str(path)]:
        raise ConfigError(f"merged caches must be local directories, got {remote[0]}; download it first")
    refuse_address("--out", out)
    opened = [TeacherCache(path) for path in caches]
    for other in opened[1:]:
        _require_mergeable(opened[0], other)
    try:
        return _merge(opened, BuildDirectory(Path(out).expanduser()), progress)
    except OSError as error:
        raise AnnealError(
            f"a merge must be able to write {out}, got {error.strerror or error} at {error.filename or out}; "
            "free some space and run the same command again"
        ) from error
    finally:
        progress.finish()


def _merge(opened: Sequence[TeacherCache], directory: BuildDirectory, progress: Progress) -> MergeReport:
    existed = directory.out.exists()
    _take_output(directory)
    try:
        return _joined(opened, directory, progress)
    except (AnnealError, OSError):
        with contextlib.suppress(OSError):  # what the next merge would throw away
            directory.discard()
            directory.leave_as_found(existed=existed)
        raise


def _joined(opened: Sequence[TeacherCache], directory: BuildDirectory, progress: Progress) -> MergeReport:
    keep = _first_occurrences(opened)
    shards: list[ShardInfo] = []
    num_copied = num_duplicates = 0
    progress.start("merge", sum(len(cache) for cache in opened))
    at = 0
    for cache in opened:
        for number, info in enumerate(cache.manifest.shards):
            mask = keep[at : at + info.num_rows]
            at += info.num_rows
            num_duplicates += int((~mask).sum())
            progress.advance(info.num_rows, info.num_tokens)
            if not mask.any():
                continue
            if mask.all():
                shards.append(_copy(Path(cache.path) / info.name, info, directory, len(shards)))
                num_copied += 1
            else:
                shards.append(_rewrite(cache.shard(number), mask, cache.manifest, directory, len(shards)))
    files = {}
    for name in opened[0].manifest.files:
        files[name] = directory.write_file(name, opened[0].file(name))
    identity = _merged_identity([cache.identity for cache in opened])
    replace(opened[0].manifest, identity=identity.to_dict(), shards=shards, files=files).write(directory.out)
    directory.remove_working()
    return MergeReport(
        out=str(directory),
        num_caches=len(opened),
        num_rows=int(keep.sum()),
        num_duplicates=num_duplicates,
        num_bytes=sum(shard.num_bytes for shard in shards),
        num_copied=num_copied,
        num_rewritten=len(shards) - num_copied,
    )


def _require_mergeable(first: TeacherCache, other: TeacherCache) -> None:
    differences = first.identity.differences(
        other.identity, ("teacher", "tokenizer", "preprocessing"), ignore=CORPUS_LIKE
    )
    a, b = first.manifest, other.manifest
    pairs: dict[str, tuple[Any, Any]] = {
        name: (getattr(a, name), getattr(b, name))
        for name in ("positions", "min_prob", "max_k", "vocab_size")
    }
    one, another = a.codec.to_dict(), b.codec.to_dict()
    pairs |= {f"codec.{key}": (one.get(key), another.get(key)) for key in {**one, **another}}
    differences += [Difference("manifest", name, x, y) for name, (x, y) in pairs.items() if x != y]
    if differences:
        raise IdentityMismatchError(
            "merged caches must be equal in all but their corpus, "
            f"but {other.path} differs from {first.path} in "
            + "; ".join(f"{d.section}.{d.key}: {d.recorded!r} and {d.given!r}" for d in differences)
            + ". Build them with the same model and settings"
        )


def _take_output(directory: BuildDirectory) -> None:
    state = directory.state()
    marker = directory.working / MERGE_NAME
    if marker.exists() or (state is State.UNFINISHED and _is_nobodys(directory)):
        directory.discard()  # of a merge that was interrupted, at its very beginning or after its manifest too
    elif state is not State.EMPTY:
        raise ConfigError(
            f"a merge needs a new or empty directory, got {directory}, which holds {state.value}"
        )
    directory.prepare()
    atomic_write_bytes(marker, b"")


def _is_nobodys(directory: BuildDirectory) -> bool:
    """Whether an unfinished directory says of no build and no merge that it is its own: what made it, or was taking it
    away, was killed.
    """
    left = {path.name for path in directory.working.iterdir() if path.suffix != TEMPORARY_SUFFIX}
    return left <= {DISCARD_NAME}


def _first_occurrences(caches: Sequence[TeacherCache]) -> np.ndarray:
    """bool [rows of all caches]: the content key did not occur before."""
    parts = [cache.shard(n).keys() for cache in caches for n in range(len(cache.manifest.shards))]
    flat = np.ascontiguousarray(np.concatenate(parts)) if parts else np.zeros((0, KEY_BYTES), np.uint8)
    _, first = np.unique(flat.view([("high", ">u8"), ("low", ">u8")]).ravel(), return_index=True)
    keep = np.zeros(len(flat), np.bool_)
    keep[first] = True
    return keep


def _copy(source: Path, info: ShardInfo, directory: BuildDirectory, index: int) -> ShardInfo:
    temporary = directory.working / directory.shard_path(index).name
    shutil.copyfile(source, temporary)
    with open(temporary, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != info.sha256:
        raise AnnealError(f"{source} does not match its SHA-256 in the manifest; copy or build it again")
    directory.commit_shard(index, temporary)
    return replace(info, name=temporary.name)


def _rewrite(
    reader: ShardReader, mask: np.ndarray, manifest: Manifest, directory: BuildDirectory, index: int
) -> ShardInfo:
    temporary = directory.working / directory.shard_path(index).name
    writer = ShardWriter(
        temporary,
        vocab_size=manifest.vocab_size,
        positions=manifest.positions,
        max_k=manifest.max_k,
        codec=manifest.codec,
        stored=True,
    )
    for row in np.flatnonzero(mask):
        writer.append(*reader.teacher(int(row)))
    info = writer.close(temporary.name)
    directory.commit_shard(index, temporary)
    return info


def _merged_identity(identities: Sequence[TeacherIdentity]) -> TeacherIdentity:
    """The first identity with the corpora as a list and one fingerprint over theirs."""
    corpora = [dict(identity.corpus) for identity in identities]
    data = identities[0].to_dict()
    data["corpus"] = {
        "source": " + ".join(str(corpus.get("source", "unknown")) for corpus in corpora),
        "fingerprint": sha256_json([corpus.get("fingerprint") for corpus in corpora]),
        "merged": [
            {key: value for key, value in corpus.items() if ("corpus", key) not in DESCRIPTIVE}
            for corpus in corpora
        ],
    }
    ours = [corpus for corpus in corpora if _num_records(corpus) is not None or _is_generated(corpus)]
    if len(ours) == len(corpora):
        numbers = [number for corpus in ours if (number := _num_records(corpus)) is not None]
        if numbers:
            data["corpus"]["counts"] = {"num_records": sum(numbers)}
        data["corpus"]["notes"] = [
            f"{corpus.get('source', 'unknown')}: {note}"
            for corpus in corpora
            for note in corpus.get("notes") or ()
        ]
    for _, key in CORPUS_LIKE:
        values = [identity.preprocessing.get(key) for identity in identities]
        if len({str(value) for value in values}) > 1:
            data["preprocessing"][key] = values
    return TeacherIdentity.from_dict(data)


def _num_records(corpus: Mapping[str, Any]) -> int | None:
    """How many records a build counted: what others write there is theirs, and not added up."""
    counts = corpus.get("counts")
    number = counts.get("num_records") if isinstance(counts, dict) and _has_notes(corpus) else None
    return number if type(number) is int else None


def _is_generated(corpus: Mapping[str, Any]) -> bool:
    """Whether the model wrote the rows, of this cache or of those that it was merged from."""
    merged = corpus.get("merged")
    if isinstance(merged, list):
        return all(isinstance(part, dict) and _is_generated(part) for part in merged)
    return _has_notes(corpus) and "generate" in corpus


def _has_notes(corpus: Mapping[str, Any]) -> bool:
    return isinstance(corpus.get("notes") or [], list)
