"""What one line of the table of known columns and fields says (`fields.py`)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

HONOURED, REFUSED, CONDITIONAL, NOT_NEEDED = "honoured", "refused", "honoured or refused", "not needed"
COLUMN, TURN, PART, CALL = "column", "turn", "content part", "tool call"
IDS, CHAT, PAIR, TEXT = "input_ids", "chat", "pair", "text"
"""Kinds of layouts: ready tokens; conversations; prompt and answer as strings; documents."""
EVERY_KIND = frozenset({IDS, CHAT, PAIR, TEXT})


def is_given(value: Any) -> bool:
    """Whether a column or field says anything; column files hold null or nothing in every other record."""
    return value is not None and not (isinstance(value, str | list | tuple | Mapping) and len(value) == 0)


def is_boolean(value: Any) -> bool:
    """True or false, also as the text of a CSV file, but no number."""
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))


def is_false(value: Any) -> bool:
    """False or 0."""
    return value is not None and value in (False, 0)


def is_not_one(value: Any) -> bool:
    """Given, and not 1 in any of its spellings (a CSV file has text)."""
    return is_given(value) and str(value).lower() not in ("1", "1.0", "true")


@dataclass(frozen=True, kw_only=True)
class Field:
    """One line of the table: names that mean the same."""

    key: str
    """How the code asks for `names`."""
    names: tuple[str, ...]
    """As data sets spell it."""
    place: str = COLUMN
    """`column` of a record, field of a `turn`, of a `content part` or of a `tool call`."""
    verdict: str
    """`honoured`, `refused`, `honoured or refused`, `not needed`."""
    effect: str
    """What happens."""
    known: str
    """Who knows it."""
    kinds: frozenset[str] = EVERY_KIND
    """Layouts in which a refused column is refused; elsewhere it is a column like any other, and not read."""
    rule: str = ""
    """Of a refused one: the rule it breaks."""
    remedy: str = ""
    """Of a refused one: what to do."""
    refuses: Callable[[Any], bool] = is_given
    """Whether a value is refused."""

    def markdown(self) -> str:
        """The line of the table in docs/corpora.md."""
        names = ", ".join(f"`{name}`" for name in self.names)
        return f"| {names} | {self.place} | {self.verdict} | {self.effect} | {self.known} |"
