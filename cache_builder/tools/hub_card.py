"""The data set card of a cache on the Hugging Face Hub: front matter that opens the shards, and what this is.

What `anneal cache push` writes into a card is a part of its text, between two comments, and of its front matter the
configuration `teacher-cache`, and the tags and the base model that it lacks. Everything else of a card that is there
already, by whomever, stays.
"""

from collections.abc import Mapping
from typing import Any

from formats.cache import TeacherCache
from formats.errors import AnnealError, FormatError
from formats.front_matter import CARD_NAME, join_card, split_card, table_cell, with_section
from formats.identity.teacher_identity import short
from formats.progress import format_bytes

CONFIG_NAME = "teacher-cache"
TAGS = ("anneal", "distillation", "knowledge-distillation", "logprobs", "teacher-logits")
BEGIN = "<!-- written by anneal cache push, and written anew by the next one -->"
END = "<!-- end of what anneal cache push wrote -->"


class HubError(AnnealError):
    """The Hub could not be reached, or refused, or holds what cannot be worked with."""


def card_of(
    cache: TeacherCache, repo_id: str = "REPOSITORY", *, base_model: str | None = None, existing: str = ""
) -> str:
    """The card of this cache.

    Args:
        repo_id: where it goes, for the commands on it.
        base_model: the teacher's name on the Hub; None where it has none.
        existing: the card that is there, which is amended.

    Raises:
        HubError: the front matter of `existing` cannot be read.
    """
    try:
        front, body = split_card(existing)
    except FormatError as error:
        raise HubError(f"{error}; mend it on the Hub") from None
    configs = front.get("configs") or []
    tags = front.get("tags") or []
    if not isinstance(configs, list) or not isinstance(tags, list):
        raise HubError(
            f"{CARD_NAME} must have lists of configs and tags, got something else; mend it on the Hub"
        )
    others = [entry for entry in configs if not _is_ours(entry)]
    front["configs"] = [*others, config_of(cache)]
    front["tags"] = [*tags, *(tag for tag in TAGS if tag not in tags)]
    named = front.get("base_model") or []
    models = named if isinstance(named, list) else [named]
    if base_model is not None and base_model not in models:
        front["base_model"] = [*models, base_model] if models else base_model
    return join_card(front, with_section(body, BEGIN, END, _section(cache, repo_id, base_model)))


def config_of(cache: TeacherCache) -> dict[str, Any]:
    """What the viewer and `datasets` open: the shards of the manifest by name, and no file that lies beside them."""
    shards = [shard.name for shard in cache.manifest.shards]
    return {"config_name": CONFIG_NAME, "data_files": [{"split": "train", "path": shards}]}


def _is_ours(entry: Any) -> bool:
    return isinstance(entry, Mapping) and entry.get("config_name") == CONFIG_NAME


def _section(cache: TeacherCache, repo_id: str, base_model: str | None) -> str:
    identity, manifest = cache.identity, cache.manifest
    teacher, corpus = identity.teacher, identity.corpus
    name = teacher.get("name", teacher.get("architecture", "unknown"))
    rows = [
        ("teacher", f"[{base_model}](https://huggingface.co/{base_model})" if base_model else name),
        ("revision", teacher.get("revision") or "not given"),
        ("weights (SHA-256)", short(teacher.get("weights"))),
        ("engine", f"{teacher.get('engine', 'unknown')} {teacher.get('engine_version', '')}".strip()),
        ("corpus", corpus.get("source", "unknown")),
        ("rows", len(cache)),
        ("tokens", manifest.num_tokens),
        ("positions", manifest.num_positions),
        ("min_prob", manifest.min_prob),
        ("max_k", manifest.max_k),
        ("size", format_bytes(manifest.num_bytes)),
        ("identity", identity.digest()),
    ]
    table = "\n".join(f"| {key} | {table_cell(value)} |" for key, value in rows)
    return (
        "# Teacher logprobs\n\n"
        "A cache of compressed teacher logprobs made by `anneal cache build`, for label annealing and distillation.\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        "Columns: `key` (a hash of the row), `input_ids`, `loss_mask` (which tokens are targets) and `payload`, the "
        "teacher's distributions, compressed, which `anneal` reads. To train with them, or to have them as plain "
        "columns:\n\n"
        f"```\nanneal cache pull {repo_id} DIRECTORY\nanneal cache inspect DIRECTORY\n"
        "anneal train DIRECTORY --model MODEL --out OUT\n"
        "anneal cache export DIRECTORY --layout topk --parquet FILE\n```\n"
    )
