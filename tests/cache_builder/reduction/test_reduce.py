"""The reduction against a dense, slow, independent reference in float64."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cache_builder.reduction import block_sums, heads, reduce
from cache_builder.reduction.block_sums import power_plan
from cache_builder.reduction.blocks import BLOCK, num_blocks
from cache_builder.reduction.in_flight import GPU_PIECES
from cache_builder.reduction.reduce import ReducedRows, concatenate_rows, reduce_logits
from formats.capture_settings import CaptureSettings
from formats.logprobs.topk import TAIL_BETAS

ROOT = Path(__file__).resolve().parents[3]


def reference(logits: np.ndarray, min_prob: float, max_k: int):
    """Per row: (set of ids, {id: logprob}, A at every node), one obvious loop, float64."""
    rows = []
    for row in logits.astype(np.float64):
        shifted = row - row.max()
        logprobs = shifted - np.log(np.exp(shifted).sum())
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        head = [
            j
            for rank, j in enumerate(order[:max_k])
            if rank == 0 or (np.exp(logprobs[j]) >= min_prob and logprobs[j] > -np.inf)
        ]
        rest = np.delete(logprobs, head)
        with np.errstate(divide="ignore"):
            tail = [
                rest.max() * b + np.log(np.exp(b * (rest - rest.max())).sum())
                if len(rest) and rest.max() > -np.inf
                else -np.inf
                for b in TAIL_BETAS
            ]
        rows.append((head, logprobs[head], tail))
    return rows


def split(reduced: ReducedRows):
    ends = np.cumsum(reduced.counts.numpy())
    ids = np.split(reduced.token_ids.numpy(), ends[:-1])
    logprobs = np.split(reduced.logprobs.numpy(), ends[:-1])
    return list(zip(ids, logprobs, reduced.log_tail_nodes.numpy(), strict=True))


def check(logits: torch.Tensor, min_prob: float, max_k: int, *, atol: float = 2e-5) -> ReducedRows:
    reduced = reduce_rows(logits, min_prob=min_prob, max_k=max_k)
    assert reduced.counts.dtype == torch.int32 and reduced.token_ids.dtype == torch.int32
    assert reduced.log_tail_nodes.shape == (len(logits), len(TAIL_BETAS))
    expected = reference(logits.float().numpy(), min_prob, max_k)
    for row, (got, want) in enumerate(zip(split(reduced), expected, strict=True)):
        ids, logprobs, tail = got
        assert list(ids) == list(want[0]), f"row {row}"
        np.testing.assert_allclose(logprobs, want[1], atol=atol, rtol=1e-6)
        np.testing.assert_allclose(tail, want[2], atol=atol, rtol=3e-6)
    check_labels(logits, labels_for(logits), reduced, atol=atol)
    return reduced


def check_labels(logits: torch.Tensor, labels: torch.Tensor, reduced: ReducedRows, *, atol: float) -> None:
    """The log-softmax of the dense row at the label; bit for bit the head's own number where it is there."""
    dense = torch.log_softmax(logits.double(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(reduced.label_logprobs.double(), dense, atol=atol, rtol=1e-6)
    assert reduced.label_logprobs.dtype == torch.float32
    for label, logprob, (ids, logprobs, _) in zip(
        labels.tolist(), reduced.label_logprobs.tolist(), split(reduced), strict=True
    ):
        if label in ids:
            assert logprob == logprobs[list(ids).index(label)]


@pytest.mark.parametrize("rank", [0, 1, 3, 40, 1002])
@pytest.mark.parametrize(("min_prob", "max_k"), [(1e-3, 128), (0.0, 16), (0.5, 2)])
def test_labels_of_every_rank(rank, min_prob, max_k):
    """The likeliest token and the least likely one, in the head and far outside of it."""
    for spread in (0.3, 3.0, 10.0):
        logits = draw(6, 1003, spread)
        labels = logits.argsort(-1, descending=True)[:, rank]
        reduced = reduce_logits(logits, settings(min_prob, max_k), labels_N=labels)
        check_labels(logits, labels, reduced, atol=2e-5)
    logits[:, labels[0]] = -math.inf
    reduced = reduce_logits(logits, settings(min_prob, max_k), labels_N=labels[:1].expand(6))
    assert torch.isneginf(reduced.label_logprobs).all(), "an impossible label"


def settings(min_prob: float, max_k: int) -> CaptureSettings:
    return CaptureSettings(min_prob=min_prob, max_k=max_k, draw_rate=0)


def reduce_rows(logits: torch.Tensor, *, min_prob: float, max_k: int) -> ReducedRows:
    """`reduce_logits` at all nodes with labels from all over the vocabulary."""
    labels = labels_for(logits)
    return reduce_logits(logits, settings(min_prob, max_k), labels_N=labels)


def labels_for(logits: torch.Tensor) -> torch.Tensor:
    return (torch.arange(len(logits)) * 389 + 7) % logits.shape[1]


def draw(num_rows: int, vocab_size: int, spread: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def every_shape(test):
    """Blocks that are full and not, flat and peaked rows, all kinds of heads."""
    for names, values in (
        (("min_prob", "max_k"), [(1e-3, 128), (1e-2, 4), (0.0, 16), (0.5, 128)]),
        ("spread", [0.05, 1.0, 3.0, 10.0]),
        ("vocab_size", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 1003, 32000]),
    ):
        test = pytest.mark.parametrize(names, values)(test)
    return test


@every_shape
def test_equals_the_reference(vocab_size, spread, min_prob, max_k):
    check(draw(5, vocab_size, spread), min_prob, max_k)


def test_inference_mode_may_come_and_go(monkeypatch):
    monkeypatch.setattr(block_sums, "_SCRATCH", {})
    with torch.inference_mode():
        check(draw(5, 1003, 1.0), 1e-3, 128)
    check(draw(5, 1003, 1.0), 1e-3, 128)


@pytest.mark.parametrize("vocab_size", [7, 200, 1003])
def test_whole_vocabulary_leaves_an_empty_tail(vocab_size):
    reduced = check(draw(4, vocab_size, 2.0), 0.0, vocab_size)
    assert (reduced.counts == vocab_size).all()
    assert torch.isneginf(reduced.log_tail_nodes).all()


def test_by_hand():
    # p = 1/2, 1/4, 1/8, 1/8: with min_prob 0.2 the tail is the last two.
    logits = torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log() + 17.0
    ids, logprobs, tail = split(reduce_rows(logits, min_prob=0.2, max_k=9))[0]
    assert list(ids) == [1, 3]
    np.testing.assert_allclose(logprobs, np.log([0.5, 0.25]), rtol=1e-6)
    expected = [math.log(2 * 0.125**beta) for beta in TAIL_BETAS]
    np.testing.assert_allclose(tail, expected, rtol=1e-5, atol=1e-6)


def test_threshold_is_on_the_probability_not_on_the_ratio_to_the_likeliest():
    # 600 equal tokens have p = 1/600 each: all pass 1/1000, none passes 1/500, although all ratios are 1.
    logits = torch.full((1, 600), 3.0)
    assert reduce_rows(logits, min_prob=1e-3, max_k=1000).counts.tolist() == [600]
    assert reduce_rows(logits, min_prob=2e-3, max_k=1000).counts.tolist() == [1]


def test_ties_at_the_cut_are_broken_by_id():
    logits = draw(3, 1003, 0.1)
    logits[:, [5, 70, 71, 500, 1002]] = 8.0
    reduced = check(logits, 1e-3, 3)
    assert reduced.token_ids.tolist() == [5, 70, 71] * 3


def test_one_certain_token():
    logits = torch.zeros(2, 1003)
    logits[0, 17] = 30.0
    logits[1, 1002] = 200.0  # at beta = 2 the tail is e^-400 of the head: below the range of fp32
    reduced = check(logits, 1e-3, 128, atol=1e-4)
    assert reduced.counts.tolist() == [1, 1]
    assert torch.isfinite(reduced.log_tail_nodes).all()


def test_the_tail_of_a_peaked_row_is_not_lost_in_rounding():
    logits = draw(4, 32000, 1.0)
    logits[:, 123] = 35.0  # a tail mass near 1e-11: 1 - sum(p) in fp32 would be zero or noise
    check(logits, 1e-3, 128)


def test_impossible_tokens():
    logits = draw(6, 1003, 2.0)
    logits[0, ::2] = -math.inf
    logits[1, 100:] = -math.inf
    logits[2, 1:] = -math.inf  # one possible token: nothing in the tail
    logits[3, 64:128] = -math.inf
    reduced = check(logits, 1e-3, 128)
    assert torch.isneginf(reduced.log_tail_nodes[2]).all()
    reduced = check(logits, 0.0, 1003)
    assert reduced.counts.tolist()[2] == 1, "an impossible token never enters a head"


@pytest.mark.parametrize(("vocab_size", "spread"), [(1003, 2.0), (32000, 6.0)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_unusable_logits_are_reported_not_hidden(bad, vocab_size, spread):
    """On either road to the head: the first case is flat enough for a top-k, the second is gathered."""
    logits = draw(3, vocab_size, spread)
    logits[1, 700] = bad
    reduced = reduce_rows(logits, min_prob=1e-3, max_k=128)
    rows = split(reduced)
    assert np.isnan(rows[1][1]).any()
    assert not np.isnan(rows[0][1]).any() and not np.isnan(rows[2][1]).any()
    assert int(reduced.token_ids.max()) < vocab_size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_reduced_in_fp32(dtype):
    check(draw(3, 1003, 3.0).to(dtype), 1e-3, 128)


def test_many_more_than_max_k_pass_the_threshold():
    check(draw(3, 4000, 0.3), 1e-4, 8)


def test_rows_do_not_influence_each_other():
    """A flat row sends its chunk down the top-k road; its neighbours must not notice."""
    logits = draw(8, 1003, 3.0)
    alone = [split(reduce_rows(row[None], min_prob=1e-3, max_k=64))[0] for row in logits]
    logits = torch.cat([logits, torch.zeros(4, 1003)])
    together = split(reduce_rows(logits, min_prob=1e-3, max_k=64))
    for one, other in zip(alone, together, strict=False):
        assert list(one[0]) == list(other[0])
        np.testing.assert_allclose(one[1], other[1], atol=2e-6)
        np.testing.assert_allclose(one[2], other[2], atol=2e-6)


def test_chunks_join_in_order(monkeypatch):
    logits = draw(23, 1003, 2.0)
    whole = reduce_rows(logits, min_prob=1e-3, max_k=128)
    monkeypatch.setattr(reduce, "CPU_CHUNK_BYTES", 3 * 4 * 1003)
    parts = reduce_rows(logits, min_prob=1e-3, max_k=128)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("min_prob", [1e-3, 0.0])
def test_flat_rows_are_reduced_in_smaller_pieces(monkeypatch, min_prob):
    """On a GPU, whose memory a top-k over a whole chunk would fill with copies."""
    logits = torch.cat([draw(9, 1003, 3.0), torch.zeros(7, 1003), draw(4, 1003, 0.1)])
    whole = reduce_rows(logits, min_prob=min_prob, max_k=40)
    sizes = []
    real = reduce.dense_head
    monkeypatch.setattr(reduce, "dense_head", lambda x, *rest: sizes.append(len(x)) or real(x, *rest))
    monkeypatch.setattr(reduce, "rows_per_dense_chunk", lambda *_: 3)
    for one, other in zip(whole, reduce_rows(logits, min_prob=min_prob, max_k=40), strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-6)
    assert sizes and max(sizes) == 3


def test_the_hardest_rows_take_the_hardest_road(monkeypatch):
    """A top-k, with ties at its cut, in every row of as many chunks as are under way."""
    monkeypatch.setattr(reduce, "CPU_CHUNK_BYTES", 40 * 4 * 5003)
    sorts = []
    real = heads._topk_by_id
    monkeypatch.setattr(
        heads, "_topk_by_id", lambda x, k: sorts.append((len(x), x.unique().tolist())) or real(x, k)
    )
    reduced = reduce.reduce_hardest(5003, settings(1e-2, 128), torch.device("cpu"))
    assert sorts == [(40, [0.0])] * GPU_PIECES and reduced.counts.tolist() == [1] * 40 * GPU_PIECES


def test_a_gpu_takes_large_chunks_but_for_a_top_k(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    for memory, rows, dense in ((80, 1046, 130), (24, 784, 98), (16, 523, 65), (141, 1046, 130)):
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda _, memory=memory: SimpleNamespace(total_memory=memory << 30),
        )
        assert reduce.rows_per_chunk(128_256, reduce.chunk_bytes(gpu)) == rows
        assert reduce.rows_per_dense_chunk(128_256, gpu) == dense
    assert (
        reduce.rows_per_chunk(1 << 40, reduce.chunk_bytes(gpu))
        == reduce.rows_per_dense_chunk(1 << 40, gpu)
        == 1
    )
    assert reduce.rows_per_chunk(128_256, reduce.chunk_bytes(cpu)) == 130
    assert reduce.rows_per_dense_chunk(128_256, cpu) == 130


def test_no_rows():
    reduced = reduce_rows(torch.zeros(0, 50), min_prob=1e-3, max_k=5)
    assert [len(column) for column in reduced] == [0] * 8
    assert len(concatenate_rows([reduced, reduced]).counts) == 0


def test_the_input_is_left_alone():
    logits = draw(4, 1003, 2.0)
    before = logits.clone()
    for min_prob in (0.0, 1e-3):
        reduce_rows(logits, min_prob=min_prob, max_k=32)
    assert torch.equal(logits, before)


def test_every_node_but_the_first_is_a_product():
    plan = power_plan(TAIL_BETAS)
    assert plan[0] is None
    for node, pair in enumerate(plan[1:], start=1):
        assert pair is not None, f"beta {TAIL_BETAS[node]} costs an exponential of its own"
        assert TAIL_BETAS[pair[0]] + TAIL_BETAS[pair[1]] == TAIL_BETAS[node]
    assert power_plan((0.3, 1.0)) == (None, None)


def test_no_power_is_overwritten_before_its_last_use():
    for plan in (power_plan(TAIL_BETAS), power_plan((0.25, 0.5, 1.0, 2.0)), power_plan((0.3, 1.0, 1.3))):
        count, slots = block_sums._assign_buffers(plan)
        assert max(slots) == count - 1
        holds = {}
        for node, pair in enumerate(plan):
            for factor in pair or ():
                assert holds[slots[factor]] == factor
            holds[slots[node]] = node


def test_block_sums_and_maxima_by_hand():
    # Two entries more than a block holds make two blocks, the even and the odd ids.
    logits = torch.arange(BLOCK + 2, dtype=torch.float32)[None] * 0.1
    last = (BLOCK + 1) * 0.1
    maxima = block_sums.block_maxima(logits)
    assert maxima.tolist() == [[pytest.approx(last - 0.1), pytest.approx(last)]]
    sums = block_sums.block_sums(logits, maxima, (0.5, 1.0))
    expected = np.exp(np.arange(BLOCK + 2) * 0.1 - last)
    even = np.exp(0.1) * expected[::2].sum()  # each relative to its own maximum
    assert sums[0, 1].tolist() == [pytest.approx(even), pytest.approx(expected[1::2].sum())]
    assert sums[0, 0].tolist()[1] == pytest.approx(np.sqrt(expected[1::2]).sum())


@pytest.mark.parametrize("vocab_size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 1003, 4099])
def test_blocks_cover_every_id_once(vocab_size):
    blocks = num_blocks(vocab_size)
    logits = draw(3, vocab_size, 2.0)
    logits[1, ::blocks] = -math.inf
    maxima, sums = block_sums.block_statistics(logits, TAIL_BETAS)
    assert maxima.shape == (3, blocks) and sums.shape == (3, len(TAIL_BETAS), blocks)
    assert maxima[1, 0] == -math.inf and (sums[1, :, 0] == 0).all()
    for block in range(blocks):
        members = logits[:, block::blocks]
        assert torch.equal(maxima[:, block], members.amax(-1)) and members.shape[1] <= BLOCK
        for node, beta in enumerate(TAIL_BETAS):
            expected = ((members - members.amax(-1, keepdim=True)) * beta).exp().sum(-1).nan_to_num(0.0)
            torch.testing.assert_close(sums[:, node, block], expected, atol=0, rtol=2e-5)


def test_totals_are_those_of_the_whole_row():
    logits = draw(4, 1003, 3.0)
    logits[2, 5:] = -math.inf
    blocks = block_sums.block_statistics(logits, TAIL_BETAS)
    top = logits.amax(-1) + torch.tensor([0.0, 1.0, 2.0, -3.0])
    found = block_sums.totals(blocks, TAIL_BETAS, top)
    for node, beta in enumerate(TAIL_BETAS):
        expected = (beta * (logits.double() - top[:, None])).exp().sum(-1).float()
        torch.testing.assert_close(found[:, node], expected, atol=0, rtol=2e-5)


@pytest.mark.parametrize(("min_prob", "max_k"), [(1e-2, 128), (1e-2, 3), (0.5, 2), (0.0, 16)])
@pytest.mark.parametrize("vocab_size", [1003, 32000])
def test_as_much_room_as_there_can_be_is_room_for_what_there_is(monkeypatch, vocab_size, min_prob, max_k):
    """What a GPU does, which is asked for sizes only where it has to be: room that stays empty changes nothing."""
    logits = torch.cat([draw(5, vocab_size, spread) for spread in (0.05, 1.0, 3.0, 10.0)]).bfloat16().float()
    logits[3, 5] = math.nan
    logits[4, 10:] = -math.inf
    parts = logits, logits[3:4]
    asked = [reduce_rows(part, min_prob=min_prob, max_k=max_k) for part in parts]
    real = heads._room
    monkeypatch.setattr(heads, "_room", lambda counts, most, ask: real(counts, most, most > heads.MAX_BOUND))
    for part, wanted in zip(parts, asked, strict=True):
        for one, other in zip(wanted, reduce_rows(part, min_prob=min_prob, max_k=max_k), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
