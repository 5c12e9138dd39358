"""The settings of the methods that act on weights while training: `l2`, `ewc` and `sfa`.

theta are the trained parameters, theta0 their values in the initial model. docs/retention.md compares the
methods.
"""

from dataclasses import dataclass

from formats.errors import ConfigError
from trainer.checks import (
    check_at_least,
    check_flag,
    check_fraction,
    check_number,
    check_one_of,
    check_optional_text,
    check_path,
)

FISHER_LABELS = ("sampled", "data")


@dataclass(frozen=True, kw_only=True)
class L2Settings:
    """Add coef / 2 * ||theta - theta0||^2 to the loss (L2-SP without a decay of new layers: Li et al. 2018,
    arXiv 1802.01483).

    Raises:
        ConfigError: a field is out of range.
    """

    coef: float
    """Strength. Per parameter, so it does not depend on the size of the model."""

    def __post_init__(self) -> None:
        check_at_least("l2.coef", self.coef, 0.0, "0.01 is a usual start")


@dataclass(frozen=True, kw_only=True)
class EwcSettings:
    """Add coef / 2 * sum_i F_i (theta_i - theta_k,i)^2 to the loss, F the diagonal of the Fisher information
    per token at theta_k (Kirkpatrick et al. 2017, arXiv 1612.00796, Eq. 3). One task of a chain; `ewc` may be a list
    of them, whose penalties are added.

    Raises:
        ConfigError: a field is out of range.
    """

    coef: float
    """Strength. The penalty is coef times what the diagonal sees of KL(initial || model) per token of the
    cache, which is little of it: hundreds to thousands are usual."""
    cache: str
    """Directory of a cache of text that the initial model knows; only its tokens are read."""
    num_rows: int = 256
    """Rows of the cache from which F is estimated, drawn by `training.seed`."""
    labels: str = "sampled"
    """`sampled` draws the next tokens from the model itself, the true Fisher; `data` takes those of the text,
    the empirical one."""
    model: str | None = None
    """Directory or hub name of theta_k, of the same tensors and tokenizer; None for the model that the run starts
    from."""
    keep_fisher: bool = False
    """Leave F in the run's directory, for `anneal merge --method fisher`; else it goes when the run is finished."""

    def __post_init__(self) -> None:
        check_at_least("ewc.coef", self.coef, 0.0, "1000 is a usual start")
        check_path("ewc.cache", self.cache, "a cache of text that the initial model knows")
        check_at_least("ewc.num_rows", self.num_rows, 1, "the default is 256", integer=True)
        check_one_of("ewc.labels", self.labels, FISHER_LABELS)
        check_optional_text("ewc.model", self.model, "the model that was trained on that task")
        check_flag("ewc.keep_fisher", self.keep_fisher)


@dataclass(frozen=True, kw_only=True)
class SfaSettings:
    """Average with the weights at the start of the run while training: theta <- (1 - beta) theta + beta theta0
    every period * T steps and at the end, T being all steps (Kleiman et al. 2025, arXiv 2501.05559, whose theta_o
    theta0 is: in a chain of tasks the last task's merged model).

    Raises:
        ConfigError: a field is out of range.
    """

    beta: float = 0.25
    """Weight of theta0 in each average, in [0, 1]. The paper's 0.5 undoes too much (docs/results.md)."""
    period: float = 0.25
    """The paper's p: the share of all steps between two averages, in (0, 1]; 1 averages once, at the end."""

    def __post_init__(self) -> None:
        check_number("sfa.beta", self.beta)
        if not 0 <= self.beta <= 1:
            raise ConfigError(
                f"sfa.beta must lie in [0, 1], got {self.beta:g}; 0.25 is the default, 0.5 the paper's"
            )
        check_fraction("sfa.period", self.period, "0.25 averages four times")
