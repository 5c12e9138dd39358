"""One number of one model, with what is needed to say how well it is known: the items that it is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Items:
    """What a score is the mean of: sum(scores) / sum(weights). N items: questions, or rows of a text."""

    scores_N: np.ndarray
    """[N] float64, higher is better: 1 for a right answer, minus the summed cross-entropy of a row in nats, ..."""
    weights_N: np.ndarray
    """[N] float64: ones, or the tokens, words or bytes of the item."""
    num_choices_N: np.ndarray
    """[N] int32: choices to pick from; 0 where nothing is picked."""
    names: tuple[str, ...] = ()
    """[N] or empty: hashes that must agree between models."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One metric of one model."""

    value: float
    """A perplexity, an accuracy, ...; not finite for a model that has diverged."""
    stderr: float | None = None
    """Of the value alone, where the source gives one."""
    items: Items | None = None
    """None where only the value is known."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Everything that the source says: the result of `evaluate`, or the settings and size of a benchmark entry."""
