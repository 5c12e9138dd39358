"""TopKLogprobs and the tail function against dense full-vocabulary computations and hand-made cases."""

import math
from dataclasses import replace

import numpy as np
import pytest
from make_teachers import capture, labels_of, log_softmax, logsumexp

from formats import TAIL_BETAS, TailDraws, TopKLogprobs

NODES = (8.0, 4.0, 2.0, 1.0, 0.5)
BETWEEN = (0.75, 1.5)


def test_two_tokens_by_hand():
    # p = 3/4 and 1/4; only the first is kept, so the tail is the single token with l = log 1/4.
    tail = [[beta * math.log(0.25) for beta in TAIL_BETAS]]
    topk = TopKLogprobs([0, 1], [1], np.log([0.75]), np.array(tail), 2, TailDraws.none(1), [np.nan])
    assert topk.head_mass(1.0) == pytest.approx(0.75)
    # At T = 2 the weights are sqrt(3/4) and sqrt(1/4).
    assert topk.head_mass(2.0) == pytest.approx(math.sqrt(3) / (math.sqrt(3) + 1))
    # At T = 1/2 they are 9/16 and 1/16; at T = 3 the tail is linear in beta, so interpolation is exact.
    assert topk.head_mass(0.5) == pytest.approx(0.9)
    assert topk.log_tail(3.0) == pytest.approx(math.log(0.25) / 3, abs=1e-6)
    assert topk.log_partition(1.0) == pytest.approx(0.0, abs=1e-6)


def distributions() -> dict[str, np.ndarray]:
    """Logits [P, V] of shapes that language models produce, and of shapes meant to be hard."""
    rng = np.random.default_rng(0)
    size = 8000
    ranks = np.log(np.arange(1.0, size + 1))
    one_hot = np.zeros((1, size))
    one_hot[0, 7] = 25
    two_peaked = np.full((1, size), -4.0)
    two_peaked[0, [3, 900]] = [9.0, 8.5]
    return {
        "normal": rng.normal(size=(8, size)) * np.linspace(0.5, 4, 8)[:, None],
        "skewed": (rng.normal(size=(4, size)) + rng.exponential(1.0, (4, size)))
        * np.linspace(0.5, 2, 4)[:, None],
        "zipf": -np.array([0.8, 1.0, 1.5, 2.0, 3.0])[:, None] * ranks,
        "uniform": np.zeros((1, size)),
        "one-hot": one_hot,
        "two-peaked": two_peaked,
    }


def dense_tail(logits_PV: np.ndarray, topk: TopKLogprobs, temperature: float) -> np.ndarray:
    truth = []
    for p, row in enumerate(log_softmax(logits_PV)):
        rest = np.delete(row, topk.token_ids[topk.offsets[p] : topk.offsets[p + 1]])
        truth.append(logsumexp(rest / temperature))
    return np.array(truth)


