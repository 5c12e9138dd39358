"""What all commands share: results to stdout, messages to stderr, names of what was typed."""

import io
import json
import sys
from typing import Any

from formats.errors import ConfigError
from formats.finite_json import finite_json
from formats.named_path import short_name, split_name


def escape_unprintable() -> None:
    """What a terminal's or pipe's encoding does not have, such as a token in Latin-1, is shown as `\\u0137`."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def show(text: str) -> None:
    """Print a result; a closed stdout takes nothing and is no error."""
    print(text, end="" if text.endswith("\n") else "\n")


def note(text: str) -> None:
    """Print a message for the person at the terminal."""
    print(text, file=sys.stderr, flush=True)


def show_json(value: Any) -> None:
    """Print a result as JSON with sorted keys; what is not finite, as of a model that has diverged, is null."""
    show(json.dumps(finite_json(value), indent=2, sort_keys=True, allow_nan=False))


def show_report(report: Any, *, as_json: bool) -> None:
    """Print what has `to_dict` and `text` in one of the two forms."""
    if as_json:
        show_json(report.to_dict())
    else:
        show(report.text())


def named(words: list[str], what: str = "caches", form: str = "NAME=CACHE") -> dict[str, str]:
    """`NAME=PATH` or `PATH`, whose last component is then its name, as a mapping.

    Raises:
        ConfigError: two have the same name.
    """
    found: dict[str, str] = {}
    for word in words:
        name, path = split_name(word)
        name = name or short_name(path)
        if name in found:
            kind = "labels" if form.startswith("LABEL") else "names"
            raise ConfigError(f"{what} must have different {kind}, got {name!r} twice; write {form}")
        found[name] = path
    return found
