"""Paired intervals against drawing items one by one, McNemar against exact fractions, luck against guessers."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest

from trainer.comparison.flips import Flips, count_flips, mean_flips
from trainer.comparison.intervals import mcnemar, paired_difference


def test_the_bootstrap_is_that_of_drawing_items():
    generator = np.random.default_rng(3)
    first, second = generator.normal(size=(2, 150)).cumsum(axis=0)  # correlated, as two models are
    weights = generator.integers(1, 30, 150).astype(float)
    found = paired_difference(first, second, weights, draws=20_000)
    assert found.difference == pytest.approx((second.sum() - first.sum()) / weights.sum(), rel=1e-12)
    drawn = generator.integers(0, 150, (20_000, 150))
    slow = (second - first)[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    assert found.stderr == pytest.approx(slow.std(ddof=1), rel=0.03)
    assert found.interval == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.05 * slow.std())


def test_right_or_wrong_answers_have_the_binomial_error():
    generator = np.random.default_rng(0)
    first = (generator.random(4000) < 0.6).astype(float)
    second = np.where(generator.random(4000) < 0.1, 1 - first, first)
    found = paired_difference(first, second)
    difference = second - first
    assert found.stderr == pytest.approx(difference.std() / np.sqrt(4000), rel=0.05)
    assert found.stderr < 0.5 * np.sqrt(first.var() + second.var()) / np.sqrt(
        4000
    )  # pairing is what it is for
    assert paired_difference(first, second) == found


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        first = generator.normal(size=80)
        second = first + generator.normal(0.3, 1.0, 80)
        low, high = paired_difference(first, second, draws=400).interval
        covered += low <= 0.3 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_few_or_broken_items_have_no_interval():
    one = paired_difference(np.array([1.0]), np.array([0.0]))
    assert (one.difference, one.stderr, one.interval) == (-1.0, None, None)
    assert np.isnan(paired_difference(np.array([1.0, np.nan]), np.array([0.0, 0.0])).difference)
    same = paired_difference(np.ones(5), np.ones(5))
    assert (same.difference, same.stderr, same.interval) == (0.0, 0.0, (0.0, 0.0))


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (0, 1), (5, 5), (3, 12), (40, 12), (0, 30)])
def test_mcnemar_is_exact(lost, won):
    total = lost + won
    tail = sum(Fraction(comb(total, k), 2**total) for k in range(min(lost, won) + 1))
    assert mcnemar(lost, won) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-9)


def test_flips_by_hand():
    before = np.array([1, 1, 1, 0, 0, 0, 1, 0], float)
    after = np.array([1, 0, 1, 1, 0, 1, 1, 1], float)
    choices = np.array([4, 4, 4, 4, 2, 2, 0, 0])
    found = count_flips(before, after, choices)
    assert (found.num_items, found.lost, found.won) == (8, 1, 3)
    # four choices: 4 items, accuracies 3/4 and 3/4; two choices: 2 items, 0 and 1/2; written answers: none
    assert found.luck == pytest.approx(4 * (1 / 4) * (1 / 4) / 3 + 2 * 1 * (1 / 2) / 1)
    assert found.lost_adjusted == 0 and found.won_adjusted == pytest.approx(3 - found.luck)
    assert found.to_dict()["p_value"] == pytest.approx(mcnemar(1, 3))
    assert count_flips(before, after * 0.5, choices) is None
    assert count_flips(before[:0], after[:0], choices[:0]) is None


@pytest.mark.parametrize("choices", [2, 4])
def test_luck_is_what_two_guessers_flip(choices):
    """Two models that know different shares and guess the rest, independently."""
    generator, size = np.random.default_rng(choices), 400_000
    known = generator.random(size)
    forgotten, learnt = known < 0.05, (known > 0.6) & (known < 0.7)
    knows_before = known < 0.5
    knows_after = (knows_before & ~forgotten) | learnt
    lucky = generator.random((2, size)) < 1 / choices
    before, after = (
        np.where(knows, 1.0, luck) for knows, luck in zip((knows_before, knows_after), lucky, strict=True)
    )
    found = count_flips(before, after, np.full(size, choices))
    both_guess = ~knows_before & ~knows_after
    by_luck = (both_guess & lucky[0] & ~lucky[1]).sum()
    # The formula takes the two models' knowledge as independent, too; here one mostly knows what the other knows, so it
    # takes off too little. Where knowledge is independent it is exact:
    assert found.luck < by_luck
    knows_after = generator.random(size) < 0.55
    after = np.where(knows_after, 1.0, lucky[1])
    found = count_flips(before, after, np.full(size, choices))
    right_by_luck = ~knows_before & lucky[0]
    assert found.luck == pytest.approx((right_by_luck & (after == 0)).sum(), rel=0.02)


def test_the_mean_of_seeds_has_no_p_value():
    pairs = [Flips(10, 1, 3, 0.5, 0.6), Flips(10, 2, 5, 1.5, 0.4)]
    assert mean_flips(pairs) == Flips(10, 1.5, 4.0, 1.0, None)
    assert mean_flips(pairs[:1]) is pairs[0] and mean_flips([pairs[0], None]) is None
