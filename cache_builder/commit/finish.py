"""The end of a build: read every shard back, write auxiliary files and the manifest, remove `_build/`.

One worker does this at a time (a claim); should two believe to hold it, both write the same bytes. A shard
whose bytes are not those that a worker noted when it wrote them is deleted and captured again; it never
reaches a manifest.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cache_builder.commit.build_directory import TOKENIZER_NAME, remove_build, shard_name
from cache_builder.commit.engine_record import identity_with_engine, read_engine
from cache_builder.commit.plan import Plan, Settings
from cache_builder.commit.shard_committer import Step, no_step, note_path
from formats.codec.payload import CodecConfig
from formats.disk.durable import atomic_write_bytes, fsync_directory
from formats.disk.manifest import MANIFEST_NAME, Manifest, ShardInfo


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_info(out: Path, plan: Plan, index: int) -> ShardInfo | None:
    """The counts of a committed shard; None if its bytes are not those that were written, or not those
    planned."""
    sha256 = file_sha256(out / shard_name(index))
    try:
        info = ShardInfo(**json.loads(note_path(out, index, sha256).read_text()))
    except FileNotFoundError:
        return None
    staged = plan.shards[index]
    same = (info.num_rows, info.num_tokens, info.num_positions) == (
        staged.num_rows,
        staged.num_tokens,
        staged.num_positions,
    )
    return info if same and info.sha256 == sha256 else None


def finish(
    out: Path, settings: Settings, plan: Plan, tokenizer_json: bytes | None, *, step: Step = no_step
) -> Manifest | list[int]:
    """Turn a directory with all its shards into a cache.

    Returns:
        The manifest; or the numbers of damaged shards, which have been deleted and must be captured again.

    Raises:
        OSError: the disk is full or fails; the directory is still an unfinished build.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        infos = list(pool.map(lambda index: shard_info(out, plan, index), range(len(plan.shards))))
    damaged = [index for index, info in enumerate(infos) if info is None]
    if damaged:
        # A note is also gone when another worker has just finished; it wrote the manifest first, so look for
        # that.
        if (out / MANIFEST_NAME).exists():
            return Manifest.read(out)
        for index in damaged:
            (out / shard_name(index)).unlink(missing_ok=True)
        fsync_directory(out)
        return damaged
    step("checked")
    record = read_engine(out)
    files = {}
    if tokenizer_json is not None:
        atomic_write_bytes(out / TOKENIZER_NAME, tokenizer_json)
        files[TOKENIZER_NAME] = hashlib.sha256(tokenizer_json).hexdigest()
        step("tokenizer")
    preprocessing = settings.identity.preprocessing
    manifest = Manifest(
        identity=identity_with_engine(settings.identity, record).to_dict(),
        codec=CodecConfig(**settings.codec),
        positions=settings.positions,
        min_prob=float(preprocessing["min_prob"]),
        max_k=min(int(preprocessing["max_k"]), int(record["vocab_size"])),
        vocab_size=int(record["vocab_size"]),
        shards=[info for info in infos if info is not None],
        files=files,
    )
    manifest.write(out)
    step("manifest")
    remove_build(out)
    step("removed")
    return manifest
