"""The entries of a sweep: runs that belong together, and merges of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from formats.errors import ConfigError
from trainer.checks import check_number, check_one_of, check_path
from trainer.config_file import refuse_unknown
from trainer.merging.settings import DEFAULTS, TEXTS, MergeConfig

Values = tuple[Any, ...]
TAKEN = ("direct", "all")
"""Words of `merges.of` that are no names of entries."""


@dataclass(frozen=True, kw_only=True)
class RunEntry:
    """Runs that belong together: the product of the values of some settings.

    Raises:
        ConfigError: no setting, an empty list, or a setting that is the sweep's.
    """

    settings: Mapping[str, Values]
    """Setting, written with dots, -> its values."""
    name: str | None = None
    """Put before the names of its runs."""

    def __post_init__(self) -> None:
        if not self.settings:
            raise ConfigError("an entry of runs must set something, got none; for example {kl_coef: [1, 4]}")
        if self.name is not None and not (isinstance(self.name, str) and self.name):
            raise ConfigError(f"the name of an entry of runs must be a text, got {self.name!r}")
        if self.name in TAKEN:
            raise ConfigError(
                f"the name of an entry of runs must not be {self.name!r}, which merges.of has another meaning for; "
                "choose another one"
            )


@dataclass(frozen=True, kw_only=True)
class MergeEntry:
    """Merges of finished runs: one method, the product of the values of its strengths.

    Raises:
        ConfigError: an unknown method, or a strength that it does not have or that is out of range.
    """

    method: str
    strengths: Mapping[str, Values] = field(default_factory=dict)
    """Setting -> its values; one that is absent takes the method's default."""
    of: str | Sequence[str] = "direct"
    """`direct`, `all`, or names of entries or runs, a run's without its seed for every seed."""

    def __post_init__(self) -> None:
        check_one_of("merges.method", self.method, tuple(DEFAULTS))
        if self.method == "fisher":
            raise ConfigError(
                "merges.method fisher needs a text per model, which an entry of a sweep cannot name; merge its "
                "finished runs with anneal merge --method fisher"
            )
        refuse_unknown(self.strengths, DEFAULTS[self.method], f"merges.{self.method}.")
        if "weights" in self.strengths:
            raise ConfigError(
                f"merges.{self.method}.weights are given model by model, which an entry of a sweep cannot; merge its "
                "finished runs with anneal merge --weights"
            )
        for strength, values in self.strengths.items():
            for value in values:
                if strength in TEXTS:
                    check_path(f"merges.{self.method}.{strength}", value, "a value, or be left out")
                else:
                    check_number(f"merges.{self.method}.{strength}", value)
                MergeConfig(tuned=["a"], initial="b", out="c", method=self.method, **{strength: value})
        words = [self.of] if isinstance(self.of, str) else self.of
        if not isinstance(words, list | tuple) or not words or not all(isinstance(w, str) for w in words):
            raise ConfigError(f"merges.of must be direct, all or a list of names, got {self.of!r}")
        object.__setattr__(self, "of", self.of if isinstance(self.of, str) else tuple(self.of))
