"""What a token's cross-entropy and a position's KL count in the loss: the settings beside `kl_coef`.

`TrainConfig` inherits them, so each has one home: its field, its default and its check are here. Settings with a number
are written `NAME:NUMBER`, as in `entropy:2`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from formats.errors import ConfigError
from trainer.checks import check_number, check_one_of

KL_ON = ("captured", "target", "prompt", "all")
NEEDS_PROMPTS = ("prompt", "all")
"""Values of `kl_on` that need a cache of all positions."""
KL_GATES: Mapping[str, str] = {"none": "", "unsure": "", "entropy": "nats"}
"""Name -> what its number is; without one it takes none."""


@dataclass(frozen=True)
class Choice:
    """A setting of the form NAME or NAME:NUMBER."""

    name: str
    value: float | None = None


def parse_choice(
    setting: str, text: object, numbers: Mapping[str, str], defaults: Mapping[str, float | None] | None = None
) -> Choice:
    """Read NAME or NAME:NUMBER.

    Args:
        setting: its name, for messages.
        text: as typed.
        numbers: name -> what its number is; the empty text where it takes none.
        defaults: name -> the number where none is typed; a name that is absent here must be given one.

    Raises:
        ConfigError: no such name, a number that is none or not above 0, one too many or one missing.
    """
    known = ", ".join(f"{name}:{what.upper()}" if what else name for name, what in numbers.items())
    name, colon, number = str(text).partition(":")
    if not isinstance(text, str) or name not in numbers:
        raise ConfigError(f"{setting} must be one of {known}, got {text!r}")
    what = numbers[name]
    if not colon:
        if what and name not in (defaults or {}):
            raise ConfigError(f"{setting} {name} needs {what}, got none; write {name}:{what.upper()}")
        return Choice(name, (defaults or {}).get(name))
    if not what:
        raise ConfigError(f"{setting} {name} takes no number, got {text!r}; write {name}")
    try:
        value = float(number)
    except ValueError:
        value = number  # type: ignore[assignment]
    check_number(f"{setting} {name}", value)
    if value <= 0:
        raise ConfigError(f"{setting} {name} must be above 0, got {value:g}")
    return Choice(name, value)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Which tokens the two terms of the loss are about, and what each counts.

    `kl_on` and `kl_gate` concern text that is learnt: a cache with `loss: kl` is retained at all its positions.

    Raises:
        ConfigError: a field is out of range.
    """

    kl_on: str = "captured"
    """Positions that carry the KL: `captured`, every one in the cache; `target`, those whose token carries loss;
    `prompt`, the others (SelfAug, arXiv 2509.03934); `all`, both, and the cache must have both."""
    kl_gate: str = "none"
    """Weight of the KL of single positions: `none`, 1; `unsure`, 1 - p0(token), so that what the initial model knew
    is free to get surer; `entropy:NATS`, 1 where the initial model's entropy is below NATS, else 0."""

    def __post_init__(self) -> None:
        check_one_of("kl_on", self.kl_on, KL_ON)
        parse_choice("kl_gate", self.kl_gate, KL_GATES)

    @property
    def gate(self) -> Choice:
        """`kl_gate`, read."""
        return parse_choice("kl_gate", self.kl_gate, KL_GATES)
