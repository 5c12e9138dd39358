"""The form in which an answer leaves the engine."""

import numpy as np
import pytest
import torch

from cache_builder.reduction.reduce import ReducedRows, concatenate_rows, reduce_logits
from cache_builder.teachers.wire import pack, pack_all, part_of, reduction_of, split, unpack
from formats.capture_settings import CaptureSettings
from formats.logprobs.topk import TAIL_BETAS


def some_rows(num_rows: int, draw_rate: int = 8) -> ReducedRows:
    generator = torch.Generator().manual_seed(num_rows)
    logits = torch.randn(num_rows, 1003, generator=generator) * 3
    return reduce_logits(
        logits,
        CaptureSettings(min_prob=1e-3, max_k=64, draw_rate=draw_rate),
        labels_N=torch.randint(0, 1003, (num_rows,), generator=generator),
        starts_N=torch.rand(num_rows, dtype=torch.float64, generator=generator),
    )


@pytest.mark.parametrize("draw_rate", [0, 8])
@pytest.mark.parametrize("num_rows", [0, 1, 17])
def test_round_trip(num_rows, draw_rate):
    rows = some_rows(num_rows, draw_rate)
    packed = pack(rows)
    assert packed.dtype == torch.int32 and packed.ndim == 1
    assert len(packed) == 4 + num_rows * (3 + len(TAIL_BETAS)) + 2 * (
        len(rows.token_ids) + len(rows.draw_ids)
    )
    topk = unpack(packed, 1003, draw_rate)
    assert topk.counts.tolist() == rows.counts.tolist()
    assert topk.token_ids.tobytes() == rows.token_ids.numpy().tobytes()
    assert topk.logprobs.tobytes() == rows.logprobs.numpy().tobytes()
    assert topk.log_tail_nodes.tobytes() == rows.log_tail_nodes.numpy().tobytes()
    assert topk.label_logprobs.tobytes() == rows.label_logprobs.numpy().tobytes()
    assert topk.draws.rate == draw_rate and topk.draws.counts.tolist() == rows.draw_counts.tolist()
    assert topk.draws.token_ids.tobytes() == rows.draw_ids.numpy().tobytes()
    assert topk.draws.logprobs.tobytes() == rows.draw_logprobs.numpy().tobytes()
    if num_rows:
        assert (len(topk.draws.token_ids) > num_rows) == (draw_rate > 0)
        topk.validate()


def test_an_answer_says_how_it_was_reduced():
    rows = some_rows(3)
    plain, triton = pack(rows), pack(rows, triton=True)
    assert (reduction_of(plain), reduction_of(triton)) == ("plain", "triton")
    assert (unpack(plain, 1003, 8).token_ids == unpack(triton, 1003, 8).token_ids).all()


def test_a_whole_step_is_packed_as_its_requests_are():
    requests = [some_rows(n) for n in (3, 0, 17, 1)]
    together = pack_all([[part_of(rows)] for rows in requests], triton=True)
    assert [each.tolist() for each in together] == [pack(rows, triton=True).tolist() for rows in requests]
    assert pack_all([]) == []


def test_chunks_of_a_row_join_as_if_never_cut():
    parts = [some_rows(n) for n in (3, 1, 5)]
    whole = concatenate_rows(parts)
    numbers = [[len(part[field]) for part in parts] for field in (0, 1, 6)]
    for one_request in ([part_of(part) for part in parts], split(whole, *numbers)):
        assert pack_all([one_request])[0].tolist() == pack(whole).tolist()
    joined = unpack(pack(whole), 1003, 8)
    ids = np.concatenate([part.token_ids.numpy() for part in parts])
    assert joined.token_ids.tolist() == ids.tolist() and len(joined) == 9
    labels = np.concatenate([part.label_logprobs.numpy() for part in parts])
    assert joined.label_logprobs.tolist() == labels.tolist()
    assert joined.draws.counts.tolist() == [n for part in parts for n in part.draw_counts.tolist()]
    draws = np.concatenate([part.draw_ids.numpy() for part in parts])
    assert joined.draws.token_ids.tolist() == draws.tolist()


def test_no_chunks_are_no_positions_of_the_same_width():
    nothing = unpack(pack(concatenate_rows([])), 1003, 8)
    assert nothing.draws.rate == 8 and len(nothing.draws) == 0
    assert nothing.log_tail_nodes.shape == (0, len(TAIL_BETAS))


def test_special_floats_keep_their_bits():
    rows = ReducedRows(
        torch.tensor([1], dtype=torch.int32),
        torch.tensor([0], dtype=torch.int32),
        torch.tensor([-0.0]),
        torch.full((1, len(TAIL_BETAS)), -torch.inf),
        torch.tensor([-torch.inf]),
        torch.tensor([2], dtype=torch.int32),
        torch.tensor([0, 0], dtype=torch.int32),
        torch.tensor([-0.0, -torch.inf]),
    )
    topk = unpack(pack(rows), 1, 8)
    assert np.signbit(topk.logprobs[0]) and np.isneginf(topk.log_tail_nodes).all()
    assert np.isneginf(topk.label_logprobs).all()
    assert np.signbit(topk.draws.logprobs[0]) and np.isneginf(topk.draws.logprobs[1])


def test_a_torn_message_is_noticed():
    packed = pack(some_rows(3))
    for torn in (packed[:-1], torch.cat([packed, packed[-1:]])):
        with pytest.raises(AssertionError):
            unpack(torn, 1003, 8)
