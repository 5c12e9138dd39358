"""The pooler with vLLM's own metadata and a model whose logits are a table: prefills cut in every way answer
the same. Real engines, whose logits differ in their last bits from batch to batch: test_vllm_teacher.py."""

import numpy as np
import pytest
import torch
from teacher_agreement import assert_draws_are_right, random_rows

from cache_builder.reduction.reduce import reduce_logits
from cache_builder.teachers.wire import pack, unpack
from formats.capture_settings import CaptureSettings
from formats.disk.token_row import TokenRow
from formats.logprobs.tail_draws import starts
from formats.logprobs.topk import TopKLogprobs

pytestmark = pytest.mark.vllm
VOCAB_SIZE, RATE = 1003, 8
CAPTURE = CaptureSettings(min_prob=2.5e-3, max_k=64, draw_rate=RATE)
LENGTHS = [2, 30, 7, 45, 12, 3]


class Table:
    """Its hidden states are (row, position), its logits entries of a table."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.logits = torch.randn(len(LENGTHS), max(LENGTHS), VOCAB_SIZE, generator=generator) * 3

    def compute_logits(self, hidden_T2: torch.Tensor) -> torch.Tensor:
        return self.logits[hidden_T2[:, 0].long(), hidden_T2[:, 1].long()]


@pytest.fixture(scope="module")
def table() -> Table:
    return Table()


def answers(table: Table, rows: list[TokenRow], positions: str, steps: list[list[tuple[int, int]]]):
    """Run steps of (row, tokens) through one pooler; every row's answer."""
    from vllm import PoolingParams
    from vllm.v1.pool.metadata import PoolingMetadata, PoolingStates

    from cache_builder.teachers.vllm_pooler import (
        LABELS_KEY,
        POSITIONS_KEY,
        ROW_KEY,
        TASK,
        TeacherPooler,
        encode_labels,
        encode_positions,
    )

    pooler = TeacherPooler(table, CAPTURE, VOCAB_SIZE)
    states = [PoolingStates() for _ in rows]
    seen = [0] * len(rows)
    found: dict[int, TopKLogprobs] = {}
    for step in steps:
        params, hidden = [], []
        for i, tokens in step:
            labels = rows[i].label_ids(positions)
            asked = {ROW_KEY: rows[i].key, LABELS_KEY: encode_labels(labels)}
            if positions == "loss":
                asked[POSITIONS_KEY] = encode_positions(rows[i].positions("loss"), len(rows[i]))
            params.append(PoolingParams(task=TASK, extra_kwargs=asked))
            hidden += [(i, seen[i] + t) for t in range(tokens)]
            seen[i] += tokens
        chosen = [i for i, _ in step]
        metadata = PoolingMetadata(
            prompt_lens=torch.tensor([len(rows[i]) for i in chosen]),
            prompt_token_ids=None,
            prompt_token_ids_cpu=None,
            pooling_params=params,
            pooling_states=[states[i] for i in chosen],
        )
        metadata.build_pooling_cursor(
            np.array([tokens for _, tokens in step]),
            torch.tensor([seen[i] for i in chosen]),
            torch.device("cpu"),
        )
        for i, packed in zip(chosen, pooler(torch.tensor(hidden), metadata), strict=True):
            assert (packed is not None) == (seen[i] == len(rows[i]))
            if packed is not None:
                found[i] = unpack(packed, VOCAB_SIZE, RATE).validate()
    assert sorted(found) == list(range(len(rows)))
    return [found[i] for i in range(len(rows))]


def cuts(seed: int) -> list[list[tuple[int, int]]]:
    """Steps of a random schedule: every row in pieces, several rows side by side."""
    rng = np.random.default_rng(seed)
    left = dict(enumerate(LENGTHS))
    steps = []
    while left:
        chosen = rng.permutation(list(left))[: rng.integers(1, 4)].tolist()
        steps.append([(i, int(rng.integers(1, left[i] + 1))) for i in chosen])
        for i, tokens in steps[-1]:
            left[i] -= tokens
            if not left[i]:
                del left[i]
    return steps


@pytest.mark.parametrize("positions", ["all", "loss"])
def test_chunks_draw_what_a_whole_prefill_draws(table, positions):
    rows = random_rows(LENGTHS, VOCAB_SIZE)
    whole = answers(table, rows, positions, [[(i, n) for i, n in enumerate(LENGTHS)]])
    for seed in range(8):
        steps = cuts(seed)
        assert len(steps) > 4
        for row, one, other in zip(rows, whole, answers(table, rows, positions, steps), strict=True):
            assert len(one) == len(row.positions(positions))
            assert one.token_ids.tolist() == other.token_ids.tolist()
            assert one.draws.counts.tolist() == other.draws.counts.tolist()
            assert one.draws.token_ids.tolist() == other.draws.token_ids.tolist()
            np.testing.assert_allclose(one.draws.logprobs, other.draws.logprobs, atol=2e-6)
            assert_labels_are_right(other, row, positions, table)


def assert_labels_are_right(topk: TopKLogprobs, row: TokenRow, positions: str, table: Table) -> None:
    """Of the token behind each position, also where a chunk ends between the two."""
    at = row.positions(positions)
    dense = torch.log_softmax(table.logits[LENGTHS.index(len(row))][at].double(), -1).numpy()
    expected = dense[np.arange(len(at)), row.input_ids[at + 1]]
    np.testing.assert_allclose(topk.label_logprobs, expected, atol=2e-5)
    kept, entries = topk.kept_labels(row.input_ids[at + 1])
    assert (topk.label_logprobs[kept] == topk.logprobs[entries]).all()


@pytest.mark.parametrize("positions", ["all", "loss"])
def test_points_start_where_key_and_position_say(table, positions):
    """Not where the step or the chunk began."""
    rows = random_rows(LENGTHS, VOCAB_SIZE)
    for i, (row, topk) in enumerate(zip(rows, answers(table, rows, positions, cuts(1)), strict=True)):
        at = row.positions(positions)
        logits = table.logits[i][at]
        begin = torch.from_numpy(starts(row.key, at))
        expected = reduce_logits(
            logits,
            CAPTURE,
            labels_N=torch.from_numpy(row.label_ids(positions).astype(np.int64)),
            starts_N=begin,
        )
        expected = unpack(pack(expected), VOCAB_SIZE, RATE)
        assert topk.draws.token_ids.tolist() == expected.draws.token_ids.tolist()
        assert_draws_are_right(topk, torch.log_softmax(logits.double(), -1).numpy(), atol=2e-5)


def test_a_request_of_vllms_own_warm_up_has_no_key(table):
    from vllm import PoolingParams
    from vllm.v1.pool.metadata import PoolingMetadata, PoolingStates

    from cache_builder.teachers.vllm_pooler import TASK, TeacherPooler

    metadata = PoolingMetadata(torch.tensor([5]), None, None, [PoolingParams(task=TASK)], [PoolingStates()])
    metadata.build_pooling_cursor(np.array([5]), torch.tensor([5]), torch.device("cpu"))
    hidden = torch.stack([torch.zeros(5), torch.arange(5.0)], 1)
    (packed,) = TeacherPooler(table, CAPTURE, VOCAB_SIZE)(hidden, metadata)
    assert len(unpack(packed, VOCAB_SIZE, RATE).validate()) == 4
