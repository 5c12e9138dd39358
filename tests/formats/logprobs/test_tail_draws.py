"""Tail draws: the expected numbers are exact, estimates unbiased, and selections those of a plain loop."""

import numpy as np
import pytest
from make_teachers import by_id, capture, dense_draws, log_softmax

from formats.logprobs.ragged import offsets_of
from formats.logprobs.tail_draws import MAX_RATE, POWER, TailDraws, draw, most_draws, starts

RNG = np.random.default_rng(0)


def flat_tails(tails: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(offsets, token_ids, logprobs) of tails with the ids 0, 1, 2, ... at each position."""
    offsets = offsets_of(np.array([len(tail) for tail in tails]))
    ids = np.concatenate([np.arange(len(tail)) for tail in tails])
    return offsets, ids, np.concatenate(tails)


TAILS = [
    log_softmax(RNG.normal(size=50) * 2),
    np.log(np.full(3, 1 / 3)),
    np.zeros(1),
    np.zeros(0),
    np.array([-np.inf, np.log(0.5), -np.inf, np.log(0.3), -200.0]),
    log_softmax(RNG.normal(size=7)) - 9.0,
]


def loop(drawn: TailDraws) -> list[list[tuple[int, float]]]:
    """Position by position: the draws as sorted pairs."""
    found = []
    for p in range(len(drawn)):
        a, b = drawn.offsets[p : p + 2].tolist()
        found.append(sorted(zip(drawn.token_ids[a:b].tolist(), drawn.logprobs[a:b].tolist(), strict=True)))
    return found


# --- drawing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1, 8, 64])
def test_expected_numbers_of_draws_are_exact(rate: int):
    """Over an even grid of starts, every token is drawn rate * p^(3/4) times, to one part of the grid."""
    offsets, ids, logprobs = flat_tails(TAILS)
    steps = 4000
    found = np.zeros(len(ids))
    for step in range(steps):
        begin = np.full(len(TAILS), (step + 0.5) / steps)
        drawn = draw(offsets, ids, logprobs, rate, begin)
        found += np.bincount(
            np.repeat(offsets[:-1], drawn.counts) + drawn.token_ids, minlength=len(ids)
        )  # fmt: skip
        expected = np.array([rate * np.exp(POWER * tail).sum() for tail in TAILS])
        assert (np.abs(drawn.counts - expected) < 1 + 1e-6).all()
    # An interval holds as many points of a grid as its length says, but for one at its ends.
    assert np.abs(found / steps - rate * np.exp(POWER * logprobs)).max() <= 1 / steps + 1e-9
    assert (found[np.isneginf(logprobs)] == 0).all()
    assert (found > steps).any() == (rate > 1)


def test_drawing_agrees_with_a_dense_look_up():
    dense = log_softmax(RNG.normal(size=(30, 200)) * 3)
    begin = RNG.random(30)
    expected = dense_draws(dense, 9, begin)
    got = draw(np.arange(31) * 200, np.tile(np.arange(200), 30), dense.ravel(), 9, begin)
    for a, b in zip(by_id(got), by_id(expected), strict=True):
        assert (a == b).all()
    assert got.rate == 9 and got.counts.min() > 9


def test_a_token_of_probability_zero_is_never_drawn():
    impossible = np.full(4, -np.inf)
    for start in (0.0, 0.5, np.nextafter(1, 0)):
        assert draw(np.array([0, 4]), np.arange(4), impossible, 64, np.array([start])).counts.tolist() == [0]
    first = np.concatenate([impossible, [0.0]])
    assert set(draw(np.array([0, 5]), np.arange(5), first, 3, np.zeros(1)).token_ids.tolist()) == {4}


def test_tokens_that_are_expected_more_than_once_are_drawn_again():
    drawn = draw(np.array([0, 2]), np.array([5, 9]), np.log([0.5, 0.01]), 10, np.array([0.3]))
    # 10 * 0.5^0.75 = 5.95 and 10 * 0.01^0.75 = 0.32: points 0.3 to 5.3, none of them in 5.95 to 6.26.
    assert drawn.token_ids.tolist() == [5] * 6
    drawn = draw(np.array([0, 2]), np.array([5, 9]), np.log([0.5, 0.01]), 10, np.array([0.1]))
    assert drawn.token_ids.tolist() == [5] * 6 + [9]


def test_nothing_to_draw_from():
    none = draw(np.zeros(4, np.int64), np.zeros(0, np.int32), np.zeros(0), 8, np.zeros(3))
    assert len(none) == 3 and none.counts.tolist() == [0, 0, 0] and none.rate == 8
    assert len(draw(np.zeros(1, np.int64), np.zeros(0), np.zeros(0), 8, np.zeros(0))) == 0


def test_starts_are_even_and_differ():
    keys = [RNG.bytes(16) for _ in range(400)] + [bytes(16), b"\xff" * 16]
    found = np.array([starts(key, np.arange(500)) for key in keys])
    assert found.min() >= 0 and found.max() < 1 and found.dtype == np.float64
    assert all(len(np.unique(row)) == 500 for row in found) and len(np.unique(found[:400])) == 200_000
    # Even within a row, and over the rows at any one position.
    assert np.abs(np.sort(found, axis=1) - np.linspace(0, 1, 500)).max() < 0.01
    for position in (0, 1, 499):
        assert np.abs(np.sort(found[:400, position]) - np.linspace(0, 1, 400)).max() < 0.1
    assert (starts(keys[0], np.arange(500)) == found[0]).all()
    assert (starts(keys[0], np.array([7, 3])) == found[0][[7, 3]]).all()
    assert starts(keys[0], np.array([(1 << 22) - 1]))[0] < 1


@pytest.mark.parametrize("rate", [2, 8, 32])
def test_weights_estimate_sums_over_the_tail(rate: int):
    """Unbiased over the starts, for sums as different as a mass, one at T = 2 and one with signs."""
    logits = RNG.normal(size=(1, 300)) * 2
    steps = 2000
    begin = (np.arange(steps) + 0.5) / steps
    topk = capture(np.repeat(logits, steps, 0), 2e-2, draw_rate=rate, starts_P=begin)
    dense = log_softmax(logits)[0]
    tail = np.setdiff1d(np.arange(300), topk.token_ids[: topk.counts[0]])
    drawn = topk.draws
    signs = np.where(np.arange(300) % 3 == 0, 1.0, -1.0)
    for term in (np.exp(dense), np.exp(dense / 2), np.exp(dense) * signs):
        truth = term[tail].sum()
        each = np.zeros(steps)
        np.add.at(each, np.repeat(np.arange(steps), drawn.counts), drawn.weights * term[drawn.token_ids])
        spread = np.abs(term[tail]).sum()
        assert each.mean() == pytest.approx(truth, abs=2e-3 * spread) and each.std() > 1e-3 * spread


def test_weights_by_hand():
    drawn = TailDraws(np.array([0, 2]), np.array([1, 2]), np.log([1 / 16, 1 / 256]), 4)
    assert drawn.weights == pytest.approx([8 / 4, 64 / 4]) and drawn.weights.dtype == np.float32


@pytest.mark.parametrize("rate", [1, 7, MAX_RATE])
def test_no_position_has_more_draws_than_it_can(rate: int):
    for vocab_size in (1, 2, 15, 16, 17, 80, 81, 82, 1000):
        uniform = np.full(vocab_size, -np.log(vocab_size))
        for start in (0.0, 0.4, np.nextafter(1, 0)):
            drawn = draw(np.array([0, vocab_size]), np.arange(vocab_size), uniform, rate, np.array([start]))
            assert drawn.counts[0] <= most_draws(vocab_size, rate)


def test_the_largest_vocabulary_and_exact_roots():
    size = 1 << 20
    uniform = np.full(size, -np.log(size))
    drawn = draw(np.array([0, size]), np.arange(size), uniform, MAX_RATE, np.zeros(1))
    assert 64 * 32 - 1 <= drawn.counts[0] <= most_draws(size, MAX_RATE) == 64 * 32 + 1
    for root in range(1, 33):
        assert most_draws(root**4, 1) == root + 1
        if root < 32:
            assert most_draws(root**4 + 1, 1) == root + 2
        if root > 1:
            assert most_draws(root**4 - 1, 1) == root + 1


# --- selection --------------------------------------------------------------------------------------------

OFFSETS, IDS, LOGPROBS = flat_tails(TAILS)
DRAWN = draw(OFFSETS, IDS, LOGPROBS, 12, np.linspace(0, 0.9, len(TAILS)))


def test_selections_against_a_loop():
    plain = loop(DRAWN)
    assert [len(one) for one in plain] == DRAWN.counts.tolist() and min(map(len, plain)) == 0
    assert any(len(set(one)) < len(one) for one in plain)
    for start in range(7):
        for stop in range(start, 7):
            part = DRAWN.slice(start, stop)
            assert loop(part) == plain[start:stop] and part.offsets[0] == 0 and part.rate == 12
    for chosen in ([5, 0, 5], [], [3], [3, 3, 1], list(range(6))):
        assert loop(DRAWN.take(np.array(chosen, np.int64))) == [plain[p] for p in chosen]
    parts = [DRAWN.slice(0, 2), DRAWN.slice(2, 2), DRAWN.slice(2, 6), DRAWN.slice(3, 4)]
    assert loop(TailDraws.concatenate(parts)) == plain + plain[3:4]
    order = np.array([2, 3, 0, 1, 5, 4])
    joined = DRAWN.joined(DRAWN.take(order))
    assert loop(joined) == [sorted(plain[p] + plain[q]) for p, q in enumerate(order.tolist())]
    assert joined.rate == 12 and loop(DRAWN.joined(TailDraws.none(6, 12))) == plain
    assert loop(TailDraws.none(0, 3).joined(TailDraws.none(0, 3))) == []


def test_other_rates_and_positions_do_not_mix():
    for other in (TailDraws.none(6), TailDraws.none(6, 11)):
        with pytest.raises(ValueError, match="one rate of draws"):
            TailDraws.concatenate([DRAWN, other])
        with pytest.raises(ValueError, match="one rate of draws"):
            DRAWN.joined(other)
    for count in (0, 5, 7):
        with pytest.raises(ValueError, match="draws must be of 6 positions"):
            DRAWN.joined(TailDraws.none(count, 12))


@pytest.mark.parametrize(
    "change",
    [
        {"offsets": np.zeros(0)},
        {"offsets": np.array([1, 2])},
        {"offsets": np.array([0, 1])},
        {"token_ids": np.zeros(3)},
        {"logprobs": np.zeros(1)},
        {"token_ids": np.zeros((2, 1)), "logprobs": np.zeros((2, 1))},
        {"rate": -1},
        {"rate": MAX_RATE + 1},
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(change: dict):
    good = {"offsets": np.array([0, 2]), "token_ids": np.zeros(2), "logprobs": np.zeros(2), "rate": 4}
    drawn = TailDraws(**good)
    assert (drawn.offsets.dtype, drawn.token_ids.dtype, drawn.logprobs.dtype) == (
        np.int64,
        np.int32,
        np.float32,
    )
    with pytest.raises(ValueError, match="draws"):
        TailDraws(**(good | change))
