"""The restoring text: of all rows those that the initial model finds easiest, until a number of tokens is reached.

Zhang et al. 2024 rank passages by perplexity, lowest first, so that the text is like what the model was pretrained on.
Ties and equal rows keep their order, so the same text is chosen everywhere.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from formats.cache import TeacherCache
from formats.disk.durable import atomic_write_bytes, read_json_object
from formats.errors import AnnealError, ConfigError
from formats.writer import CacheWriter

NOTE = "text.json"


def easiest(ce_N: np.ndarray, tokens_N: np.ndarray, lengths_N: np.ndarray, num_tokens: int) -> list[int]:
    """Numbers of the rows of lowest cross-entropy per token, in ascending order of it.

    Args:
        ce_N: [N] sum over the row's tokens, in nats.
        tokens_N: [N] tokens that carry loss; rows without any are left out.
        lengths_N: [N] tokens that the row costs in training.
        num_tokens: rows are taken until they have as many.
    """
    usable = np.flatnonzero(tokens_N > 0)
    order = usable[np.argsort((ce_N[usable] / tokens_N[usable]), kind="stable")]
    return up_to(order, lengths_N, num_tokens)


def drawn(tokens_N: np.ndarray, lengths_N: np.ndarray, num_tokens: int, seed: int) -> list[int]:
    """The same of rows in random order."""
    usable = np.flatnonzero(tokens_N > 0)
    return up_to(np.random.default_rng(seed).permutation(usable), lengths_N, num_tokens)


def up_to(order: np.ndarray, lengths_N: np.ndarray, num_tokens: int) -> list[int]:
    """The first rows whose tokens reach `num_tokens`; all of them where there are fewer."""
    reached = np.cumsum(lengths_N[order])
    count = int(np.searchsorted(reached, num_tokens)) + 1
    return [int(row) for row in order[:count]]


def write_rows(cache: TeacherCache, rows: list[int], place: Path, note: Mapping[str, Any]) -> None:
    """A cache of some rows of another one, in their order there; nothing is done where it is there already, whole.

    Raises:
        ConfigError: there are no rows, or the place holds another choice.
    """
    if not rows:
        raise ConfigError(f"--text needs rows with tokens that carry loss, got none in {cache.path}")
    now = {**note, "rows": sorted(rows), "cache": cache.digest}
    text = json.dumps(now, sort_keys=True)
    path = place.with_name(NOTE)
    before = read_json_object(path)  # what a call before this one chose
    if before and before != now:
        raise ConfigError(
            f"a restoring keeps its text, but {path} says that another one was chosen; use another --out"
        )
    if before and _is_whole(place):
        return
    shutil.rmtree(place, ignore_errors=True)  # of a call that was killed, or damaged
    manifest = cache.manifest
    with CacheWriter(
        place,
        identity=cache.identity.to_dict(),
        vocab_size=manifest.vocab_size,
        positions=manifest.positions,
        min_prob=manifest.min_prob,
        max_k=manifest.max_k,
        codec=manifest.codec,
        stored=True,
    ) as writer:
        for name in manifest.files:
            writer.add_file(name, cache.file(name))
        for row in sorted(rows):
            found = cache[row]
            writer.append(found.tokens, found.teacher)
    atomic_write_bytes(path, text.encode() + b"\n")


def _is_whole(place: Path) -> bool:
    try:
        TeacherCache(place).validate()
    except (AnnealError, OSError):
        return False
    return True
