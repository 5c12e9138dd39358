"""What the initial model knew of the tokens that carry loss: weights of their cross-entropy, and their logprobs.

    stm    no weight: tokens of p0 below its number carry no loss and are not counted     arXiv 2501.14315
    flow   exp(-mean loss of the row under p0 / tau) for every token of a row             arXiv 2502.02797
    eaft0  entropy of p0's kept tokens, at most 20, renormalised, over ln 20              ours, after arXiv 2601.02151
    psft   log p0 itself, for the loss (trainer/loss/token_weights.py)                    arXiv 2508.17784

L: tokens of a row, P: captured positions, E: kept entries.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from formats.cache import TeacherCache
from formats.cache_row import CacheRow
from formats.disk.token_row import IGNORED
from formats.errors import ConfigError
from formats.logprobs import ragged
from formats.logprobs.topk import TopKLogprobs
from trainer.objective import TOP, Choice, Objective

FROM_CACHE = ("stm", "flow", "eaft0", "psft")
"""Names of `ce_weight` that need the initial model's numbers of every token that carries loss."""
WITH_TAU = ("flow", "talr")
"""Those whose number is found in the target cache where none is typed: the median over rows of the initial model's
loss."""
MEASURED_ROWS = 1024
"""Rows, evenly spread over the cache, whose median loss is the default of tau, and in which `stm` counts beforehand."""


def label_terms(
    weighting: Choice, row: CacheRow, topk: TopKLogprobs, labels_L: np.ndarray
) -> dict[str, np.ndarray]:
    """The columns of an item: `labels` where they change, `label_weights` or `label_logprobs` float32 [L].

    Args:
        topk: of all captured positions of the row.
        labels_L: int32, -100 where there is no loss.
    """
    tokens_P = row.positions + 1
    if weighting.name == "stm":
        assert weighting.value is not None
        known_L = np.zeros(len(labels_L), np.bool_)
        known_L[tokens_P] = topk.label_logprobs >= np.float32(math.log(weighting.value))
        return {"labels": np.where(known_L, labels_L, np.int32(IGNORED))}
    if weighting.name == "psft":
        return {"label_logprobs": _placed(topk.label_logprobs, tokens_P, len(labels_L))}
    if weighting.name == "eaft0":
        return {"label_weights": _placed(_top_entropy(topk) ** weighting.value, tokens_P, len(labels_L))}
    if weighting.name == "flow":
        assert weighting.value is not None
        weight = np.exp(-mean_loss(row, topk) / weighting.value)
        return {"label_weights": np.full(len(labels_L), weight, np.float32)}
    return {}


def no_terms(weighting: Choice, length: int) -> dict[str, np.ndarray]:
    """The columns of a row without labels, so that a batch of such rows has them."""
    if weighting.name == "psft":
        return {"label_logprobs": np.zeros(length, np.float32)}
    return {"label_weights": np.ones(length, np.float32)} if weighting.name in ("flow", "eaft0") else {}


def _placed(values_P: np.ndarray, tokens_P: np.ndarray, length: int) -> np.ndarray:
    values_L = np.zeros(length, np.float32)
    values_L[tokens_P] = values_P
    return values_L


def mean_loss(row: CacheRow, topk: TopKLogprobs) -> float:
    """Mean cross-entropy of the initial model over the tokens of a row that carry loss; 0 without any."""
    carries_P = row.loss_mask[row.positions + 1]
    losses = -topk.label_logprobs[carries_P].astype(np.float64)
    return float(losses.mean()) if len(losses) else 0.0


def _top_entropy(topk: TopKLogprobs) -> np.ndarray:
    """float32 [P]: entropy of the most probable kept tokens, at most TOP and renormalised, over ln TOP."""
    ranked = topk.sorted()
    rank = ragged.rank_in_segment(ranked.offsets)
    logprobs = np.where(rank < TOP, ranked.logprobs.astype(np.float64), -np.inf)
    mass = ragged.segment_logsumexp(logprobs, ranked.offsets)
    logprobs = logprobs - mass[ragged.segment_of(ranked.offsets)]
    with np.errstate(invalid="ignore"):
        terms = np.where(np.isfinite(logprobs), np.exp(logprobs) * logprobs, 0.0)
    return np.maximum(-ragged.segment_sum(terms, ranked.offsets) / math.log(TOP), 0.0).astype(np.float32)


def needs_tau(weighting: Choice) -> bool:
    """Whether the number of a weight is still to be found in the target cache."""
    return weighting.name in WITH_TAU and weighting.value is None


def reads_initial(weighting: Choice, *, target: bool) -> bool:
    """Whether the cross-entropy on a cache reads the initial model's numbers in it.

    Args:
        target: it is the cache of the text to learn, where the tau of `flow` and `talr` is found.
    """
    return weighting.name in FROM_CACHE or (target and needs_tau(weighting))


def resolved(objective: Objective, cache: TeacherCache) -> Objective:
    """The same with every number known: tau of `flow` and `talr` is the median over rows of the initial model's loss.

    Raises:
        ConfigError: no row carries loss.
    """
    choice = objective.weighting
    if not needs_tau(choice):
        return objective
    losses = [mean_loss(row, row.teacher) for row in _measured(cache) if row.loss_mask.any()]
    if not losses or not (tau := float(np.median(losses))) > 0 or not math.isfinite(tau):
        raise ConfigError(
            f"ce_weight {choice.name} needs rows that carry loss for its tau, got none in {cache.path}; write "
            f"{choice.name}:NATS"
        )
    return replace(bare_objective(objective), ce_weight=f"{choice.name}:{tau:.6g}")


def share_learnt(weighting: Choice, cache: TeacherCache) -> float:
    """The share of the tokens that carry loss which `stm` leaves in it, over the rows that tau is taken from."""
    assert weighting.value is not None
    learnt, known = 0, 0
    for row in _measured(cache):
        logprobs = row.teacher.label_logprobs[row.loss_mask[row.positions + 1]]
        known += len(logprobs)
        learnt += int((logprobs >= np.float32(math.log(weighting.value))).sum())
    return learnt / max(known, 1)


def _measured(cache: TeacherCache) -> Iterator[CacheRow]:
    for number in np.linspace(0, len(cache) - 1, min(len(cache), MEASURED_ROWS)):
        yield cache[int(number)]


def bare_objective(objective: Objective) -> Objective:
    """An `Objective` and nothing more, of a configuration that is one."""
    names = Objective.__dataclass_fields__
    return Objective(**{name: getattr(objective, name) for name in names})