def bracket(topk: TopKLogprobs, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """(lower [P], upper [P]) that no tail with these nodes can leave: below the chord of its interval, above
    the continued chords of both neighbouring ones."""
    x, beta = [0.0, *TAIL_BETAS], 1 / temperature
    bounds = []
    for count, nodes in zip(topk.counts.tolist(), topk.log_tail_nodes.tolist(), strict=True):
        if -math.inf in nodes:
            bounds.append((-math.inf, -math.inf))
            continue
        y = [math.log(topk.vocab_size - count), *nodes]

        def chord(i: int, y: list[float] = y) -> float:
            return y[i] + (y[i + 1] - y[i]) / (x[i + 1] - x[i]) * (beta - x[i])

        i = next(i for i in range(len(x) - 1) if beta <= x[i + 1])
        upper = chord(i)
        beside = [chord(k) for k in (i - 1, i + 1) if 0 <= k < len(x) - 1]
        bounds.append((min(upper, max(beside)), upper))
    lower, upper = np.array(bounds).T
    return lower, upper


@pytest.mark.parametrize("name", list(distributions()))
@pytest.mark.parametrize(("min_prob", "max_k"), [(1e-3, 128), (1e-2, 128), (1e-3, 8)])
def test_log_tail_against_the_full_vocabulary(name: str, min_prob: float, max_k: int):
    logits = distributions()[name]
    topk = capture(logits, min_prob, max_k)
    for temperature in NODES:
        assert topk.log_tail(temperature) == pytest.approx(dense_tail(logits, topk, temperature), abs=1e-4)
    for temperature in BETWEEN:
        assert topk.log_tail(temperature) == pytest.approx(dense_tail(logits, topk, temperature), abs=0.05)
    for temperature in np.linspace(0.5, 8, 31):
        truth = dense_tail(logits, topk, temperature)
        lower, upper = bracket(topk, temperature)
        assert (lower - 1e-4 <= truth).all() and (truth <= upper + 1e-4).all()
        assert topk.log_tail(temperature) == pytest.approx(truth, abs=0.1)


def test_convexity_brackets_even_a_kinked_tail():
    """A tail of two far-apart levels bends sharply between nodes: no bound on the error but the bracket."""
    size = 4000
    for many, gap in ((10, 10.0), (300, 15.0), (2000, 25.0)):
        logits = np.full((1, size), -gap)
        logits[0, :many] = 0
        logits[0, 0] = 4
        topk = capture(logits, 1e-3, 4)
        for temperature in np.linspace(0.5, 8, 61):
            truth = dense_tail(logits, topk, temperature)
            lower, upper = bracket(topk, temperature)
            value = topk.log_tail(temperature)
            assert lower - 1e-4 <= truth <= upper + 1e-4
            assert lower - 1e-4 <= value <= upper + 1e-4


@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.0, 1.3, 2.0, 5.0, 8.0, 30.0])
def test_partition_and_mass_against_dense(temperature: float):
    logits = np.random.default_rng(1).normal(size=(6, 500)) * 3
    topk = capture(logits, 1e-2, 20)
    dense = log_softmax(logits)
    log_z = np.array([logsumexp(row / temperature) for row in dense])
    assert topk.log_partition(temperature) == pytest.approx(log_z, abs=0.02)
    assert topk.head_mass(temperature) + np.exp(
        topk.log_tail(temperature) - topk.log_partition(temperature)
    ) == (pytest.approx(np.ones(6), abs=1e-5))


def test_head_that_is_the_whole_vocabulary():
    topk = capture(np.random.default_rng(2).normal(size=(3, 11)), 0.0, 11)
    assert np.isneginf(topk.log_tail_nodes).all() and (topk.counts == 11).all()
    for temperature in (0.5, 0.9, 1.0, 3.0):
        assert np.isneginf(topk.log_tail(temperature)).all()
        assert topk.head_mass(temperature) == pytest.approx(np.ones(3))
        lower, upper = bracket(topk, temperature)
        assert np.isneginf(lower).all() and np.isneginf(upper).all()


def test_prune_equals_a_capture_with_those_settings():
    logits = np.random.default_rng(3).normal(size=(9, 300)) * 3
    for min_prob, max_k in ((1e-2, 300), (1e-4, 5), (5e-3, 12), (1.0, 1)):
        pruned = capture(logits, 1e-5, 200).prune(min_prob, max_k)
        direct = capture(logits, min_prob, max_k)
        assert (pruned.offsets == direct.offsets).all()
        assert (pruned.token_ids == direct.sorted().token_ids).all()
        assert pruned.log_tail_nodes == pytest.approx(direct.log_tail_nodes, abs=1e-5)


def test_prune_breaks_ties_by_id_and_keeps_the_best():
    equal, none = np.log([0.2, 0.2, 0.2]), TailDraws.none(1)
    topk = TopKLogprobs([0, 3], [9, 4, 6], equal, np.zeros((1, 7)), 20, none, [np.nan])
    assert topk.prune(0.9, 5).token_ids.tolist() == [4]
    assert topk.prune(0.0, 2).token_ids.tolist() == [4, 6]


