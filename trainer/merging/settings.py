"""The settings of a merge: which models, by which method, how strongly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from formats.errors import ConfigError
from trainer.checks import check_fraction, check_number, check_one_of, check_path

DEFAULTS: Mapping[str, Mapping[str, float]] = {
    "wise-ft": {"alpha": 0.5},
    "task-arithmetic": {"scale": 1.0},
    "ties": {"scale": 1.0, "density": 0.2},
}
"""Method -> its strengths and what they are when they are not given."""
STRENGTHS = ("alpha", "scale", "density")


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """One merge. theta0 is the initial model, theta_i the tuned ones; docs/retention.md has the formulas.

    A strength that is None takes the method's default, and stays None where the method has none such.

    Raises:
        ConfigError: a field is out of range or does not belong to the method.
    """

    tuned: Sequence[str]
    """Directories of models that were fine-tuned from the initial one."""
    initial: str
    """The initial model: directory or hub name."""
    out: str
    """Directory for the result: new or empty."""
    method: str
    """`wise-ft`, `task-arithmetic` or `ties`."""
    alpha: float | None = None
    """wise-ft: weight of the tuned model, in [0, 1]."""
    scale: float | None = None
    """task-arithmetic and ties: factor on what the task vectors come to."""
    density: float | None = None
    """ties: the share of every tensor's entries that a task vector keeps, in (0, 1]."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tuned", tuple(self.tuned))
        if not self.tuned:
            raise ConfigError("a merge needs a tuned model, got none; name its directory")
        for path in self.tuned:
            check_path("TUNED", path, "a tuned model's directory")
        check_path("--initial", self.initial, "the model that the tuned ones were trained from")
        check_path("--out", self.out, "the directory for the result")
        check_one_of("--method", self.method, tuple(DEFAULTS))
        defaults = DEFAULTS[self.method]
        for name in STRENGTHS:
            if name not in defaults and getattr(self, name) is not None:
                raise ConfigError(
                    f"{self.method} has no --{name}, got {getattr(self, name)}; it takes "
                    f"{' and '.join(f'--{known}' for known in defaults)}"
                )
            if getattr(self, name) is None:
                object.__setattr__(self, name, defaults.get(name))
        if self.alpha is not None:
            check_number("--alpha", self.alpha)
            if not 0 <= self.alpha <= 1:
                raise ConfigError(f"--alpha must lie in [0, 1], got {self.alpha:g}; 0.5 is half-way")
        if self.scale is not None:
            check_number("--scale", self.scale)
        if self.density is not None:
            check_fraction("--density", self.density, "0.2 is the paper's")
        if self.method == "wise-ft" and len(self.tuned) != 1:
            raise ConfigError(
                f"wise-ft merges one tuned model, got {len(self.tuned)}; use --method task-arithmetic or ties"
            )

    def strengths(self) -> dict[str, Any]:
        """The strengths that the method has."""
        return {name: getattr(self, name) for name in STRENGTHS if getattr(self, name) is not None}
