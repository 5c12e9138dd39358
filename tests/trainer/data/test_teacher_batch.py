"""The ragged teacher targets: shapes, values, and the way from TopKLogprobs."""

import numpy as np
import pytest
import torch
from teacher_batches import batch_from_topk, empty_batch

from formats.errors import FormatError
from formats.logprobs.tail_draws import TailDraws
from formats.logprobs.topk import TAIL_BETAS, TopKLogprobs
from trainer.data.teacher_batch import TeacherBatch


def two_rows(**changes) -> TeacherBatch:
    """Row 1 keeps tokens 4 and 2, row 5 keeps token 0."""
    values = dict(
        rows=torch.tensor([1, 5]),
        offsets=torch.tensor([0, 2, 3]),
        token_ids=torch.tensor([4, 2, 0]),
        logprobs=torch.tensor([-0.5, -1.5, -0.1]),
        log_tail=torch.tensor([-1.7, -2.4]),
        temperature=1.0,
    )
    return TeacherBatch(**{**values, **changes})


def test_lengths():
    assert len(two_rows()) == 2
    assert two_rows().counts.tolist() == [2, 1]
    assert len(empty_batch(2.0)) == 0 and empty_batch(2.0).temperature == 2.0


SHAPE_ERRORS = {
    "offsets": dict(offsets=torch.tensor([0, 3])),
    "tails": dict(log_tail=torch.tensor([-1.0])),
    "logprobs": dict(logprobs=torch.tensor([-1.0])),
    "temperature": dict(temperature=0.0),
    "temperature that is no number": dict(temperature=float("nan")),
}


@pytest.mark.parametrize("name", SHAPE_ERRORS)
def test_shapes_are_checked_at_construction(name):
    with pytest.raises(FormatError):
        two_rows(**SHAPE_ERRORS[name])


VALUE_ERRORS = {
    "rows must be ascending": dict(rows=torch.tensor([5, 1])),
    "rows must lie": dict(rows=torch.tensor([1, 6])),
    "offsets must start": dict(offsets=torch.tensor([1, 2, 3])),
    "offsets must not decrease": dict(offsets=torch.tensor([0, 4, 3])),
    "offsets must end": dict(offsets=torch.tensor([0, 1, 2])),
    "token ids must lie": dict(token_ids=torch.tensor([4, 9, 0])),
    "logprobs must be finite": dict(logprobs=torch.tensor([-0.5, -torch.inf, -0.1])),
    "tails must not be": dict(log_tail=torch.tensor([-1.7, torch.nan])),
    "a token may occur once": dict(token_ids=torch.tensor([4, 4, 0])),
}


@pytest.mark.parametrize("rule", VALUE_ERRORS)
def test_values_are_checked_on_request(rule):
    two_rows().validate(num_rows=6, vocab_size=9)
    two_rows(log_tail=torch.tensor([-torch.inf, -2.4])).validate(num_rows=6, vocab_size=9)
    with pytest.raises(FormatError, match=rule):
        two_rows(**VALUE_ERRORS[rule]).validate(num_rows=6, vocab_size=9)


@pytest.mark.parametrize("temperature", [1 / beta for beta in TAIL_BETAS])
def test_from_topk_takes_the_tail_at_its_temperature(temperature):
    """A vocabulary of eight equal tokens, two of them kept: the tail is log(6 * 8^(-1/T)), by hand."""
    log_eighth = -np.log(8.0)
    nodes = np.array([[np.log(6) + beta * log_eighth for beta in TAIL_BETAS]], dtype=np.float32)
    topk = TopKLogprobs(
        offsets=np.array([0, 2]),
        token_ids=np.array([3, 1], dtype=np.int32),
        logprobs=np.full(2, log_eighth, dtype=np.float32),
        log_tail_nodes=nodes,
        vocab_size=8,
        draws=TailDraws.none(1),
        label_logprobs=[np.nan],
    )
    batch = batch_from_topk([4], topk, temperature)
    batch.validate(num_rows=5, vocab_size=8)
    assert batch.rows.tolist() == [4] and batch.token_ids.tolist() == [3, 1]
    assert batch.temperature == temperature
    assert batch.log_tail.item() == pytest.approx(np.log(6) + log_eighth / temperature, rel=1e-5)


def test_to_moves_every_tensor():
    moved = two_rows().to("meta")
    assert {moved.rows.device.type, moved.offsets.device.type, moved.token_ids.device.type} == {"meta"}
    assert {moved.logprobs.device.type, moved.log_tail.device.type} == {"meta"}
