"""`anneal cache push` and `pull`: a cache as a data set repository on the Hugging Face Hub.

The files go up as they are, in one commit; a data set card is added so that people know what they look at. A
pulled cache is checked, every checksum and every row, before it appears under the name that was asked for; an
interrupted pull continues where it stopped. Credentials are those of `huggingface_hub` (`hf auth login`,
HF_TOKEN).
"""

import os
import shutil
from pathlib import Path
from typing import Any

from cache_builder.commit.build_directory import BuildDirectory, State
from formats.cache import TeacherCache
from formats.disk.durable import fsync_directory
from formats.disk.manifest import MANIFEST_NAME
from formats.errors import AnnealError, ConfigError, one_line
from formats.identity.teacher_identity import short
from formats.progress import Progress, format_bytes

CARD_NAME = "README.md"


class HubError(AnnealError):
    """The Hub could not be reached, or refused."""


def files_of(cache: TeacherCache) -> list[str]:
    """The files that make up a cache, and nothing that happens to lie beside them."""
    manifest = cache.manifest
    return [MANIFEST_NAME, *manifest.files, *(shard.name for shard in manifest.shards)]


def card_of(cache: TeacherCache) -> str:
    """The data set card: what this is, and how to use it."""
    identity, shards = cache.identity, cache.manifest.shards
    teacher, corpus = identity.teacher, identity.corpus
    rows = [
        ("teacher", teacher.get("name", teacher.get("architecture", "unknown"))),
        ("weights (SHA-256)", short(teacher.get("weights"))),
        ("engine", f"{teacher.get('engine', 'unknown')} {teacher.get('engine_version', '')}".strip()),
        ("corpus", corpus.get("source", "unknown")),
        ("rows", len(cache)),
        ("tokens", sum(shard.num_tokens for shard in shards)),
        ("positions", sum(shard.num_positions for shard in shards)),
        ("min_prob", cache.manifest.min_prob),
        ("max_k", cache.manifest.max_k),
        ("size", format_bytes(sum(shard.num_bytes for shard in shards))),
        ("identity", identity.digest()),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        "---\ntags:\n- anneal\n- distillation\n- logprobs\nviewer: false\n---\n\n# Teacher logprobs\n\n"
        "A cache of compressed teacher logprobs made by `anneal cache build`, for label annealing.\n\n"
        f"| | |\n|---|---|\n{table}\n\n```\nanneal cache pull REPOSITORY DIRECTORY\n"
        "anneal cache inspect DIRECTORY\nanneal train DIRECTORY --model MODEL --out OUT\n```\n"
    )


def push_cache(
    cache: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Teacher logprobs",
    progress: Progress | None = None,
) -> str:
    """Upload a complete cache to the data set repository `repo_id`, made if missing; returns the commit's
    URL.

    Raises:
        FormatError: `cache` is no complete cache, or damaged: nothing is uploaded.
        HubError: no access, no network, no such owner.
    """
    progress = progress or Progress()
    if "://" in str(cache):
        raise ConfigError(f"a cache to push must be a local directory, got {cache}")
    opened = TeacherCache(cache)
    progress.note(f"checking {len(opened.manifest.shards)} shards before they go up")
    opened.validate(full=True)
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(name, str(Path(cache) / name)) for name in files_of(opened)]
    operations.append(CommitOperationAdd(CARD_NAME, card_of(opened).encode()))
    try:
        api = HfApi(token=token)
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        result: Any = api.create_commit(
            repo_id, operations, repo_type="dataset", revision=revision, commit_message=message
        )
    except Exception as error:  # a dozen classes of requests and of the Hub, all meaning that it did not work
        raise HubError(
            f"the upload to {repo_id} must be possible, got: {one_line(error, whole=True)}"
        ) from error
    return str(result.commit_url)


def pull_cache(
    repo_id: str,
    out: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Download a cache from the data set repository `repo_id` into the new directory `out`, and check all of
    it.

    Raises:
        ConfigError: `out` holds something.
        HubError: no such repository, no access, no network.
        FormatError: what arrived is no cache, or damaged; it stays in the hidden directory beside `out`.
    """
    progress = progress or Progress()
    out = Path(out).expanduser()
    if BuildDirectory(out).state() is not State.EMPTY:
        raise ConfigError(f"a pull needs a new or empty directory, got {out}; choose another")
    from huggingface_hub import snapshot_download

    staging = out.with_name(f".{out.name}.pulling")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        snapshot_download(
            repo_id,
            repo_type="dataset",
            revision=revision,
            token=token,
            local_dir=staging,
            allow_patterns=[MANIFEST_NAME, "*.arrow", "*.json", CARD_NAME],
        )
    except Exception as error:
        raise HubError(
            f"{repo_id} must be a data set that can be downloaded, got: {one_line(error, whole=True)}"
        ) from error
    progress.note("checking what arrived")
    TeacherCache(staging).validate(full=True)
    shutil.rmtree(staging / ".cache", ignore_errors=True)
    try:
        if out.exists():
            out.rmdir()
        os.rename(staging, out)
        fsync_directory(out.parent)
    except OSError as error:
        raise ConfigError(f"a pull needs a directory that can be made, got {out}: {error.strerror}") from None
    return out
