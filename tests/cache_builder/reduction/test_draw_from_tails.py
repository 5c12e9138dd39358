"""Tail draws of the reduction: every tail token as often as it should be, nothing else ever."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cache_builder.reduction import reduce
from cache_builder.reduction.blocks import BLOCK, num_blocks
from cache_builder.reduction.reduce import ReducedRows, reduce_logits
from cache_builder.teachers.wire import pack, unpack
from formats.capture_settings import CaptureSettings
from formats.logprobs import tail_draws
from formats.logprobs.ragged import offsets_of, segment_of
from formats.logprobs.topk import TopKLogprobs

RATE = 8
VOCAB_SIZES = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 1003, 4099]
HEADS = [(2.5e-3, 128), (1e-2, 4), (0.0, 16), (0.5, 128)]


def some_logits(num_rows: int, vocab_size: int, spread: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def some_starts(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(num_rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels_for(logits: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(logits), dtype=torch.int64)


def drawn(logits, starts, *, min_prob=2.5e-3, max_k=128, rate=RATE) -> ReducedRows:
    """Reduce, and check all that has to hold whatever was drawn."""
    capture, labels = CaptureSettings(min_prob=min_prob, max_k=max_k, draw_rate=rate), labels_for(logits)
    reduced = reduce_logits(logits, capture, labels_N=labels, starts_N=starts)
    assert reduced.draw_counts.dtype == reduced.draw_ids.dtype == torch.int32
    assert reduced.draw_logprobs.dtype == torch.float32
    plain = reduce_logits(logits, replace(capture, draw_rate=0), labels_N=labels)
    for name in ("counts", "token_ids", "logprobs", "log_tail_nodes", "label_logprobs"):
        one, other = getattr(plain, name), getattr(reduced, name)
        assert torch.equal(one, other) or torch.isnan(one).any(), "draws must not change the rest"
    assert plain.draw_counts.tolist() == [0] * len(logits) and len(plain.draw_ids) == 0
    return reduced


def captured(logits, starts, **settings) -> TopKLogprobs:
    """The same as the rest of the program gets it: draws of the head or outside the vocabulary are refused,
    and logprobs are those of the whole vocabulary."""
    rate = settings.get("rate", RATE)
    topk = unpack(pack(drawn(logits, starts, **settings)), logits.shape[1], rate).validate()
    dense = torch.log_softmax(logits.double(), -1).numpy()
    at = segment_of(topk.draws.offsets)
    np.testing.assert_allclose(topk.draws.logprobs, dense[at, topk.draws.token_ids], atol=2e-5, rtol=1e-6)
    return topk


def expected_hits(logits: torch.Tensor, topk: TopKLogprobs, rate: int = RATE) -> np.ndarray:
    """float64 [N, V]: rate * p^(3/4), 0 in the head."""
    expected = rate * torch.softmax(logits.double(), -1).numpy() ** 0.75
    expected[segment_of(topk.offsets), topk.token_ids] = 0.0
    return expected


def hits_over_a_grid(row: torch.Tensor, grid: int = 400, **settings) -> tuple[np.ndarray, np.ndarray]:
    """How often each token is drawn on average over evenly spaced starts, and how often it should be."""
    starts = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    topk = captured(row.expand(grid, -1), starts, **settings)
    hits = np.bincount(topk.draws.token_ids, minlength=len(row)) / grid
    return hits, expected_hits(row[None], topk.slice(0, 1), settings.get("rate", RATE))[0]


@pytest.mark.parametrize(("min_prob", "max_k"), HEADS)
@pytest.mark.parametrize("spread", [0.05, 1.0, 3.0, 6.0])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_every_tail_token_is_drawn_as_often_as_it_should_be(vocab_size, spread, min_prob, max_k):
    """An interval holds as many points of a grid as its length says, but for one."""
    (row,) = some_logits(1, vocab_size, spread)
    hits, expected = hits_over_a_grid(row, min_prob=min_prob, max_k=max_k)
    assert (np.abs(hits - expected) <= 1 / 400 + 1e-4 * expected + 1e-9).all()
    assert (hits[expected == 0] == 0).all()


@pytest.mark.parametrize(("min_prob", "road"), [(2.5e-3, "sparse_head"), (1e-7, "dense_head")])
def test_on_both_roads_to_the_head(monkeypatch, min_prob, road):
    monkeypatch.setenv("ANNEAL_TRITON", "0")
    taken = []
    for name in ("dense_head", "sparse_head"):
        real = getattr(reduce, name)
        monkeypatch.setattr(reduce, name, lambda *a, name=name, real=real: taken.append(name) or real(*a))
    (row,) = some_logits(1, 4099, 6.0, seed=3)
    hits, expected = hits_over_a_grid(row, grid=1000, rate=32, min_prob=min_prob)
    assert set(taken) == {road}
    assert (np.abs(hits - expected) <= 1 / 1000 + 1e-4 * expected).all()
    # Tokens beside a head entry, in a block that was gathered for it, are drawn like all others.
    blocks = num_blocks(4099)
    head = np.flatnonzero(torch.softmax(row.double(), -1).numpy() >= 2.5e-3)
    beside = np.isin(np.arange(4099) % blocks, head % blocks) & (expected > 0)
    if road == "sparse_head":
        assert hits[beside].sum() == pytest.approx(expected[beside].sum(), rel=0.05) and hits[beside].any()


def test_by_hand():
    # p = 1/2, 1/4, 1/8, 1/8: the tail is ids 0 and 2, each expected 8 * (1/8)^(3/4) = 1.68 times.
    logits = torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log() + 17.0
    starts = torch.tensor([0.3], dtype=torch.float64)  # points 0.3, 1.3 | 2.3, 3.3 on a line of 3.36
    reduced = drawn(logits, starts, min_prob=0.2)
    assert reduced.draw_counts.tolist() == [4] and reduced.draw_ids.tolist() == [0, 0, 2, 2]
    np.testing.assert_allclose(reduced.draw_logprobs, [math.log(0.125)] * 4, rtol=1e-6)


@pytest.mark.parametrize("rate", [1, 8, 64])
@pytest.mark.parametrize(("vocab_size", "spread"), [(1003, 0.0), (1003, 2.0), (4099, 6.0), (32000, 4.0)])
def test_as_many_and_as_likely_as_the_plain_drawing(vocab_size, spread, rate):
    """`formats.logprobs.tail_draws.draw` takes the tokens of a tail in another order: equally many, other tokens."""
    logits, starts = some_logits(12, vocab_size, spread), some_starts(12)
    topk = captured(logits, starts, rate=rate)
    expected = expected_hits(logits, topk, rate)
    rows, ids = expected.nonzero()
    logprobs = torch.log_softmax(logits.double(), -1).numpy()[rows, ids]
    offsets = offsets_of(np.bincount(rows, minlength=12))
    plain = tail_draws.draw(offsets, ids.astype(np.int32), logprobs, rate, starts.numpy())
    assert topk.draws.counts.tolist() == plain.counts.tolist()
    assert topk.draws.counts.sum() == pytest.approx(expected.sum(), abs=6)
    # Estimates of the tail's mass, which nothing but draws goes into.
    mass = [
        np.bincount(segment_of(d.offsets), np.exp(d.logprobs) * d.weights, minlength=12)
        for d in (topk.draws, plain)
    ]
    true = np.exp(topk.log_tail(1.0))
    if rate == 64 and spread:
        for estimate in mass:
            np.testing.assert_allclose(estimate.sum(), true.sum(), rtol=0.1)


def test_a_likely_token_of_the_tail_is_drawn_more_than_once():
    topk = captured(torch.zeros(1, 4), some_starts(1), min_prob=0.9, rate=64)
    assert topk.counts.tolist() == [1]
    per_token = np.bincount(topk.draws.token_ids, minlength=4)
    assert per_token[0] == 0 and set(per_token[1:].tolist()) <= {22, 23}, "64 * (1/4)^(3/4) = 22.6"


@pytest.mark.parametrize("vocab_size", [1, 7, 200, 1003])
def test_where_there_is_no_tail_nothing_is_drawn(vocab_size):
    starts = torch.tensor([0.0, 0.5, 1.0 - 2**-53, 0.0], dtype=torch.float64)
    topk = captured(some_logits(4, vocab_size, 2.0), starts, min_prob=0.0, max_k=vocab_size, rate=64)
    assert topk.draws.counts.tolist() == [0] * 4


def test_peaked_rows():
    """Tails down to what fp32 cannot hold: a start of exactly 0 may hit what is left."""
    logits = some_logits(6, 1003, 1.0)
    for row, peak in enumerate((12.0, 30.0, 80.0, 120.0, 200.0, 3e4)):
        logits[row, 100 * row] = peak
    for start in (0.0, 1e-12, 0.5):
        topk = captured(logits, torch.full((6,), start, dtype=torch.float64), rate=64)
        assert topk.draws.counts[4:].tolist() == [0, 0]
        assert topk.draws.counts[0] > 0
    assert topk.draws.counts[1:].tolist() == [0] * 5


@pytest.mark.parametrize(("min_prob", "max_k"), HEADS)
def test_impossible_tokens_are_never_drawn(min_prob, max_k):
    logits = some_logits(5, 1003, 2.0)
    logits[0, ::2] = -math.inf
    logits[1, 100:] = -math.inf
    logits[2, 1:] = -math.inf  # one possible token: nothing in the tail
    logits[3, 64:128] = -math.inf
    logits[4, :-1] = -math.inf
    for seed in range(5):
        topk = unpack(pack(drawn(logits, some_starts(5, seed), min_prob=min_prob, max_k=max_k)), 1003, RATE)
        topk.validate()
        assert topk.draws.counts[[2, 4]].tolist() == [0, 0] and topk.draws.counts[[0, 1]].min() > 0
        assert np.isfinite(topk.draws.logprobs).all()


@pytest.mark.parametrize(("vocab_size", "spread"), [(1003, 2.0), (32000, 6.0)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_unusable_logits_draw_nothing_and_harm_no_neighbour(bad, vocab_size, spread):
    logits, starts = some_logits(4, vocab_size, spread), some_starts(4)
    sound = drawn(logits, starts)
    logits[1, 700] = bad
    logits[3] = bad
    reduced = drawn(logits, starts)
    counts = sound.draw_counts.tolist()
    assert reduced.draw_counts.tolist() == [counts[0], 0, counts[2], 0] and counts[0] and counts[2]
    ids = sound.draw_ids.split(counts)
    assert reduced.draw_ids.tolist() == [*ids[0].tolist(), *ids[2].tolist()]
    alone = drawn(torch.full((2, vocab_size), bad), starts[:2])
    assert alone.draw_counts.tolist() == [0, 0]


@pytest.mark.parametrize("spread", [0.3, 2.0, 6.0])
def test_draws_depend_on_the_row_alone(monkeypatch, spread):
    """However rows are cut into chunks, and whatever road to the head their neighbours ask for."""
    logits, starts = some_logits(23, 1003, spread), some_starts(23)
    whole = drawn(logits, starts)
    alone = [drawn(row[None], start[None]) for row, start in zip(logits, starts, strict=True)]
    beside = drawn(torch.cat([logits, torch.zeros(40, 1003)]), torch.cat([starts, starts, starts[:17]]))
    monkeypatch.setattr(reduce, "CPU_CHUNK_BYTES", 3 * 4 * 1003)
    chunks = drawn(logits, starts)
    size = len(whole.draw_ids)
    for other in (chunks, reduce.concatenate_rows(alone), beside):
        assert other.draw_counts[:23].tolist() == whole.draw_counts.tolist()
        assert other.draw_ids[:size].tolist() == whole.draw_ids.tolist()
        torch.testing.assert_close(other.draw_logprobs[:size], whole.draw_logprobs, atol=2e-6, rtol=1e-6)
    monkeypatch.undo()
    again = drawn(logits, starts)
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_type_of_logits(dtype):
    logits = some_logits(9, 1003, 3.0).to(dtype)
    topk = captured(logits, some_starts(9))
    expected = expected_hits(logits, topk).sum(-1)
    assert (np.abs(topk.draws.counts - expected) < 1.001).all()


def test_ends_of_the_line():
    """Starts as small and as large as they get, on lines of every length."""
    generator = torch.Generator().manual_seed(5)
    for vocab_size in (2, 33, 1003):
        logits = some_logits(400, vocab_size, 1.0, seed=vocab_size)
        logits *= torch.rand(400, 1, generator=generator) * 8
        for start in (0.0, 5e-324, 1e-17, 0.5, 1.0 - 2**-53):
            starts = torch.full((400,), start, dtype=torch.float64)
            for rate, max_k in ((1, 1), (64, 4)):
                topk = captured(logits, starts, rate=rate, max_k=max_k)
                length = expected_hits(logits, topk, rate).sum(-1)
                assert (np.abs(topk.draws.counts - (length - start)) <= 1 + 1e-4 * length).all()


def test_no_rows_and_no_starts():
    capture = CaptureSettings(min_prob=0.1, max_k=5, draw_rate=8)
    none = reduce_logits(
        torch.zeros(0, 50),
        capture,
        labels_N=torch.zeros(0, dtype=torch.int64),
        starts_N=torch.zeros(0, dtype=torch.float64),
    )
    assert [len(column) for column in none[-3:]] == [0, 0, 0]
    for starts in (None, torch.zeros(1, dtype=torch.float64), torch.zeros(2)):
        with pytest.raises(AssertionError):
            labels = torch.zeros(2, dtype=torch.int64)
            reduce_logits(torch.zeros(2, 50), capture, labels_N=labels, starts_N=starts)
