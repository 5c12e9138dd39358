"""Records of ready token ids: padding out, masks joined, and nothing that describes several sequences.

N: tokens of a record.
"""

from dataclasses import dataclass

import numpy as np

from cache_builder.corpus.fields import names
from cache_builder.corpus.readers import Record
from cache_builder.corpus.values import integers_of, sequence_of
from formats.disk.token_row import IGNORED
from formats.errors import CorpusError

READ_COLUMNS = names(
    "labels",
    "masks",
    "token weights",
    "attention_mask",
    "position_ids",
    "sequence lengths",
    "segment ids",
    "cumulative lengths",
    "token_type_ids",
)
"""Columns beside input_ids that are honoured, or refused for their values."""
MASKS = names("labels", "masks", "token weights")
"""Those that choose targets."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Ready token ids."""

    input_ids: np.ndarray
    """int64 [N]."""
    loss_mask: np.ndarray | None
    """bool [N]; None makes every token but the first a target."""
    where: str


def tokens_of(record: Record, vocab_size: int) -> Tokens:
    """Ready ids, padding taken out. Labels stand at the token they name (unshifted), as in `transformers`.

    Raises:
        CorpusError: an id outside the vocabulary, a column of another length, or one that asks for something
            that a row cannot express: several sequences, weights, another attention.
    """
    ids = integers_of(record, "input_ids")
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        raise CorpusError(
            f"input_ids must lie in 0..{vocab_size - 1} (the tokenizer's vocabulary), got {ids.min()} to "
            f"{ids.max()} in {record.where}; tokenise the corpus with this model's tokenizer"
        )
    used = _attended(record, ids)
    mask: np.ndarray | None = None
    for name in MASKS:
        if _is_there(record.values.get(name)):
            targets = _labelled(record, ids) if name == "labels" else _ones(record, name, len(ids))
            mask = targets if mask is None else mask & targets
    if mask is not None and (mask & ~used).any():
        raise CorpusError(
            f"padding carries no loss, got targets where attention_mask is 0 in {record.where}; give them the label "
            f"{IGNORED} (in a mask 0), or drop the padding"
        )
    _refuse_several_sequences(record, used)
    for name in names("token_type_ids"):
        if _is_there(record.values.get(name)) and _column(record, name, len(ids))[used].any():
            raise CorpusError(
                f"{name} must be zeros, got others in {record.where}; they change the attention, which "
                "a text model does not have"
            )
    return Tokens(ids[used], None if mask is None else mask[used], record.where)


def _is_there(value: object) -> bool:
    """An empty list is one: it must be as long as the ids. An empty cell of a CSV file is none."""
    return value is not None and not (isinstance(value, str) and not value)


def _column(record: Record, name: str, length: int) -> np.ndarray:
    values = integers_of(record, name)
    if len(values) != length:
        raise CorpusError(
            f"{name} must be as long as input_ids ({length}), got {len(values)} in {record.where}"
        )
    return values


def _labelled(record: Record, ids: np.ndarray) -> np.ndarray:
    labels = _column(record, "labels", len(ids))
    targets: np.ndarray = labels != IGNORED
    if (labels[targets] != ids[targets]).any():
        raise CorpusError(
            f"labels must equal input_ids or be {IGNORED} (they are not shifted), got others in {record.where}"
        )
    return targets


def _ones(record: Record, name: str, length: int) -> np.ndarray:
    if name in names("token weights"):
        found = sequence_of(record, name)
        try:
            values = np.array(found)
        except ValueError:  # lists of several lengths
            values = np.array(None)
        if values.shape != (length,) or not np.isin(values, (0, 1)).all():
            raise CorpusError(
                f"{name} must be {length} zeros and ones, got others in {record.where}; a token is trained "
                "or it is not"
            )
    else:
        values = _column(record, name, length)
        if not np.isin(values, (0, 1)).all():
            raise CorpusError(f"{name} must hold zeros and ones, got other values in {record.where}")
    ones: np.ndarray = values == 1
    return ones


def _attended(record: Record, ids: np.ndarray) -> np.ndarray:
    """bool [N]: what is no padding."""
    if not _is_there(record.values.get("attention_mask")):
        return np.ones(len(ids), dtype=np.bool_)
    attended = _ones(record, "attention_mask", len(ids))
    used = np.flatnonzero(attended)
    if len(used) and not attended[used[0] : used[-1] + 1].all():
        raise CorpusError(f"attention_mask must be one run of ones, got gaps in {record.where}")
    return attended


def _refuse_several_sequences(record: Record, used: np.ndarray) -> None:
    """Positions, lengths and segments are accepted if they say no more than that the record is one sequence."""
    length, num_used = len(used), int(used.sum())
    for name in READ_COLUMNS:
        if not _is_there(record.values.get(name)):
            continue
        if name in names("position_ids"):
            fine = np.array_equal(_column(record, name, length)[used], np.arange(num_used))
        elif name in names("sequence lengths"):
            fine = integers_of(record, name).tolist() in ([length], [num_used])
        elif name in names("cumulative lengths"):
            fine = integers_of(record, name).tolist() in ([0, length], [0, num_used])
        elif name in names("segment ids"):
            fine = len(np.unique(_column(record, name, length)[used])) <= 1
        else:
            continue
        if not fine:
            raise CorpusError(
                f"a record must be one sequence, got {name} of several (or shifted) ones in {record.where}; "
                "write one record per sequence"
            )