def test_slice_take_concatenate():
    topk = capture(np.random.default_rng(4).normal(size=(7, 50)) * 3, 1e-2, 9)
    parts = [topk.slice(0, 3), topk.slice(3, 3), topk.slice(3, 7)]
    joined = TopKLogprobs.concatenate(parts)
    assert (joined.offsets == topk.offsets).all() and (joined.logprobs == topk.logprobs).all()
    taken = topk.take(np.array([5, 0, 5]))
    for k, p in enumerate((5, 0, 5)):
        assert (taken.slice(k, k + 1).token_ids == topk.slice(p, p + 1).token_ids).all()
        assert (taken.log_tail_nodes[k] == topk.log_tail_nodes[p]).all()
    assert len(topk.take(np.zeros(7, bool))) == 0
    empty = TopKLogprobs.empty(50)
    assert len(empty) == 0 and empty.log_partition(1.3).shape == (0,) and len(empty.prune(0.1, 2)) == 0
    with pytest.raises(ValueError, match="one vocabulary"):
        TopKLogprobs.concatenate([topk, TopKLogprobs.empty(51)])
    with pytest.raises(IndexError):
        topk.slice(2, 9)


LOGITS = np.random.default_rng(6).normal(size=(9, 120)) * 2


# --- labels -----------------------------------------------------------------------------------------------


def test_labels_go_where_their_positions_go():
    topk = capture(LOGITS, 1e-2, 9)
    truth = log_softmax(LOGITS)[np.arange(9), labels_of(topk)].astype(np.float32)
    assert (topk.label_logprobs == truth).all() and topk.label_logprobs.dtype == np.float32
    assert (topk.slice(2, 7).label_logprobs == truth[2:7]).all()
    assert (topk.take(np.array([5, 0, 5])).label_logprobs == truth[[5, 0, 5]]).all()
    parts = [topk.slice(0, 3), topk.slice(3, 3), topk.slice(3, 9)]
    assert (TopKLogprobs.concatenate(parts).label_logprobs == truth).all()
    assert (topk.sorted().label_logprobs == truth).all()
    for min_prob in (0.02, 1.0):  # pruning moves labels into the tail and forgets nothing of them
        assert (topk.prune(min_prob, 3).label_logprobs == truth).all()
    assert TopKLogprobs.empty(50).label_logprobs.shape == (0,)


def test_unknown_labels_are_allowed_in_memory():
    topk = broken(label_logprobs=[np.nan]).validate()
    assert np.isnan(topk.prune(0.3).label_logprobs).all()
    assert broken(label_logprobs=[-np.inf]).validate() is not None


def test_kept_labels_by_hand():
    topk = TopKLogprobs.concatenate([broken(), broken(token_ids=[7, 1]), broken(), broken(token_ids=[4, 3])])
    for labels, positions, entries in (
        ([2, 2, 5, 3], [0, 3], [1, 7]),
        ([1, 1, 2, 4], [0, 1, 2, 3], [0, 3, 5, 6]),
        ([9, 9, 9, 99], [], []),
    ):
        found = topk.kept_labels(np.array(labels))
        assert [part.tolist() for part in found] == [positions, entries]


# --- tail draws -------------------------------------------------------------------------------------------


def pairs(topk: TopKLogprobs) -> list[list[tuple[int, float]]]:
    """Position by position: the draws as sorted pairs."""
    drawn = topk.draws
    return [
        sorted(zip(drawn.token_ids[a:b].tolist(), drawn.logprobs[a:b].tolist(), strict=True))
        for a, b in zip(drawn.offsets[:-1].tolist(), drawn.offsets[1:].tolist(), strict=True)
    ]


def heads(topk: TopKLogprobs) -> list[set[int]]:
    return [set(topk.token_ids[a:b].tolist()) for a, b in zip(topk.offsets, topk.offsets[1:], strict=False)]


