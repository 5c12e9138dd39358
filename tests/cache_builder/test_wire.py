"""The form in which an answer leaves the engine."""

import numpy as np
import pytest
import torch

from cache_builder.reduce import ReducedRows, concatenate_rows, reduce_logits
from cache_builder.wire import pack, unpack
from formats.topk import TAIL_BETAS


def some_rows(num_rows: int) -> ReducedRows:
    logits = torch.randn(num_rows, 1003, generator=torch.Generator().manual_seed(num_rows)) * 3
    return reduce_logits(logits, min_prob=1e-3, max_k=64, betas=TAIL_BETAS)


@pytest.mark.parametrize("num_rows", [0, 1, 17])
def test_round_trip(num_rows):
    rows = some_rows(num_rows)
    packed = pack(rows)
    assert packed.dtype == torch.int32 and packed.ndim == 1
    assert len(packed) == 2 + num_rows * (1 + len(TAIL_BETAS)) + 2 * len(rows.token_ids)
    topk = unpack(packed, 1003)
    assert topk.counts.tolist() == rows.counts.tolist()
    assert topk.token_ids.tobytes() == rows.token_ids.numpy().tobytes()
    assert topk.logprobs.tobytes() == rows.logprobs.numpy().tobytes()
    assert topk.log_tail_nodes.tobytes() == rows.log_tail_nodes.numpy().tobytes()
    if num_rows:
        topk.validate()


def test_chunks_of_a_row_join_as_if_never_cut():
    parts = [some_rows(n) for n in (3, 1, 5)]
    joined = unpack(pack(concatenate_rows(parts, len(TAIL_BETAS))), 1003)
    ids = np.concatenate([part.token_ids.numpy() for part in parts])
    assert joined.token_ids.tolist() == ids.tolist() and len(joined) == 9


def test_special_floats_keep_their_bits():
    rows = ReducedRows(
        torch.tensor([1], dtype=torch.int32),
        torch.tensor([0], dtype=torch.int32),
        torch.tensor([-0.0]),
        torch.full((1, len(TAIL_BETAS)), -torch.inf),
    )
    topk = unpack(pack(rows), 1)
    assert np.signbit(topk.logprobs[0]) and np.isneginf(topk.log_tail_nodes).all()


def test_a_torn_message_is_noticed():
    packed = pack(some_rows(3))
    with pytest.raises(AssertionError):
        unpack(packed[:-1], 1003)
