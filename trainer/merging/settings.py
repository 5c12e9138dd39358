"""What a person asks of a merge: the methods, what each of them takes, and the checks. No torch here.

wise-ft          (1 - alpha) theta0 + alpha theta1                           Wortsman et al. 2022, arXiv 2109.01903
task-arithmetic  theta0 + scale * sum_i w_i (theta_i - theta0)               Ilharco et al. 2023, arXiv 2212.04089
ties             theta0 + scale * TIES(w_i (theta_i - theta0))               Yadav et al. 2023, arXiv 2306.01708
fisher           sum_i w_i F_i theta_i / sum_i w_i F_i                  Matena and Raffel 2022, arXiv 2111.09832
soup             sum_i w_i theta_i / sum_i w_i; greedy with `by`                  Wortsman et al. 2022, arXiv 2203.05482
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from formats.errors import ConfigError
from trainer.checks import (
    check_at_least,
    check_fraction,
    check_number,
    check_one_of,
    check_output,
    check_path,
    check_texts,
)

FORMULAS: Mapping[str, tuple[str, str]] = {
    "wise-ft": ("WiSE-FT", "(1 - alpha) * theta0 + alpha * theta1"),
    "task-arithmetic": ("task arithmetic", "theta0 + scale * sum_i w_i (theta_i - theta0)"),
    "ties": ("TIES", "theta0 + scale * TIES(w_i (theta_i - theta0))"),
    "soup": ("soup", "sum_i w_i theta_i / sum_i w_i"),
    "fisher": ("Fisher merging", "sum_i w_i F_i theta_i / sum_i w_i F_i"),
}
"""Method -> its name and formula."""
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "wise-ft": {"alpha": 0.5},
    "task-arithmetic": {"scale": 1.0, "weights": None},
    "ties": {"scale": 1.0, "density": 0.2, "trim": "model", "weights": None},
    "soup": {"by": None, "weights": None},
    "fisher": {"fisher": None, "weights": None, "fisher_rows": None},
}
"""Method -> what it takes, and what that is when it is not given."""
TRIMS = ("model", "tensor")
AVERAGES = ("soup", "fisher")
"""Methods that are averages of the tuned models; theta0 only lends them its layout."""
TEXTS = ("trim", "by")
"""Settings that are a text."""
LARGEST_ALPHA = 1.5
"""As far beyond the tuned model as Springer et al. 2025 (arXiv 2503.19206, Fig. 10) walk on the line through both."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """One merge. theta0 is the initial model, theta_i the tuned ones; docs/retention.md has the formulas.

    A setting that is None takes the method's default, and stays None where the method has none such.

    Raises:
        ConfigError: a field is out of range or does not belong to the method.
    """

    tuned: Sequence[str]
    """Directories of models that were fine-tuned from the initial one."""
    initial: str
    """The initial model: directory or hub name."""
    revision: str | None = None
    """Of the initial model, where that is a hub name: branch, tag or commit."""
    out: str
    """Directory for the result: new or empty."""
    method: str
    """A key of `DEFAULTS`."""
    alpha: float | None = None
    """wise-ft: weight of the tuned model, in [0, 1.5]; above 1 it walks past the tuned model."""
    scale: float | None = None
    """task-arithmetic and ties: factor on what the task vectors come to."""
    density: float | None = None
    """ties: the share of entries that a task vector keeps, in (0, 1]."""
    trim: str | None = None
    """ties: what the share is of: `model`, a task vector as a whole, as the paper; or every `tensor` of it."""
    weights: Sequence[float] | None = None
    """w_i, one number per tuned model; None for 1 each. Not for wise-ft, nor a greedy soup."""
    by: str | None = None
    """soup: a cache of held-out text; models enter one by one, the best first, where the loss on it gets no worse."""

    fisher: Sequence[str] | None = None
    """fisher: per tuned model a cache of text that it knows, or the `ewc-fisher` directory of a run from that model."""
    fisher_rows: int | None = None
    """fisher: rows of each cache from which F is estimated; None for 256."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tuned", tuple(self.tuned))
        if not self.tuned:
            raise ConfigError("a merge needs a tuned model, got none; name its directory")
        for path in self.tuned:
            check_path("TUNED", path, "a tuned model's directory")
        check_path("--initial", self.initial, "the model that the tuned ones were trained from")
        check_output("--out", self.out, "the directory for the result")
        check_one_of("--method", self.method, tuple(DEFAULTS))
        self._take_defaults()
        if self.alpha is not None:
            check_number("--alpha", self.alpha)
            if not 0 <= self.alpha <= LARGEST_ALPHA:
                raise ConfigError(f"--alpha must lie in [0, 1.5], got {self.alpha:g}; 0.5 is half-way")
        if self.scale is not None:
            check_number("--scale", self.scale)
        if self.density is not None:
            check_fraction("--density", self.density, "0.2 is the paper's")
        if self.trim is not None:
            check_one_of("--trim", self.trim, TRIMS)
        if self.weights is not None:
            self._check_weights()
        if self.by is not None:
            check_path("--by", self.by, "a cache of held-out text")
            if self.weights is not None:
                raise ConfigError(
                    "a greedy soup weighs its models alike, got --weights beside --by; keep one of them"
                )
        if self.method == "fisher":
            self._check_fisher()
        if self.method == "wise-ft" and len(self.tuned) != 1:
            raise ConfigError(
                f"wise-ft merges one tuned model, got {len(self.tuned)}; use --method task-arithmetic or ties"
            )

    def _take_defaults(self) -> None:
        defaults = DEFAULTS[self.method]
        for name in sorted({name for settings in DEFAULTS.values() for name in settings}):
            value = getattr(self, name)
            if name not in defaults and value is not None:
                raise ConfigError(
                    f"{self.method} has no {option(name)}, got {value}; it takes "
                    f"{' and '.join(option(known) for known in defaults)}"
                )
            if value is None:
                object.__setattr__(self, name, defaults.get(name))

    def _check_weights(self) -> None:
        weights = self.weights
        if not isinstance(weights, list | tuple):
            raise ConfigError(f"--weights must be a list of numbers, got {weights!r}; for example 0.75,0.25")
        for weight in weights:
            check_number("--weights", weight)
        if len(weights) != len(self.tuned):
            raise ConfigError(
                f"--weights must have one number per tuned model, got {len(weights)} for {len(self.tuned)} "
                "models; give them in the order of the models"
            )
        if self.method in AVERAGES and (min(weights) < 0 or sum(weights) == 0):
            raise ConfigError(
                f"--weights of an average must not be negative, nor all 0, got {setting_text(weights)}; "
                "task-arithmetic takes any"
            )
        object.__setattr__(self, "weights", tuple(map(float, weights)))

    def _check_fisher(self) -> None:
        if self.fisher:
            check_texts("--fisher", self.fisher)
        sources = [self.fisher] if isinstance(self.fisher, str) else list(self.fisher or ())
        if len(sources) != len(self.tuned):
            raise ConfigError(
                f"fisher needs --fisher once per tuned model, got {len(sources)} for {len(self.tuned)}; give a cache "
                "of text that each knows, in the order of the models"
            )
        object.__setattr__(self, "fisher", tuple(sources))
        if self.fisher_rows is not None:
            check_at_least("--fisher-rows", self.fisher_rows, 1, "256 are usual", integer=True)

    def settings(self) -> dict[str, Any]:
        """What the method takes, as `anneal.json` holds it: numbers, texts and lists of numbers."""
        found = {name: getattr(self, name) for name in DEFAULTS[self.method]}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in found.items()
            if value is not None
        }


def option(name: str) -> str:
    """A setting as it is typed."""
    return f"--{name.replace('_', '-')}"


def setting_text(value: Any) -> str:
    """A setting for people: `0.5`, `tensor`, `0.75,0.25`."""
    if isinstance(value, list | tuple):
        return ",".join(map(setting_text, value))
    return f"{value:g}" if isinstance(value, int | float) else str(value)
