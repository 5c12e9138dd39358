"""The entropy from kept tokens and the tail function, against the sum over the whole vocabulary."""

import numpy as np
import pytest
from make_teachers import capture, log_softmax

from formats.logprobs.entropy import entropy, tail_slope

VOCABULARY = 8000
ONE = 4  # the node beta = 1


def shapes() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    ranks = np.log(np.arange(1.0, VOCABULARY + 1))
    return {
        "normal": rng.normal(size=(8, VOCABULARY)) * np.linspace(0.5, 4, 8)[:, None],
        "zipf": -np.linspace(0.7, 2.5, 8)[:, None] * ranks,
        "sure": np.where(np.arange(VOCABULARY) == 3, 12.0, rng.normal(size=(2, VOCABULARY))),
    }


@pytest.mark.parametrize("name", shapes())
@pytest.mark.parametrize("min_prob", (5e-3, 1e-2, 5e-2))
def test_it_is_that_of_the_whole_vocabulary(name, min_prob):
    logprobs = log_softmax(shapes()[name])
    topk = capture(logprobs, min_prob=min_prob)
    dense = -(np.exp(logprobs) * logprobs).sum(axis=1)
    error = np.abs(entropy(topk) - dense)
    assert error.max() < (0.04 if min_prob <= 1e-2 else 0.08)  # nats, of up to 9
    # The bound that needs no knowledge of the distribution.
    _, lower, upper = tail_slope(topk.log_tail_nodes)
    assert (error <= np.exp(topk.log_tail_nodes[:, ONE]) * (upper - lower) + 1e-5).all()


def test_it_is_exact_without_a_tail_and_with_a_tail_of_one_token():
    logits = np.array([[2.0, 1.0, 0.0, -1.0]])
    logprobs = log_softmax(logits)
    dense = -(np.exp(logprobs) * logprobs).sum()
    for kept in (4, 3):  # a single token's tail function is a straight line
        assert entropy(capture(logprobs, min_prob=0.0, max_k=kept)) == pytest.approx(dense, abs=1e-6)


def test_the_slope_never_leaves_the_chords_around_it():
    rng = np.random.default_rng(2)
    logprobs = log_softmax(rng.normal(size=(50, 300)) * rng.uniform(0, 40, (50, 1)))
    slope, lower, upper = tail_slope(capture(logprobs, min_prob=0.02).log_tail_nodes)
    assert ((lower <= slope) & (slope <= upper)).all()
