"""What was typed as text, as values: pairs, numbers, ranges."""

import json
from collections.abc import Mapping
from typing import Any

from formats.errors import ConfigError


def parse_template_args(pairs: list[str] | None) -> dict[str, Any]:
    """`KEY=VALUE` pairs for the chat template; names as they are written.

    Raises:
        ConfigError: a pair has no `=` or no key.
    """
    return parse_pairs(pairs, "--template-arg", "enable_thinking=false")


def parse_engine_args(pairs: list[str] | None) -> dict[str, Any]:
    """`KEY=VALUE` pairs for an engine; a hyphen in a name is an underscore.

    Raises:
        ConfigError: a pair has no `=` or no key.
    """
    parsed = parse_pairs(pairs, "--engine-arg", "tensor_parallel_size=2")
    return {key.replace("-", "_"): value for key, value in parsed.items()}


def parse_pairs(pairs: list[str] | None, option: str, example: str) -> dict[str, Any]:
    """`KEY=VALUE` pairs as a mapping; values are JSON where they parse as JSON, else text.

    Raises:
        ConfigError: a pair has no `=` or no key.
    """
    parsed: dict[str, Any] = {}
    for pair in pairs or []:
        key, separator, value = pair.partition("=")
        key = key.strip()
        if not separator or not key:
            raise ConfigError(f"{option} takes KEY=VALUE, got {pair!r}; for example {example}")
        try:
            parsed[key] = json.loads(value)
        except json.JSONDecodeError:
            parsed[key] = {"True": True, "False": False, "None": None}.get(value, value)
    return parsed


def parse_numbers(text: str, option: str) -> list[float]:
    """`0.75,0.25` as numbers.

    Raises:
        ConfigError: a part is not a number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{option} takes numbers with commas, got {text!r}; for example 0.75,0.25"
        ) from None


def require_owner(owner: str, given: bool, options: Mapping[str, Any]) -> None:
    """Refuse options that say nothing without another one.

    Args:
        owner: the option that they belong to.
        given: whether it was typed.
        options: option -> value; None or an empty list was not typed.

    Raises:
        ConfigError: names the first one.
    """
    for option, value in options.items():
        if not given and value is not None and value != []:
            typed = " ".join(map(str, value)) if isinstance(value, list) else value
            raise ConfigError(f"{option} needs {owner}, got {typed} without it; add it or leave it out")


def parse_shards(text: str | None) -> tuple[int, int] | None:
    """`A:B` as a pair of numbers.

    Raises:
        ConfigError: the text is not two whole numbers with a colon between them.
    """
    if text is None:
        return None
    first, separator, last = text.partition(":")
    if not (separator and first.isdecimal() and last.isdecimal()):
        raise ConfigError(f"--shards takes A:B, got {text!r}; 0:10 captures the shards 0 to 9")
    return int(first), int(last)


def typed(**values: Any) -> dict[str, Any]:
    """Those that were typed; for the others the default is where the setting is."""
    return {name: value for name, value in values.items() if value is not None}
