"""Rows of somebody's data set with their teacher's targets, joined by content: the tokens and which of them carry loss.

The order of the data set, its packing and the split over processes are the other trainer's. A row that the cache does
not hold is refused with the likely reason, or carries no KL (`on_missing: skip_kl`).

L: tokens of a row.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch.utils.data

from formats.cache import TeacherCache
from formats.disk.token_row import IGNORED, content_key
from formats.errors import ConfigError
from trainer.data.dataset import CachedDataset, Item, Unit, no_teacher, without_loss
from trainer.data.label_terms import no_terms
from trainer.objective import Choice

PREFIX = 8
"""Tokens by which a row that is cut elsewhere is recognised."""
KEPT_EXAMPLES = 200
"""Missing rows that are kept to find out why."""

COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids", "seq_lengths")
"""What is read of an example."""

Pair = tuple[np.ndarray, np.ndarray]
"""(token ids int64 [L], labels int64 [L], not shifted)."""


def segments(feature: Mapping[str, Any]) -> list[Pair]:
    """The rows of an example: itself without the padding that its `attention_mask` shows, or those that `seq_lengths`
    says are packed into it. Without labels every token is one.

    Raises:
        ConfigError: no tokens, lengths that do not fit together, or a mask or positions that ask for another attention
            than that of whole rows.
    """
    if feature.get("input_ids") is None:
        raise ConfigError(f"a row needs input_ids, got only {', '.join(sorted(feature)) or 'nothing'}")
    ids = np.asarray(feature["input_ids"], dtype=np.int64)
    labels = np.asarray(feature["labels"], dtype=np.int64) if feature.get("labels") is not None else ids
    lengths = feature.get("seq_lengths")
    lengths = [len(ids)] if lengths is None else [int(length) for length in lengths]
    if len(labels) != len(ids) or sum(lengths) != len(ids):
        raise ConfigError(
            f"a row's tokens, labels and seq_lengths must fit together, got {len(ids)} tokens, {len(labels)} labels "
            f"and lengths that sum to {sum(lengths)}"
        )
    if feature.get("seq_lengths") is None:
        tokens = _tokens_of_one_row(feature, len(ids))
        ids, labels = ids[tokens], labels[tokens]
        lengths = [len(ids)]
    bounds = np.cumsum([0, *lengths])
    return [(ids[start:stop], labels[start:stop]) for start, stop in pairwise(bounds) if stop > start]


def _tokens_of_one_row(feature: Mapping[str, Any], num_tokens: int) -> slice:
    """Where an example's tokens are, between padding; see that it is one row."""
    tokens = slice(0, num_tokens)
    mask, positions = feature.get("attention_mask"), feature.get("position_ids")
    if mask is not None and not (seen := np.asarray(mask) == 1).all():
        real = np.flatnonzero(seen)
        tokens = slice(int(real[0]), int(real[-1]) + 1) if len(real) else slice(0, 0)
        if len(mask) != num_tokens or not np.isin(mask, (0, 1)).all() or not seen[tokens].all():
            raise ConfigError(
                f"attention_mask must be 1 on a row's tokens and 0 on padding before or behind them, got another for "
                f"{num_tokens} tokens; rows that share a sequence need seq_lengths"
            )
    if positions is not None:
        counted = np.asarray(positions)[tokens]
        if (counted != np.arange(len(counted))).any():
            raise ConfigError(
                "position_ids must count a row's tokens from 0, got others; rows that share a sequence need seq_lengths"
            )
    return tokens


def mask_of(ids_L: np.ndarray, labels_L: np.ndarray) -> np.ndarray:
    """bool [L]: the tokens that carry loss; nothing predicts the first one.

    Raises:
        ConfigError: a label is neither its token nor -100.
    """
    mask = labels_L != IGNORED
    if (labels_L[mask] != ids_L[mask]).any():
        raise ConfigError(f"labels must be the tokens or {IGNORED}, got others; they are not shifted")
    mask[0] = False
    return mask


@dataclass
class Found:
    """How the rows of a data set were found in a cache."""

    num_rows: int = 0
    num_missing: int = 0
    missing: list[Pair] = field(default_factory=list)
    """Some of the missing ones, tokens and mask."""


