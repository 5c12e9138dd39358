"""How two captures of the same positions are compared, and the dense computation both must equal.

P: positions, V: vocabulary.
"""

import numpy as np

from formats.disk.token_row import TokenRow
from formats.logprobs.ragged import segment_of
from formats.logprobs.tail_draws import POWER
from formats.logprobs.topk import TAIL_BETAS, TopKLogprobs


def random_rows(
    lengths: list[int], vocab_size: int, seed: int = 0, loss_share: float = 0.5
) -> list[TokenRow]:
    """Rows of random tokens, about `loss_share` of them targets."""
    rng = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        mask = rng.random(length) < loss_share
        mask[:1] = False
        rows.append(TokenRow(rng.integers(6, vocab_size, length), mask))
    return rows


def dense_logprobs(model, row: TokenRow, positions: np.ndarray) -> np.ndarray:
    """float64 [P, V]: log-softmax of the whole vocabulary at the positions, straight from the model."""
    import torch

    with torch.inference_mode():
        logits = model(torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0].double()
    return torch.log_softmax(logits, -1).numpy()[positions]


def assert_head_is_right(topk: TopKLogprobs, dense: np.ndarray, *, min_prob: float, max_k: int, atol: float):
    """Every entry has the dense value; none that clearly belongs to the head is missing or surplus."""
    assert len(topk) == len(dense)
    for p in range(len(topk)):
        a, b = topk.offsets[p], topk.offsets[p + 1]
        ids, values = topk.token_ids[a:b], topk.logprobs[a:b]
        np.testing.assert_allclose(values, dense[p, ids], atol=atol)
        rest = np.delete(dense[p], ids)
        if len(ids) < max_k:  # all that clearly pass the threshold are there
            assert len(rest) == 0 or rest.max() < np.log(min_prob) + atol or rest.max() <= values.max() + atol
            assert len(rest) == 0 or len(ids) == 1 or rest.max() < np.log(min_prob) + atol
        else:
            assert rest.max() <= values.min() + 2 * atol
        assert len(ids) == 1 or values.min() > np.log(min_prob) - atol


def assert_tail_is_right(topk: TopKLogprobs, dense: np.ndarray, *, atol: float):
    """A(beta) at every node equals the sum over all entries outside the head."""
    for p in range(len(topk)):
        rest = np.delete(dense[p], topk.token_ids[topk.offsets[p] : topk.offsets[p + 1]])
        for node, beta in enumerate(TAIL_BETAS):
            top = beta * rest.max()
            expected = top + np.log(np.exp(beta * rest - top).sum())
            assert abs(topk.log_tail_nodes[p, node] - expected) < atol, (p, beta)


def assert_labels_are_right(
    topk: TopKLogprobs, dense: np.ndarray, label_ids: np.ndarray, *, atol: float
) -> None:
    """The dense logprob of every next token, and the very number of its entry where it is kept."""
    np.testing.assert_allclose(topk.label_logprobs, dense[np.arange(len(dense)), label_ids], atol=atol)
    positions, entries = topk.kept_labels(label_ids)
    assert (topk.label_logprobs[positions] == topk.logprobs[entries]).all()


def assert_draws_are_right(topk: TopKLogprobs, dense: np.ndarray, *, atol: float) -> None:
    """Draws are of the tail, have the dense values, and number what the tail's probabilities say, up to one
    for where the points of a position begin."""
    topk.validate()
    at = segment_of(topk.draws.offsets)
    np.testing.assert_allclose(topk.draws.logprobs, dense[at, topk.draws.token_ids], atol=atol)
    expected = topk.draws.rate * np.exp(POWER * dense)
    expected[segment_of(topk.offsets), topk.token_ids] = 0.0
    assert (np.abs(topk.draws.counts - expected.sum(1)) < 1.01).all()
    assert len(dense) < 10 or topk.draws.counts.mean() > 1, "too few to be told from none"


def shared_deviation(one: TopKLogprobs, other: TopKLogprobs) -> tuple[float, float, float]:
    """Mean and largest |difference| of logprobs that both heads hold, and the share of entries both hold."""
    differences, total = [], 0
    for p in range(len(one)):
        mine = dict(zip(*_entries(one, p), strict=True))
        theirs = dict(zip(*_entries(other, p), strict=True))
        total += len(mine.keys() | theirs.keys())
        differences += [abs(mine[j] - theirs[j]) for j in mine.keys() & theirs.keys()]
    array = np.asarray(differences)
    return float(array.mean()), float(array.max()), len(array) / total


def tail_deviation(one: TopKLogprobs, other: TopKLogprobs) -> np.ndarray:
    """|difference| of A at the nodes, at the positions whose heads hold the same ids: float32 [P', B]."""
    same = [
        p for p in range(len(one)) if set(_entries(one, p)[0].tolist()) == set(_entries(other, p)[0].tolist())
    ]
    return np.abs(one.log_tail_nodes[same] - other.log_tail_nodes[same])


def _entries(topk: TopKLogprobs, p: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = topk.offsets[p], topk.offsets[p + 1]
    return topk.token_ids[a:b], topk.logprobs[a:b]
