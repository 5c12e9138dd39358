"""The foretold angle: its two ingredients by brute force over explicit distributions, and its scaling."""

import math

import numpy as np
import pytest

from cache_builder.tools.expected_angle import (
    BIAS_DEGREES,
    NOISE_FACTOR,
    draw_noise,
    expected_angle,
    signal,
)
from formats.logprobs.ragged import offsets_of
from formats.logprobs.tail_draws import POWER, TailDraws, draw
from formats.logprobs.tail_function import TAIL_BETAS
from formats.logprobs.topk import TopKLogprobs

VOCAB_SIZE = 300


@pytest.fixture(scope="module")
def probs_PV() -> np.ndarray:
    """Peaked and flat positions."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(12, VOCAB_SIZE)) * np.linspace(0.5, 4, 12)[:, None]
    probs = np.exp(logits)
    return probs / probs.sum(1, keepdims=True)


def heads(probs_PV: np.ndarray, min_prob: float) -> TopKLogprobs:
    keep = probs_PV >= min_prob
    keep[np.arange(len(keep)), probs_PV.argmax(1)] = True
    log = np.log(probs_PV)
    with np.errstate(divide="ignore"):
        tails = [np.log(np.where(keep, 0, np.exp(beta * log)).sum(1)) for beta in TAIL_BETAS]
    return TopKLogprobs(
        offsets_of(keep.sum(1)),
        keep.nonzero()[1],
        log[keep],
        np.stack(tails, 1),
        VOCAB_SIZE,
        TailDraws.none(len(keep)),
        np.full(len(keep), np.nan, np.float32),
    )


def test_the_signal_is_the_variance_of_the_exact_gradient(probs_PV: np.ndarray) -> None:
    """g_j = p_j (u_j - sum p u) for independent u: its expected square by simulation."""
    rng = np.random.default_rng(1)
    total = np.zeros(len(probs_PV))
    for _ in range(4000):
        u = rng.normal(size=probs_PV.shape)
        total += ((probs_PV * (u - (probs_PV * u).sum(1, keepdims=True))) ** 2).sum(1)
    assert signal(heads(probs_PV, 1e-3)) == pytest.approx(total / 4000, rel=0.08)


@pytest.mark.parametrize("rate", [4, 16])
@pytest.mark.parametrize("min_prob", [5e-3, 5e-2])
def test_the_noise_is_the_variance_of_the_product_s_own_draws(
    probs_PV: np.ndarray, rate: int, min_prob: float
) -> None:
    """sum over the tail of p^2 times the variance of (number of draws / expected number), by drawing."""
    kept = heads(probs_PV, min_prob)
    rng = np.random.default_rng(2)
    for position, p_V in enumerate(probs_PV):
        tail = np.ones(VOCAB_SIZE, bool)
        tail[kept.token_ids[kept.offsets[position] : kept.offsets[position + 1]]] = False
        ids = np.flatnonzero(tail)
        repeats = 3000
        offsets = np.arange(repeats + 1) * len(ids)
        many = np.tile(np.log(p_V[ids]), repeats)
        drawn = draw(offsets, np.tile(ids, repeats), many, rate, rng.random(repeats))
        at = np.repeat(np.arange(repeats), drawn.counts)
        counts = np.zeros((repeats, VOCAB_SIZE))
        np.add.at(counts, (at, drawn.token_ids), 1)
        share = counts[:, ids] / (rate * p_V[ids] ** POWER)
        assert counts.sum() / repeats == pytest.approx((rate * p_V[ids] ** POWER).sum(), rel=0.02)
        expected = (p_V[ids] ** 2 * share.var(0)).sum()
        found = draw_noise(heads(probs_PV, 1e-4), kept, rate)[position]
        assert found == pytest.approx(expected, rel=0.12, abs=1e-7)


def test_the_angle_by_hand(probs_PV: np.ndarray) -> None:
    captured, pruned = heads(probs_PV, 1e-4), heads(probs_PV, 2e-2)
    ratio = draw_noise(captured, pruned, 8).mean() / signal(captured).mean()
    got = expected_angle(captured, pruned, 8, 4096)
    assert math.tan(math.radians(got)) == pytest.approx(NOISE_FACTOR * math.sqrt(ratio / 4096))
    halved = expected_angle(captured, pruned, 8, 4 * 4096)
    assert math.tan(math.radians(got)) == pytest.approx(2 * math.tan(math.radians(halved)))
    missed = 1 - pruned.head_mass(1.0).mean()
    for tokens in (4096, 65536):
        assert expected_angle(captured, pruned, 0, tokens) == pytest.approx(BIAS_DEGREES * missed)


def test_more_draws_and_longer_heads_are_never_worse(probs_PV: np.ndarray) -> None:
    captured = heads(probs_PV, 1e-4)
    by_rate = [expected_angle(captured, heads(probs_PV, 5e-3), rate) for rate in (2, 4, 8, 16)]
    assert by_rate == sorted(by_rate, reverse=True)
    by_head = [expected_angle(captured, heads(probs_PV, p), 2) for p in (1e-3, 5e-3, 2e-2)]
    assert by_head == sorted(by_head)


def test_a_certain_teacher_has_no_angle() -> None:
    probs = np.full((2, VOCAB_SIZE), 1e-30)
    probs[:, 3] = 1.0
    certain = heads(probs, 1e-3)
    assert expected_angle(certain, certain, 8) == pytest.approx(0, abs=1e-6)
