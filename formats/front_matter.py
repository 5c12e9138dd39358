"""The YAML between two lines of `---` with which cards on the Hugging Face Hub begin, and the text behind it."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from formats.errors import FormatError, one_line

CARD_NAME = "README.md"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""Of a repository: owner and name."""
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


def split_card(card: str) -> tuple[dict[str, Any], str]:
    """Front matter, empty without one, and text of a card.

    Raises:
        FormatError: it begins with `---` and cannot be read.
    """
    found = _FRONT_MATTER.match(card)
    if found is None:
        return {}, card
    try:
        front = yaml.safe_load(found[1]) or {}
    except yaml.YAMLError as error:
        raise FormatError(f"{CARD_NAME} must begin with YAML, got {one_line(error, whole=True)}") from None
    if not isinstance(front, dict):
        raise FormatError(f"{CARD_NAME} must begin with a YAML mapping, got {type(front).__name__}")
    return front, card[found.end() :]


def join_card(front: Mapping[str, Any], body: str) -> str:
    """The card of which `split_card` makes these two."""
    return f"---\n{yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)}---\n{body}"


def with_section(body: str, begin: str, end: str, section: str) -> str:
    """The text of a card with a section between two comments written anew, or added at its end."""
    written = f"{begin}\n{section}{end}\n"
    start = body.find(begin)
    stop = body.find(end, start)
    if start >= 0 and stop >= 0:
        return body[:start] + written + body[stop + len(end) :].removeprefix("\n")
    return (body.rstrip() + "\n\n" if body.strip() else "\n") + written


def table_cell(value: object) -> str:
    """As it stands in a table."""
    return " ".join(str(value).split()).replace("|", "\\|")
