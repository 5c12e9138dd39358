"""From the columns of the first record to a layout: what the records are, and which tokens carry the loss.

The first known layout whose required columns are all there wins, richest first: a data set with `messages`
and a derived `text` column is a chat data set. `--text-column` overrules. Optional columns (`input`,
`system`, `tools`, `labels`) are looked up in every record, and may be missing or null; so are the columns that
would ask for something else (`fields.py`).
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cache_builder.corpus.field import CHAT, IDS, PAIR, TEXT
from cache_builder.corpus.fields import names, refuse_unknown_layout
from cache_builder.corpus.ready_tokens import MASKS, READ_COLUMNS
from formats.disk.token_row import IGNORED
from formats.errors import CorpusError

ALL_TOKENS = "every token but the first"
CHAT_COLUMNS = names("system", "tools", "template arguments", "one template argument", "template")
"""What a conversation may have beside its turns."""
_LIST_OF_OBJECTS = re.compile(r"\s*\[\s*\{")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A way of storing training examples."""

    name: str
    """Announced name."""
    kind: str
    """`input_ids`, `chat`, `pair` or `text`: which known columns mean something (`fields.py`)."""
    required: tuple[str, ...]
    """Columns that every record must have."""
    optional: tuple[str, ...] = ()
    """Columns that are read where they are."""
    loss: str
    """Which tokens carry cross-entropy, as a phrase."""
    splits: bool = False
    """Examples longer than a row are split into several, not truncated."""
    uses_chat_template: bool = False
    """Records cannot be read without a chat template."""
    is_chosen: bool = False
    """The user chose the column, whatever else there is."""


def _always(values: Mapping[str, Any]) -> bool:
    return True


def _is_sharegpt(values: Mapping[str, Any]) -> bool:
    turns = _parsed_list(values["conversations"])
    first = _parsed(turns[0]) if turns else None
    return isinstance(first, dict) and "from" in first


def is_turns(value: Any) -> bool:
    """A list of turns, or its JSON text, as CSV files hold it: a list of objects."""
    return isinstance(value, list) or (isinstance(value, str) and _LIST_OF_OBJECTS.match(value) is not None)


def _is_chat_pair(values: Mapping[str, Any]) -> bool:
    return is_turns(values["prompt"]) and is_turns(values["completion"])


def _is_unmasked(values: Mapping[str, Any]) -> bool:
    return not any(column in values for column in MASKS)


def _text(column: str, *, is_chosen: bool = False) -> Layout:
    return Layout(
        name="text", kind=TEXT, required=(column,), loss=ALL_TOKENS, splits=True, is_chosen=is_chosen
    )


_IDS = Layout(
    name="input_ids",
    kind=IDS,
    required=("input_ids",),
    optional=READ_COLUMNS,
    loss="as labels and masks say",
)
_MESSAGES = Layout(
    name="messages",
    kind=CHAT,
    required=("messages",),
    optional=CHAT_COLUMNS,
    loss="assistant turns",
    uses_chat_template=True,
)
# A layout and a condition on the values of a record that has its required columns.
LAYOUTS: tuple[tuple[Layout, Callable[[Mapping[str, Any]], bool]], ...] = (
    (replace(_IDS, loss=ALL_TOKENS, splits=True), _is_unmasked),
    (_IDS, _always),
    (_MESSAGES, _always),
    (
        replace(_MESSAGES, name="ShareGPT", required=("conversations",)),
        _is_sharegpt,
    ),
    (replace(_MESSAGES, required=("conversations",)), _always),
    (
        Layout(
            name="prompt + completion (chat)",
            kind=CHAT,
            required=("prompt", "completion"),
            optional=CHAT_COLUMNS,
            loss="assistant turns of the completion",
            uses_chat_template=True,
        ),
        _is_chat_pair,
    ),
    (
        Layout(name="prompt + completion", kind=PAIR, required=("prompt", "completion"), loss="completion"),
        _always,
    ),
    (
        Layout(
            name="Alpaca",
            kind=PAIR,
            required=("instruction", "output"),
            optional=("input", "history", *CHAT_COLUMNS),
            loss="output",
        ),
        _always,
    ),
    (_text("text"), _always),
)
RECOGNISED = (
    "text; prompt + completion; messages; conversations; instruction + output (+ input); "
    "input_ids (+ labels or loss_mask)"
)


def recognise(
    values: Mapping[str, Any],
    text_column: str | None = None,
    *,
    what: str = "the corpus",
    remedy: str = "rename them, or pass --text-column NAME",
) -> Layout:
    """The layout of a corpus whose first record is `values`.

    Args:
        what: it is, and what to do where no layout fits, for the message.

    Raises:
        CorpusError: no layout fits, or `text_column` is not a column (the message lists the columns); or a column
            beside `input_ids` can only be a mask, but has no name of one.
    """
    found = ", ".join(values) or "none"
    if text_column is not None:
        if text_column not in values:
            raise CorpusError(
                f"text_column must be a column of the corpus, got {text_column}; columns: {found}"
            )
        return _text(text_column, is_chosen=True)
    # A column that is null says nothing, unless nothing else does: then it decides which rule is broken.
    given = {column for column, value in values.items() if value is not None}
    for columns in (given, set(values)):
        for layout, condition in LAYOUTS:
            if columns.issuperset(layout.required) and condition(values):
                if layout.kind == IDS:
                    _refuse_unknown_masks(values, layout)
                return layout
    refuse_unknown_layout(values)
    raise CorpusError(
        f"{what} must have the columns of a known layout ({RECOGNISED}), got columns: {found}; {remedy}"
    )


def _refuse_unknown_masks(values: Mapping[str, Any], layout: Layout) -> None:
    """Refuse a column that chooses among the tokens, by a name that nobody here knows: all would be trained."""
    ids = _parsed_list(values["input_ids"])
    known = {*layout.required, *layout.optional, *names("tokenizer's", "shift_labels")}
    for name, value in values.items():
        column = _parsed_list(value)
        if name in known or len(column) != len(ids) or len(ids) < 2:
            continue
        is_mask = all(value in (0, 1) for value in column)
        is_label = IGNORED in column and all(
            label in (IGNORED, token) for label, token in zip(column, ids, strict=True)
        )
        if is_mask or is_label:
            raise CorpusError(
                f"beside input_ids targets are chosen by {', '.join(MASKS)}, got a column {name} that looks like one; "
                f"rename it to {'loss_mask' if is_mask else 'labels'}, or drop the column"
            )


def _parsed_list(value: Any) -> list[Any]:
    """A list, or the JSON text of one, as CSV files hold it; anything else is empty."""
    value = _parsed(value)
    return value if isinstance(value, list) else []


def _parsed(value: Any) -> Any:
    """What a list or an object as JSON text says; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