class JoinedRows:
    """Turns examples of a prepared data set into items of `CachedDataset`.

    Args:
        dataset: the cache's rows, with temperature and objective; None for rows without a teacher.
        on_missing: `refuse`, or `skip_kl`: a row that the cache does not hold carries cross-entropy alone.
    """

    def __init__(self, dataset: CachedDataset | None, on_missing: str = "refuse") -> None:
        self.dataset, self.on_missing = dataset, on_missing
        self.temperature = 1.0 if dataset is None else dataset.temperature
        self.weighting = Choice("none") if dataset is None else dataset.objective.weighting

    def items(self, feature: Mapping[str, Any]) -> list[Item]:
        """The rows of one example.

        Raises:
            ConfigError: the cache does not hold one of them, or it is no row.
        """
        return [self._item(ids, labels) for ids, labels in segments(feature)]

    def _item(self, ids_L: np.ndarray, labels_L: np.ndarray) -> Item:
        mask = mask_of(ids_L, labels_L)
        index = self._index(ids_L, mask)
        if index is not None:
            assert self.dataset is not None
            return self.dataset[index]
        if self.dataset is not None and self.on_missing == "refuse" and mask.any():
            raise ConfigError(
                f"every row of the data set must be in the cache, got one of {len(ids_L)} tokens that "
                f"{self.dataset.name} does not hold; build the cache from these rows, or set on_missing: skip_kl"
            )
        return {
            "input_ids": ids_L.astype(np.int32),
            "labels": np.where(mask, ids_L, IGNORED).astype(np.int32),
            "temperature": self.temperature,
            **no_terms(self.weighting, len(ids_L)),
            **no_teacher(),
        }

    def _index(self, ids_L: np.ndarray, mask_L: np.ndarray) -> int | None:
        if self.dataset is None:
            return None
        try:
            return self.dataset.index_of(content_key(ids_L, mask_L))
        except KeyError:
            return None

    def find(self, rows: Iterable[Pair]) -> Found:
        """Look every row up, and decode none."""
        found = Found()
        for ids, labels in rows:
            found.num_rows += 1
            mask = mask_of(ids, labels)
            if self._index(ids, mask) is not None or not mask.any():  # without a target nothing is learnt
                continue
            found.num_missing += 1
            if len(found.missing) < KEPT_EXAMPLES:
                found.missing.append((ids, mask))
        return found


class JoinedDataset(torch.utils.data.Dataset[Any]):
    """Examples of a prepared data set by number, as the lists of items that they are, for evaluation.

    `dataset[unit]` takes a `Unit` of one number; a filler's items carry no loss.
    """

    def __init__(self, dataset: Any, rows: JoinedRows) -> None:
        self.dataset, self.rows = dataset, rows

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, unit: Unit) -> list[Item]:
        items = self.rows.items(self.dataset[unit[0]])
        return [without_loss(item) for item in items] if unit.is_filler else items


def rows_of(dataset: Any, rank: int = 0, world_size: int = 1) -> Iterator[Pair]:
    """The rows of a `datasets.Dataset` without decoding them to Python lists; of another iterable one by one.

    Args:
        rank, world_size: only every `world_size`-th example from `rank` on.
    """
    if (
        not hasattr(dataset, "select_columns")
        or not hasattr(dataset, "with_format")
        or not hasattr(dataset, "__len__")
        or dataset.format["type"] == "custom"  # `with_transform`: what is stored are not the rows
    ):
        for number, feature in enumerate(dataset):
            if number % world_size == rank:
                yield from segments(feature)
        return
    names = [name for name in COLUMNS if name in dataset.column_names]
    number = 0
    for table in dataset.select_columns(names).with_format("arrow").iter(1000):
        columns = {name: table.column(name).combine_chunks() for name in names}
        for at in range(table.num_rows):
            if number % world_size == rank:
                cells = {name: column[at].values for name, column in columns.items()}
                yield from segments(
                    {n: None if v is None else v.to_numpy(zero_copy_only=False) for n, v in cells.items()}
                )
            number += 1


def why_missing(cache: TeacherCache, missing: Sequence[Pair]) -> list[str]:
    """Likely reasons, each with how many of the (at most 200) rows it explains; reads the tokens of the whole cache."""
    wanted = {_digest(ids): (ids, mask) for ids, mask in missing}
    starts = {ids[:PREFIX].tobytes() for ids, _ in missing}
    other_mask: set[bytes] = set()
    alike: dict[bytes, list[np.ndarray]] = {}
    for index in range(len(cache)):
        ids = cache.tokens(index).input_ids.astype(np.int64)
        if (digest := _digest(ids)) in wanted:
            other_mask.add(digest)
        elif (start := ids[:PREFIX].tobytes()) in starts:
            alike.setdefault(start, []).append(ids)
    cut = 0
    for digest, (ids, _) in wanted.items():
        candidates = () if digest in other_mask else alike.get(ids[:PREFIX].tobytes(), ())
        cut += any(_one_begins_the_other(ids, row) for row in candidates)
    other = len(wanted) - len(other_mask) - cut
    reasons = (
        (
            len(other_mask),
            "its tokens with loss on others (completion_only_loss, assistant_only_loss, labels)",
        ),
        (cut, "its text cut elsewhere (max_length here, --max-length of the cache, an end token)"),
        (other, "no such text (other data, another chat template or tokenizer)"),
    )
    return [f"{count}: {reason}" for count, reason in reasons if count]


def _digest(ids_L: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(ids_L, "<i8").tobytes(), digest_size=16).digest()


def _one_begins_the_other(left: np.ndarray, right: np.ndarray) -> bool:
    length = min(len(left), len(right))
    return bool((left[:length] == right[:length]).all())
