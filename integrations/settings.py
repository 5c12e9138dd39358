"""What label annealing adds to the settings of another trainer: names, defaults and checks of `TrainConfig`."""

from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields
from typing import Any

from formats.errors import ConfigError
from trainer.checks import check_one_of
from trainer.config import TrainConfig
from trainer.data.label_terms import FROM_CACHE
from trainer.objective import Objective
from trainer.preflight.combinations import check_objective

SETTINGS = (
    *("kl_coef", "kl_budget", "temperature", "kl_direction", "tail_draws"),
    *("step0_threshold", "step0_rows", "allow_different_student", "loss_kernel"),
    *Objective.__dataclass_fields__,
)
"""Those of `TrainConfig` that mean the same in any trainer."""
ON_MISSING = ("refuse", "skip_kl")

_FIELDS: Mapping[str, Field[Any]] = {entry.name: entry for entry in fields(TrainConfig)}


def default_of(name: str) -> Any:
    """The default of a setting of `TrainConfig`."""
    value = _FIELDS[name].default
    assert value is not MISSING, f"{name} has no default"
    return value


def setting(name: str) -> Any:
    """A dataclass field with the default that `TrainConfig` has under this name."""
    return field(default=default_of(name), metadata={"help": f"As {name} of `anneal train`."})


def require_only(config: TrainConfig) -> None:
    """Refuse settings of `anneal train` that belong to its own loop.

    Raises:
        ConfigError: names the first one that is not its default.
    """
    for name, entry in _FIELDS.items():
        if name in SETTINGS or name in ("cache", "model", "out"):
            continue
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if getattr(config, name) != default:
            raise ConfigError(
                f"{name} is a setting of anneal train, got {getattr(config, name)!r}; this trainer has "
                "its own, or has none"
            )


def checked(given: Any, cache: str, *, on_missing: str = "refuse") -> TrainConfig:
    """The settings of `given`, an object with these attributes, as those of a run of ours.

    Raises:
        ConfigError: a value is out of range, or contradicts another.
    """
    values = {name: getattr(given, name) for name in SETTINGS}
    config = TrainConfig(cache=cache, model="-", out="-", **values)
    check_objective(config)
    check_one_of("on_missing", on_missing, ON_MISSING)
    if on_missing == "skip_kl" and config.weighting.name in FROM_CACHE:
        raise ConfigError(
            f"ce_weight {config.weighting.name} needs every row in the cache, got on_missing: skip_kl; remove one of "
            "them"
        )
    return config
