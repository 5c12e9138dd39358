"""Checks that settings make when they are constructed: rule, what was got, what to do, in one line.

All raise ConfigError. `name` is the setting as a person writes it, such as `lora.r`.
"""

import math
from collections.abc import Sequence
from typing import Any

from formats.disk.output_file import refuse_address
from formats.errors import ConfigError

LARGEST_NUMBER = 2.0**127
"""Half of float32's largest, about."""
LARGEST_INTEGER = 2**63 - 1


def is_finite(value: float) -> bool:
    """Whether a number is one that a computation can take; an integer beyond the floats is none."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_number(name: str, value: Any, *, integer: bool = False) -> None:
    """Refuse what is not a finite number (an integer, if asked for); true and false are none. What float32, or an
    integer of 64 bits, does not hold would be infinite, or an error, where it is computed with.
    """
    kinds: tuple[type, ...] = (int,) if integer else (int, float)
    valid = isinstance(value, kinds) and not isinstance(value, bool)
    if not valid or not is_finite(value):
        raise ConfigError(f"{name} must be {'an integer' if integer else 'a number'}, got {value!r}")
    if integer and abs(value) > LARGEST_INTEGER:
        raise ConfigError(f"{name} must be an integer of at most {LARGEST_INTEGER}, got {value}")
    if abs(value) > LARGEST_NUMBER:
        raise ConfigError(f"{name} must be a number of at most {LARGEST_NUMBER:g}, got {value:g}")


def check_at_least(name: str, value: Any, low: float, advice: str, *, integer: bool = False) -> None:
    """Refuse a number below `low`."""
    check_number(name, value, integer=integer)
    if value < low:
        raise ConfigError(f"{name} must be at least {low:g}, got {value:g}; {advice}")


def check_one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse what is not among the choices."""
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is not true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {value!r}")


def check_path(name: str, value: Any, what: str) -> None:
    """Refuse what cannot name a file or directory."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise ConfigError(f"{name} must name {what}, got {value!r}")


def check_label(name: str, value: Any) -> None:
    """Refuse what cannot name a text in tables, logs and records: no text, an empty one, or several lines."""
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ConfigError(f"{name} must have names that are a line of text, got {value!r}; quote a number")


def check_output(name: str, value: Any, what: str) -> None:
    """Refuse what cannot name the directory of a result, an address among it."""
    check_path(name, value, what)
    refuse_address("--out", value)


def check_fraction(name: str, value: Any, advice: str) -> None:
    """Refuse what is not in (0, 1]."""
    check_number(name, value)
    if not 0 < value <= 1:
        raise ConfigError(f"{name} must be above 0 and at most 1, got {value:g}; {advice}")


def check_optional_text(name: str, value: Any, what: str) -> None:
    """Refuse what is neither null nor a non-empty text."""
    if value is not None and (not isinstance(value, str) or not value):
        raise ConfigError(f"{name} must be {what}, got {value!r}")


def check_texts(name: str, value: Any) -> None:
    """Refuse what is neither a non-empty text nor a non-empty list of them."""
    entries = [value] if isinstance(value, str) else value
    if (
        not isinstance(entries, list | tuple)
        or not entries
        or not all(isinstance(e, str) and e for e in entries)
    ):
        raise ConfigError(f"{name} must be a text or a list of texts, got {value!r}")
