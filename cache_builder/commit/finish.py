"""The end of a build: read every shard back, write auxiliary files and the manifest, remove `_build/`.

One worker does this at a time (a claim); should two believe to hold it, both write the same bytes. A shard
whose bytes are not those that a worker noted when it wrote them is deleted and captured again; it never
reaches a manifest.
"""

import os
from concurrent.futures import ThreadPoolExecutor

from cache_builder.commit.build_directory import TOKENIZER_NAME, BuildDirectory
from cache_builder.commit.plan import BuildSettings, Plan, identity_with_counts
from cache_builder.commit.shard_committer import Step, no_step
from formats.codec.config import CodecConfig
from formats.disk.manifest import MANIFEST_NAME, Manifest


def finish(
    directory: BuildDirectory,
    settings: BuildSettings,
    plan: Plan,
    tokenizer_json: bytes | None,
    *,
    step: Step = no_step,
) -> Manifest | list[int]:
    """Turn a directory with all its shards into a cache.

    Returns:
        The manifest; or the numbers of damaged shards, which have been deleted and must be captured again.

    Raises:
        OSError: the disk is full or fails; the directory is still an unfinished build.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        infos = list(pool.map(lambda index: directory.committed(plan, index), range(len(plan.shards))))
    damaged = [index for index, info in enumerate(infos) if info is None]
    if damaged:
        # A note is also gone when another worker has just finished; it wrote the manifest first, so look for
        # that.
        if (directory.out / MANIFEST_NAME).exists():
            return Manifest.read(directory.out)
        directory.remove_shards(damaged)
        return damaged
    step("checked")
    engine = directory.read_engine()
    files = {}
    if tokenizer_json is not None:
        files[TOKENIZER_NAME] = directory.write_file(TOKENIZER_NAME, tokenizer_json)
        step("tokenizer")
    capture = settings.capture
    manifest = Manifest(
        identity=identity_with_counts(engine.completing(settings.identity), plan).to_dict(),
        codec=CodecConfig(**settings.codec),
        positions=capture.positions,
        min_prob=capture.min_prob,
        max_k=min(capture.max_k, engine.vocab_size),
        vocab_size=engine.vocab_size,
        shards=[info for info in infos if info is not None],
        files=files,
    )
    manifest.write(directory.out)
    step("manifest")
    directory.remove_working()
    step("removed")
    return manifest
