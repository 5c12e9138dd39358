"""Columns and fields that other trainers know, and what becomes of them here: the table of docs/corpora.md.

Whatever changes what is to be trained is honoured, or refused by name with the record's place in the file;
never ignored. Collected from the data formats of TRL, Axolotl, LLaMA-Factory, ms-swift, torchtune, of OpenAI's
fine-tuning files and of the chat templates of transformers. Names are looked up here and nowhere else.
"""

from collections.abc import Collection, Mapping
from typing import Any

from cache_builder.corpus.field import COLUMN, NOT_NEEDED, Field
from cache_builder.corpus.known_columns import COLUMNS
from cache_builder.corpus.known_turn_fields import TURN_FIELDS
from formats.errors import CorpusError

FIELDS: tuple[Field, ...] = COLUMNS + TURN_FIELDS
_BY_KEY = {field.key: field for field in FIELDS}


def names(*keys: str) -> tuple[str, ...]:
    """All names of these lines of the table."""
    return tuple(name for key in keys for name in _BY_KEY[key].names)


def known_columns() -> frozenset[str]:
    """Columns that must be read, if only to refuse them."""
    return frozenset(
        name
        for field in FIELDS
        if field.place == COLUMN and field.verdict != NOT_NEEDED
        for name in field.names
    )


def refuse_columns(values: Mapping[str, Any], kind: str, read: Collection[str], where: str) -> None:
    """Refuse a record with a column that asks for something else than what would be trained.

    Args:
        values: the record.
        kind: of its layout.
        read: columns that the layout takes itself.
        where: the record's place.

    Raises:
        CorpusError: names the column.
    """
    for field in FIELDS:
        if field.place == COLUMN and field.rule and kind in field.kinds:
            for name in field.names:
                if name in values and name not in read and field.refuses(values[name]):
                    raise CorpusError(f"{field.rule}, got a column {name} in {where}; {field.remedy}")


def refuse_unknown_layout(values: Collection[str]) -> None:
    """Say of a record without a known layout that it is made for something else, if its columns tell.

    Raises:
        CorpusError: lists the columns.
    """
    for key in ("preference", "steps"):
        if any(name in values for name in names(key)):
            field = _BY_KEY[key]
            raise CorpusError(f"{field.rule}, got columns: {', '.join(values)}; {field.remedy}")


def refuse_fields(values: Mapping[str, Any], place: str, where: str) -> None:
    """The same for the fields of a turn or of a part of its content."""
    for field in FIELDS:
        if field.place == place and field.rule:
            for name in field.names:
                if name in values and field.refuses(values[name]):
                    raise CorpusError(f"{field.rule}, got {name} in {where}; {field.remedy}")
