"""What a token's cross-entropy and a position's KL count in the loss: the settings beside `kl_coef`.

`TrainConfig` inherits them, so each has one home: its field, its default and its check are here. Settings with a number
are written `NAME:NUMBER`, as in `entropy:2`.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from formats.errors import ConfigError
from trainer.checks import check_at_least, check_number, check_one_of

KL_ON = ("captured", "target", "prompt", "all")
NEEDS_PROMPTS = ("prompt", "all")
"""Values of `kl_on` that need a cache of all positions."""
KL_GATES: Mapping[str, str] = {"none": "", "unsure": "", "entropy": "nats"}
"""Name -> what its number is; without one it takes none."""


KL_TARGETS = ("full", "masked", "masked-weighted")
CE_WEIGHTS: Mapping[str, str] = {
    "none": "",
    "stm": "p0",
    "flow": "nats",
    "psft": "epsilon",
    "eaft": "power",
    "eaft0": "power",
    "dft": "power",
    "talr": "nats",
}
"""Name -> what its number is."""
CE_WEIGHT_NUMBERS: Mapping[str, float | None] = {
    "stm": 0.4,
    "flow": None,
    "psft": 0.2,
    "eaft": 1.0,
    "eaft0": 1.0,
    "dft": 1.0,
    "talr": None,
}
"""Name -> the number where none is typed; None is found in the cache (`trainer.data.label_terms`)."""
TOP = 20
"""Tokens whose entropy `eaft` and `eaft0` take."""


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
    value: Any = number
    with contextlib.suppress(ValueError):
        value = float(number)
    check_number(f"{setting} {name}", value)
    if value <= 0:
        raise ConfigError(f"{setting} {name} must be above 0, got {value:g}")
    return Choice(name, value)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Which tokens the two terms of the loss are about, and what each counts.

    Those of the KL concern text that is learnt: a cache with `loss: kl` is retained at all its positions.

    Raises:
        ConfigError: a field is out of range.
    """

    kl_on: str = "captured"
    """Positions that carry the KL: `captured`, every one in the cache; `target`, those whose token carries loss;
    `prompt`, the others (SelfAug, arXiv 2509.03934); `all`, both, and the cache must have both."""
    kl_gate: str = "none"
    """Weight of the KL of single positions: `none`, 1; `unsure`, 1 - p0(token), so that what the initial model knew
    is free to get surer; `entropy:NATS`, 1 where the initial model's entropy is below NATS, else 0."""

    kl_target: str = "full"
    """`full` compares the whole distributions; `masked` without the token that carries loss, both renormalised (Mask
    the Target, arXiv 2605.29498), so that KL and cross-entropy do not meet; `masked-weighted` times 1 - p0(token)."""
    ce_weight: str = "none"
    """Weight of the cross-entropy of single tokens, never differentiated: `stm`, `flow`, `psft`, `eaft`, `eaft0`,
    `dft`, `talr`, each with a number if need be (`stm:0.5`). docs/retention.md has formulas and sources."""
    label_smoothing: float = 0.0
    """Share of the label that is spread evenly over the vocabulary, in [0, 1): a baseline."""

    def __post_init__(self) -> None:
        check_one_of("kl_on", self.kl_on, KL_ON)
        parse_choice("kl_gate", self.kl_gate, KL_GATES)
        check_one_of("kl_target", self.kl_target, KL_TARGETS)
        choice = parse_choice("ce_weight", self.ce_weight, CE_WEIGHTS, CE_WEIGHT_NUMBERS)
        if choice.name == "stm" and choice.value is not None and choice.value > 1:
            raise ConfigError(
                f"ce_weight stm takes a probability, got {choice.value:g}; 0.4 is a perplexity of 2.5"
            )
        check_at_least("label_smoothing", self.label_smoothing, 0.0, "0 turns it off")
        if self.label_smoothing >= 1:
            raise ConfigError(f"label_smoothing must be below 1, got {self.label_smoothing:g}; 0.1 is usual")

    @property
    def weighting(self) -> Choice:
        """`ce_weight`, read."""
        return parse_choice("ce_weight", self.ce_weight, CE_WEIGHTS, CE_WEIGHT_NUMBERS)

    def require_kernel(self, kernel: str) -> None:
        """Refuse the Triton kernels where a setting needs whole rows of logits, which they do not read.

        Raises:
            ConfigError: naming the first such setting.
        """
        setting = "label_smoothing" if self.label_smoothing else None
        if self.weighting.name == "eaft":
            setting = "ce_weight: eaft"
        if kernel == "triton" and setting is not None:
            raise ConfigError(
                f"{setting} is not available with loss_kernel: triton, which reads no whole rows of logits; use "
                "loss_kernel: torch"
            )

    def changed(self) -> dict[str, str | float]:
        """Settings of an `Objective` that are not the default."""
        names = Objective.__dataclass_fields__
        return {
            name: getattr(self, name) for name, entry in names.items() if getattr(self, name) != entry.default
        }

    @property
    def gate(self) -> Choice:
        """`kl_gate`, read."""
        return parse_choice("kl_gate", self.kl_gate, KL_GATES)
