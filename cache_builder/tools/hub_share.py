"""`anneal cache push` and `pull`: a cache as a data set repository on the Hugging Face Hub.

The files go up as they are, in one commit; a data set card (hub_card.py) is added or amended, so that people know
what they look at and the Hub's viewer opens the shards. A pulled cache is checked, every checksum and every row,
before it appears under the name that was asked for; an interrupted pull continues where it stopped. Credentials are
those of `huggingface_hub` (`hf auth login`, HF_TOKEN).
"""

import os
import shutil
from pathlib import Path
from typing import Any

from cache_builder.commit.build_directory import BuildDirectory, State
from cache_builder.tools.hub_card import HubError, card_of
from formats.cache import TeacherCache
from formats.disk.durable import fsync_directory
from formats.disk.manifest import MANIFEST_NAME
from formats.disk.output_file import refuse_address
from formats.errors import AnnealError, ConfigError, one_line
from formats.front_matter import CARD_NAME, HUB_NAME
from formats.progress import Progress, counted

PULLING = ".pulling"
"""Name, or end of the name, of the directory that a cache arrives in."""


def files_of(cache: TeacherCache) -> list[str]:
    """The files that make up a cache, and nothing that happens to lie beside them."""
    manifest = cache.manifest
    return [MANIFEST_NAME, *manifest.files, *(shard.name for shard in manifest.shards)]


def push_cache(
    cache: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Teacher logprobs",
    base_model: str | None = None,
    progress: Progress | None = None,
) -> str:
    """Upload a complete cache to the data set repository `repo_id`, made if missing; returns the commit's
    URL. A card that is there keeps what others wrote in it.

    Args:
        base_model: the teacher's name on the Hub, for a link to it; None takes the name that the cache was built with
            if it is no directory here and the Hub has such a model.

    Raises:
        ConfigError: `base_model` is no name of a repository; `cache` is not local.
        FormatError: `cache` is no complete cache, or damaged: nothing is uploaded.
        HubError: no access, no network, no such owner; a card that cannot be read.
    """
    progress = progress or Progress()
    if "://" in str(cache):
        raise ConfigError(f"a cache to push must be a local directory, got {cache}")
    if base_model is not None and not HUB_NAME.fullmatch(base_model):
        raise ConfigError(f"--base-model must be a name on the Hub, such as owner/model, got {base_model!r}")
    opened = TeacherCache(cache)
    progress.note(f"checking {counted(len(opened.manifest.shards), 'shard')} before they go up")
    opened.validate(full=True)
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(name, str(Path(cache) / name)) for name in files_of(opened)]
    try:
        api = HfApi(token=token)
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        card = card_of(
            opened,
            repo_id,
            base_model=base_model or _teacher_on_the_hub(api, opened),
            existing=_card_there(api, repo_id, revision),
        )
        operations.append(CommitOperationAdd(CARD_NAME, card.encode()))
        result: Any = api.create_commit(
            repo_id, operations, repo_type="dataset", revision=revision, commit_message=message
        )
    except HubError:
        raise
    except Exception as error:  # a dozen classes of requests and of the Hub, all meaning that it did not work
        raise HubError(
            f"the upload to {repo_id} must be possible, got: {one_line(error, whole=True)}"
        ) from error
    return str(result.commit_url)


def _card_there(api: Any, repo_id: str, revision: str | None) -> str:
    """The card of the repository, "" if it has none."""
    if not api.file_exists(repo_id, CARD_NAME, repo_type="dataset", revision=revision):
        return ""
    path = api.hf_hub_download(repo_id, CARD_NAME, repo_type="dataset", revision=revision)
    return Path(path).read_text(encoding="utf-8")


def _teacher_on_the_hub(api: Any, cache: TeacherCache) -> str | None:
    """The name that the cache was built with, if it is one of the Hub's: the directory `models/mine` looks like one."""
    name = str(cache.identity.teacher.get("name", ""))
    if not HUB_NAME.fullmatch(name) or Path(name).exists() or not api.repo_exists(name):
        return None
    return name


def pull_cache(
    repo_id: str,
    out: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Download a cache from the data set repository `repo_id` into the new directory `out`, and check all of
    it. Other files of the repository are left there.

    Raises:
        ConfigError: `out` holds something.
        HubError: no such repository, no access, no network; a repository without a cache.
        FormatError: what arrived is no cache, or damaged; it stays in the hidden directory beside `out`, or within an
            empty `out` that was there.
    """
    progress = progress or Progress()
    refuse_address("a pull's DIRECTORY", out)
    out = Path(out).expanduser().resolve()
    inside = out / PULLING
    if not inside.is_dir() and BuildDirectory(out).state() is not State.EMPTY:
        raise ConfigError(f"a pull needs a new or empty directory, got {out}; choose another")
    from huggingface_hub import HfApi, snapshot_download

    # An empty directory may be one that cannot be replaced: a mount, or where the shell is.
    staging = inside if out.is_dir() else out.with_name(f".{out.name}{PULLING}")
    try:
        found = HfApi(token=token).dataset_info(repo_id, revision=revision)
        if MANIFEST_NAME not in {file.rfilename for file in found.siblings or ()}:
            raise HubError(f"{repo_id} must hold a cache, got a data set without a {MANIFEST_NAME}")

        def fetch(names: list[str]) -> None:
            snapshot_download(
                repo_id,
                repo_type="dataset",
                revision=found.sha,  # of one commit, whatever is pushed meanwhile
                token=token,
                local_dir=staging,
                allow_patterns=names,
            )

        out.parent.mkdir(parents=True, exist_ok=True)
        fetch([MANIFEST_NAME])
        names = [*files_of(TeacherCache(staging)), CARD_NAME]
        fetch(names)
    except AnnealError:
        raise
    except Exception as error:
        raise HubError(
            f"{repo_id} must be a data set that can be downloaded, got: {one_line(error, whole=True)}"
        ) from error
    progress.note("checking what arrived")
    TeacherCache(staging).validate(full=True)
    for path in staging.iterdir():  # the client's own, and of an interrupted pull of something else
        if path.name not in names:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    try:
        if staging == inside:
            for path in sorted(staging.iterdir(), key=lambda path: path.name == MANIFEST_NAME):
                os.rename(path, out / path.name)
            staging.rmdir()
            fsync_directory(out)
        else:
            os.rename(staging, out)
            fsync_directory(out.parent)
    except OSError as error:
        raise ConfigError(f"a pull needs a directory that can be made, got {out}: {error.strerror}") from None
    return out