@pytest.mark.parametrize("max_k", [3, 120])
def test_prune_draws_among_the_tokens_that_move(max_k: int):
    topk = capture(LOGITS, 1e-3, draw_rate=20)
    pruned = topk.prune(0.02, max_k)
    pruned.validate()
    assert pruned.draws.rate == 20
    more = 0
    for old, new, before, after in zip(heads(topk), heads(pruned), pairs(topk), pairs(pruned), strict=True):
        added = list(after)
        for one in before:
            added.remove(one)  # what was drawn stays
        assert {token for token, _ in added} <= old - new and not {token for token, _ in after} & new
        more += len(added)
    expected = 20 * np.exp(0.75 * topk.logprobs).sum() - 20 * np.exp(0.75 * pruned.logprobs).sum()
    assert abs(more - expected) < len(topk) and more > 20
    dense = log_softmax(LOGITS)
    segment = np.repeat(np.arange(len(topk)), pruned.draws.counts)
    assert pruned.draws.logprobs == pytest.approx(dense[segment, pruned.draws.token_ids], abs=1e-5)
    assert pairs(topk.prune(0.02, max_k)) == pairs(pruned)
    without = replace(topk, draws=TailDraws.none(len(topk)))
    assert without.prune(0.02, max_k).draws.rate == 0


def test_pruning_is_unbiased_over_many_positions():
    """Also at the first position of a batch, whatever the batch: 400 of them, each pruned alone."""
    logits = np.random.default_rng(8).normal(size=(400, 40))
    captured = capture(logits, 0.0, 12, draw_rate=2)
    each = [captured.slice(p, p + 1).prune(1.0) for p in range(400)]
    truth = 1 - np.exp([float(one.logprobs[0]) for one in each])
    found = [float((one.draws.weights * np.exp(one.draws.logprobs)).sum()) for one in each]
    errors = np.array(found) - truth
    assert abs(errors.mean()) < 3 * errors.std() / 20 and errors.std() > 0.01
    # What moves begins with its most probable token: a start of 0 would draw that one every time.
    second = [sorted(captured.slice(p, p + 1).logprobs.tolist())[-2] for p in range(400)]
    hit = np.mean([value in one.draws.logprobs for value, one in zip(second, each, strict=True)])
    assert hit == pytest.approx(np.minimum(1, 2 * np.exp(0.75 * np.array(second))).mean(), abs=0.08)


def test_pruning_never_draws_an_impossible_token():
    nodes, none = np.full((1, 7), -np.inf), TailDraws.none(1, 64)
    topk = TopKLogprobs([0, 2], [3, 4], [0.0, -np.inf], nodes, 10, none, [0.0])
    assert topk.prune(0.5).validate().draws.counts.tolist() == [0]


def test_slice_take_concatenate_and_sorted_keep_draws():
    topk = capture(LOGITS, 1e-2, 9, draw_rate=6)
    plain = pairs(topk)
    assert min(map(len, plain)) >= 1
    assert pairs(topk.slice(2, 7)) == plain[2:7] and pairs(topk.take(np.array([5, 0, 5]))) == [
        plain[5],
        plain[0],
        plain[5],
    ]
    joined = TopKLogprobs.concatenate([topk.slice(0, 3), topk.slice(3, 3), topk.slice(3, 9)])
    assert pairs(joined) == pairs(topk.sorted()) == plain
    odd = np.arange(9) % 2 == 1
    assert pairs(topk.take(odd)) == plain[1::2]
    assert TopKLogprobs.empty(50, 6).draws.rate == 6 and len(TopKLogprobs.empty(50, 6).draws) == 0
    for other in (replace(topk, draws=TailDraws.none(9, rate)) for rate in (0, 7)):
        with pytest.raises(ValueError, match="one rate of draws"):
            TopKLogprobs.concatenate([topk, other])
    for count in (0, 8, 10):
        with pytest.raises(ValueError, match="draws must cover 9 positions"):
            replace(topk, draws=TailDraws.none(count, 6))


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (([0, 1], [1], [-3.0], 1), "one of the head"),
        (([0, 3], [5, 2, 6], [-3.0] * 3, 1), "one of the head"),
        (([0, 1], [10], [-3.0], 1), "drawn token ids"),
        (([0, 1], [-1], [-3.0], 1), "drawn token ids"),
        (([0, 1], [5], [np.nan], 1), "finite"),
        (([0, 1], [5], [-np.inf], 1), "finite"),
        (([0, 1], [5], [0.01], 1), "not above 0"),
        (([0, 4], [5] * 4, [-3.0] * 4, 1), r"0 to 3 draws, got 4\.\.4"),
        (([0, 1], [5], [-3.0], 0), "0 to 0 draws"),
    ],
)
def test_validate_refuses_impossible_draws(drawn: tuple, message: str):
    broken(draws=TailDraws(np.array([0, 3]), [5, 5, 0], [-3.0, -3.0, 0.0], 1)).validate()
    bad = broken(draws=TailDraws(*drawn))
    for check in (bad.validate, bad.validate_draws):
        with pytest.raises(ValueError, match=message):
            check()


