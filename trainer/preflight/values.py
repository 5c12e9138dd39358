"""What a value of `transformers.TrainingArguments` may be: checks made before any of it reaches transformers.

Each function here returns a check, `check(name, value)`, which raises ConfigError in one line. YAML gives text,
numbers, true, false, null, lists and mappings; transformers trusts their types and fails much later.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from formats.errors import ConfigError
from trainer.checks import check_flag, check_number, check_one_of, check_texts

Check = Callable[[str, Any], None]


def number(
    low: float = 0.0, *, above: bool = False, below: float = math.inf, whole_from: float = math.inf
) -> Check:
    """A finite number from `low` (or above it) and below `below`; whole numbers only from `whole_from` on."""

    def check(name: str, value: Any) -> None:
        check_number(name, value)
        if value < low or (above and value == low):
            raise ConfigError(f"{name} must be {'above' if above else 'at least'} {low:g}, got {value:g}")
        if value >= below:
            raise ConfigError(f"{name} must be below {below:g}, got {value:g}")
        if value >= whole_from and value != int(value):
            raise ConfigError(
                f"{name} must be a whole number of steps, or below {whole_from:g} for a share of all steps, "
                f"got {value:g}"
            )

    return check


def integer(low: int, *, below: float = math.inf, or_else: int | None = None) -> Check:
    """An integer from `low` up and below `below`; `or_else` is one more that is allowed."""

    def check(name: str, value: Any) -> None:
        check_number(name, value, integer=True)
        if value != or_else and not low <= value < below:
            bounds = f"at least {low}" if value < low else f"below {below:g}"
            raise ConfigError(
                f"{name} must be {bounds}{'' if or_else is None else f' or {or_else}'}, got {value}"
            )

    return check


def flag(name: str, value: Any) -> None:
    """true or false."""
    check_flag(name, value)


def text(name: str, value: Any) -> None:
    """A non-empty text."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} must be a text, got {value!r}")


def mapping(name: str, value: Any) -> None:
    """Names and values."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{name} must be a mapping of names to values, got {value!r}")


def flags(name: str, value: Any) -> None:
    """Names, each true or false."""
    mapping(name, value)
    for key, entry in value.items():
        check_flag(f"{name}.{key}", entry)


texts = check_texts


def one_of(*choices: str, advice: str = "") -> Check:
    """One of a few words; `advice` is added to the refusal."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, str) or value not in choices:
            more = f"; {advice}" if advice else ""
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}{more}")

    return check


def member_of(enumeration: str) -> Check:
    """A value of an enumeration of `transformers` (SchedulerType, OptimizerNames, ...)."""

    def check(name: str, value: Any) -> None:
        choices = enumeration_values(enumeration)
        plain = getattr(value, "value", value)
        check_one_of(name, plain if isinstance(plain, str) else repr(plain), choices)

    return check


def enumeration_values(enumeration: str) -> Sequence[str]:
    """The values of an enumeration of `transformers`, in its order."""
    from transformers import trainer_utils, training_args

    found = getattr(trainer_utils, enumeration, None) or getattr(training_args, enumeration)
    return [member.value for member in found]


def log_level(name: str, value: Any) -> None:
    """A level that `transformers` knows."""
    from transformers.training_args import trainer_log_levels

    check_one_of(name, value if isinstance(value, str) else repr(value), list(trainer_log_levels))


def either(*checks: Check, what: str) -> Check:
    """What any of the checks accepts."""

    def check(name: str, value: Any) -> None:
        for each in checks:
            try:
                return each(name, value)
            except ConfigError:
                continue
        raise ConfigError(f"{name} must be {what}, got {value!r}")

    return check


def optional(check: Check) -> Check:
    """What `check` accepts, or null."""

    def checked(name: str, value: Any) -> None:
        if value is not None:
            check(name, value)

    return checked
