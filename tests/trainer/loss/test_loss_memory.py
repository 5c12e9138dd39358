"""What the loss never does: allocate [rows, V], project a row that does not count, wait for the device twice.

Counted, not timed.
"""

import itertools

import pytest
import torch
from loss_cases import Case, make_case
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.loss.chunks import rows_per_chunk
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
    case = make_case(1000, HIDDEN_SIZE, VOCAB_SIZE, temperature=temperature, max_kept=5)
    recorder = record(case, kl_direction=direction)
    assert recorder.largest <= max(16 * VOCAB_SIZE, VOCAB_SIZE * HIDDEN_SIZE, 1000 * HIDDEN_SIZE)
    assert recorder.largest < 1000 * VOCAB_SIZE / 50


@pytest.mark.parametrize("with_teacher", (False, True))
def test_only_rows_that_count_are_projected_and_each_once(with_teacher):
    case = make_case(200, HIDDEN_SIZE, VOCAB_SIZE, max_kept=5)
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
    case = make_case(20, HIDDEN_SIZE, VOCAB_SIZE * 8, max_kept=5)
    head = case.weight.numel()
    assert record(case, chunk_size=1).largest >= head
    assert record(case, chunk_size=1, frozen_head=True).largest == head  # only the transposed views of it


VOCAB_SIZES = (1000, 32_000, 128_256, 262_144)


@pytest.mark.parametrize(("device_type", "budget"), (("cpu", 64 << 20), ("mps", 256 << 20)))
def test_chunks_fill_their_budget_but_never_have_few_rows(device_type, budget):
    for vocab_size, num_buffers in itertools.product(VOCAB_SIZES, (1, 2, 4)):
        rows = rows_per_chunk(vocab_size, num_buffers, device_type)
        row_bytes = vocab_size * num_buffers * 4
        assert rows == 256 or rows * row_bytes <= budget < (rows + 1) * row_bytes
        assert rows >= 256
    assert rows_per_chunk(32_000, 1, "cpu") == 524


@pytest.mark.parametrize("device_gib", (8, 24, 80, 141))
@pytest.mark.parametrize("trained", (True, False))
def test_chunks_of_a_gpu_are_whole_tiles_and_the_same_on_every_large_one(trained, device_gib):
    """2,048 rows, or half of them where the head wants no gradient; fewer where they would take an eighth of it."""
    memory, wanted = device_gib << 30, 2048 if trained else 1024
    for vocab_size, num_buffers in itertools.product(VOCAB_SIZES, (0.5, 1, 2, 4)):
        rows = rows_per_chunk(vocab_size, num_buffers, "cuda", memory, trained=trained)
        row_bytes = vocab_size * num_buffers * 4
        assert rows % 256 == 0 and 256 <= rows <= wanted
        assert rows * row_bytes <= max(memory / 8, 256 * row_bytes)
        assert rows == wanted or (rows + 256) * row_bytes > memory / 8
    assert rows_per_chunk(128_256, 0.5, "cuda", memory, trained=trained) == wanted
    assert rows_per_chunk(262_144, 3, "cuda", 8 << 30, trained=trained) == 256


class HostReads(TorchDispatchMode):
    """Refuses operations that make a GPU's host wait because their result's size is a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        assert name not in ("aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select"), name
        if name == "aten::repeat_interleave":
            assert kwargs.get("output_size") is not None
        if name == "aten::index":
            assert all(index is None or index.dtype != torch.bool for index in args[1])
        return func(*args, **kwargs)


@pytest.mark.parametrize("temperature", (1.0, 2.0))
def test_the_host_reads_from_the_device_once(temperature, monkeypatch):
    """What would be a wait on a GPU: one `tolist` per call, whatever is checked and however many chunks."""
    case = make_case(200, HIDDEN_SIZE, VOCAB_SIZE, max_kept=5, temperature=temperature, draw_rate=8.0)
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(len(self)) or tolist(self))
    hidden, weight = case.hidden.float().requires_grad_(), case.weight.float().requires_grad_()
    counts = {"num_ce": torch.tensor(80), "num_kl": 70}
    with HostReads():
        label_annealing_loss(hidden, weight, case.labels, case.teacher, chunk_size=16, **counts)
    assert len(reads) == 1
