"""What the loss never does: allocate [rows, V], or project a row that does not count. Counted, not timed."""

import pytest
import torch
from loss_cases import Case, make_case
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.loss.chunks import default_chunk_size
from trainer.loss.label_annealing_loss import label_annealing_loss

VOCAB_SIZE = 512
HIDDEN_SIZE = 8


class Recorder(TorchDispatchMode):
    """Records the largest tensor that any operation returned, and how many rows met the head."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.projected_rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        if func._schema.name == "aten::mm" and out.shape[-1] == VOCAB_SIZE:
            self.projected_rows += out.shape[0]
        return out


def record(case: Case, *, frozen_head: bool = False, chunk_size: int = 16, **arguments) -> Recorder:
    hidden = case.hidden.float().requires_grad_()
    weight = case.weight.float().requires_grad_(not frozen_head)
    with Recorder() as recorder:
        out = label_annealing_loss(
            hidden, weight, case.labels, case.teacher, chunk_size=chunk_size, **arguments
        )
        out.loss.backward()
    return recorder


def counting_rows(case: Case) -> int:
    counts = case.labels != -100
    if case.teacher is not None:
        counts[case.teacher.rows] = True
    return int(counts.sum())


@pytest.mark.parametrize("temperature", (1.0, 2.0))
@pytest.mark.parametrize("direction", ("forward", "reverse"))
def test_the_largest_tensor_is_one_chunk_or_the_head(direction, temperature):
    case = make_case(1000, HIDDEN_SIZE, VOCAB_SIZE, temperature=temperature, max_head=5)
    recorder = record(case, kl_direction=direction)
    assert recorder.largest <= max(16 * VOCAB_SIZE, VOCAB_SIZE * HIDDEN_SIZE, 1000 * HIDDEN_SIZE)
    assert recorder.largest < 1000 * VOCAB_SIZE / 50


@pytest.mark.parametrize("with_teacher", (False, True))
def test_only_rows_that_count_are_projected_and_each_once(with_teacher):
    case = make_case(200, HIDDEN_SIZE, VOCAB_SIZE, max_head=5)
    if not with_teacher:
        case.teacher = None
    expected = counting_rows(case)
    assert 0 < expected < 200
    assert record(case).projected_rows == expected


def test_nothing_is_projected_when_nothing_counts():
    case = make_case(20, HIDDEN_SIZE, VOCAB_SIZE)
    case.teacher, case.labels = None, torch.full_like(case.labels, -100)
    assert record(case).projected_rows == 0


def test_a_frozen_head_gets_no_gradient_buffer():
    case = make_case(20, HIDDEN_SIZE, VOCAB_SIZE * 8, max_head=5)
    head = case.weight.numel()
    assert record(case, chunk_size=1).largest >= head
    assert record(case, chunk_size=1, frozen_head=True).largest == head  # only the transposed views of it


@pytest.mark.parametrize(("device_type", "budget"), (("cpu", 64 << 20), ("cuda", 256 << 20)))
def test_chunks_fill_their_budget_but_never_have_few_rows(device_type, budget):
    for vocab_size in (1000, 32_000, 128_256, 262_144):
        for num_buffers in (1, 2, 4):
            rows = default_chunk_size(vocab_size, num_buffers, device_type)
            row_bytes = vocab_size * num_buffers * 4
            assert rows == 256 or rows * row_bytes <= budget < (rows + 1) * row_bytes
            assert rows >= 256
    assert default_chunk_size(32_000, 1, "cpu") == 524