def test_validate_refuses_offsets_of_draws_that_fall():
    two = TopKLogprobs.concatenate([broken(), broken()])
    bad = replace(two, draws=TailDraws(np.array([0, 2, 0]), np.zeros(0), np.zeros(0), 4))
    with pytest.raises(ValueError, match=r"draws, got -2\.\.2"):
        bad.validate()


def test_the_head_of_one_position_is_no_matter_to_the_draws_of_another():
    two = TopKLogprobs.concatenate([broken(), broken(token_ids=np.array([5, 6]))])
    replace(two, draws=TailDraws([0, 1, 2], [5, 1], [-3.0, -3.0], 1)).validate()
    with pytest.raises(ValueError, match="one of the head"):
        replace(two, draws=TailDraws([0, 0, 1], [5], [-3.0], 1)).validate()


@pytest.mark.parametrize("temperature", [0.49, 0.0, -1.0, math.inf, math.nan])
def test_temperatures_outside_the_capture_are_refused(temperature: float):
    with pytest.raises(ValueError, match="temperature"):
        capture(np.zeros((1, 5))).log_tail(temperature)


def broken(**changes: object) -> TopKLogprobs:
    good = {
        "offsets": np.array([0, 2]),
        "token_ids": np.array([1, 2]),
        "logprobs": np.log([0.5, 0.25]),
        "log_tail_nodes": np.full((1, 7), -2.0),
        "vocab_size": 10,
        "draws": TailDraws.none(1),
        "label_logprobs": [-2.0],
    }
    return TopKLogprobs(**(good | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": np.array([2, 2])}, "distinct"),
        ({"token_ids": np.array([1, 10])}, "token ids"),
        ({"token_ids": np.array([-1, 2])}, "token ids"),
        ({"logprobs": np.array([np.nan, -1])}, "NaN"),
        ({"logprobs": np.array([0.5, -1])}, "above 0"),
        ({"log_tail_nodes": np.full((1, 7), np.nan)}, "tail"),
        ({"log_tail_nodes": np.full((1, 7), 9.0)}, "tail"),
        ({"label_logprobs": [0.01]}, "label_logprobs must not be above 0"),
    ],
)
def test_validate_names_the_problem(changes: dict, message: str):
    broken().validate()
    with pytest.raises(ValueError, match=message):
        broken(**changes).validate()


@pytest.mark.parametrize(
    "changes",
    [
        {"offsets": np.array([0, 1])},
        {"offsets": np.array([1, 2])},
        {"offsets": np.zeros(0)},
        {"logprobs": np.zeros(3)},
        {"log_tail_nodes": np.zeros((1, 6))},
        {"log_tail_nodes": np.zeros((2, 7))},
        {"label_logprobs": []},
        {"label_logprobs": [-1.0, -1.0]},
        {"label_logprobs": [[-1.0]]},
        {"vocab_size": 0},
        {"vocab_size": (1 << 20) + 1},
        {"token_ids": np.zeros((1, 2))},
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(changes: dict):
    with pytest.raises(ValueError):
        broken(**changes)


def test_an_empty_head_is_invalid():
    topk = TopKLogprobs([0, 0], [], [], np.zeros((1, 7)), 5, TailDraws.none(1), [0.0])
    with pytest.raises(ValueError, match="1 to 5 entries"):
        topk.validate()
