"""Values out of a record, checked: every error names the column and the record's place."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from cache_builder.corpus.field import is_given
from cache_builder.corpus.json_text import parse_json
from cache_builder.corpus.readers import Record
from formats.errors import CorpusError


def value_of(record: Record, column: str) -> Any:
    """The value of a column that every record must have."""
    if column not in record.values:
        found = ", ".join(record.values) or "none"
        raise CorpusError(f"every record must have the column {column!r}, got only {found} in {record.where}")
    return record.values[column]


def string_of(record: Record, column: str) -> str:
    """The string in a column."""
    value = value_of(record, column)
    if not isinstance(value, str):
        raise CorpusError(
            f"{column} must be a string, got {kind_of(value)} in {record.where}; mend or drop the record"
        )
    return unicode_text(value, column, record.where)


def optional_string(record: Record, column: str) -> str:
    """The string in an optional column; a missing or null one is empty."""
    return string_of(record, column) if is_given(record.values.get(column)) else ""


def unicode_text(text: str, column: str, where: str) -> str:
    """`text` itself, unless it holds half a surrogate pair: JSON can express it, no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{column} must be valid Unicode, got an unpaired surrogate at character {error.start + 1} of "
            f"{where}; mend or drop the record"
        ) from None
    return text


def kind_of(value: Any) -> str:
    """The type of a value, for an error."""
    return "null" if value is None else type(value).__name__


def sequence_of(record: Record, column: str) -> list[Any]:
    """A list, or the JSON text of one, as CSV files hold it."""
    value = value_of(record, column)
    if isinstance(value, str):
        try:
            value = parse_json(value, record.where)
        except json.JSONDecodeError:
            raise CorpusError(
                f"{column} must be a list, got the string {value!r:.40} in {record.where}"
            ) from None
    if isinstance(value, np.ndarray):
        return list(value)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise CorpusError(
            f"{column} must be a list, got {kind_of(value)} in {record.where}; mend or drop the record"
        )
    return list(value)


def integers_of(record: Record, column: str) -> np.ndarray:
    """A list of whole numbers as int64 [N]."""
    values = sequence_of(record, column)
    try:
        array = np.array(values) if values else np.zeros(0, dtype=np.int64)
    except ValueError:  # lists of several lengths
        array = np.array(None)
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise CorpusError(f"{column} must be a list of integers, got other values in {record.where}")
    return array.astype(np.int64)
