"""The methods of a merge: what a person asks for, and the arithmetic for one tensor, which takes theta0 and the
tuned theta_i and gives the merged theta.

wise-ft          (1 - alpha) theta0 + alpha theta1                      Wortsman et al. 2022, arXiv 2109.01903
task-arithmetic  theta0 + scale * sum_i (theta_i - theta0)              Ilharco et al. 2023, arXiv 2212.04089
ties             theta0 + scale * TIES(theta_i - theta0)                Yadav et al. 2023, arXiv 2306.01708

TIES keeps of every task vector the `density` largest entries by magnitude (trim), takes per entry the sign
that the trimmed vectors agree on by weight (elect), and averages those of that sign (disjoint mean). peft
trims tensor by tensor, where the paper trims a model's task vector as a whole; so does this.

Everything is computed in float32 (float64 for tensors that are stored so).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from formats.errors import ConfigError
from formats.install import how_to_install
from trainer.checks import check_fraction, check_number, check_one_of, check_path

FORMULAS: Mapping[str, tuple[str, str]] = {
    "wise-ft": ("WiSE-FT", "(1 - alpha) * theta0 + alpha * theta1"),
    "task-arithmetic": ("task arithmetic", "theta0 + scale * sum_i (theta_i - theta0)"),
    "ties": ("TIES", "theta0 + scale * TIES(theta_i - theta0)"),
}
"""Method -> its name and formula."""
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


Merge = Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]


def merge_of(config: MergeConfig) -> Merge:
    """The function of (theta0, [theta_1, ...]), all of one shape and floating dtype, that gives the merged
    tensor in that dtype.

    Raises:
        ConfigError: ties without peft.
    """
    if config.method == "ties":
        require_peft()

    def merge(initial: torch.Tensor, tuned: Sequence[torch.Tensor]) -> torch.Tensor:
        if config.method == "wise-ft":
            assert config.alpha is not None
            return (1 - config.alpha) * initial + config.alpha * tuned[0]
        vectors = [tensor - initial for tensor in tuned]
        assert config.scale is not None
        if config.method == "task-arithmetic":
            return initial + config.scale * torch.stack(vectors).sum(0)
        assert config.density is not None
        return initial + config.scale * ties_of(vectors, config.density)

    return merge


def ties_of(vectors: list[torch.Tensor], density: float) -> torch.Tensor:
    """TIES of task vectors of one shape, unscaled."""
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, ties

    if density < 1:
        return ties(vectors, torch.ones(len(vectors), dtype=vectors[0].dtype), density)
    stacked = torch.stack(vectors)  # nothing to trim, of which peft would warn for every tensor
    return disjoint_merge(stacked, calculate_majority_sign_mask(stacked))


def require_peft() -> None:
    """Refuse to go on without peft.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import peft.utils.merge_utils  # noqa: F401
    except ImportError:
        raise ConfigError(f"ties needs peft, which is not installed; {how_to_install('lora')}") from None
