"""Several chunks under way at a time: in which order work is queued, and that the bits do not depend on it."""

import pytest
import torch

from cache_builder.reduction import reduce
from cache_builder.reduction.in_flight import GPU_PIECES, run_in_order
from formats.capture_settings import CaptureSettings


def piece(log: list[str], name: str, steps: int):
    """Queues `steps` batches of work and asks for its own number of the step before each but the first."""
    for step in range(steps - 1):
        log.append(f"{name}{step}")
        answered = yield torch.tensor([step, 7])
        assert answered == [step, 7]
    log.append(f"{name}{steps - 1}")
    return name


def test_a_gpu_has_later_pieces_to_work_on_while_the_host_waits():
    log: list[str] = []
    found = run_in_order((piece(log, name, 3) for name in "abcde"), "cuda")
    assert found == list("abcde")
    assert " ".join(log) == "a0 b0 a1 c0 a2 b1 d0 b2 c1 e0 c2 d1 d2 e1 e2"


def test_a_cpu_ends_one_piece_before_the_next():
    log: list[str] = []
    assert run_in_order((piece(log, name, 3) for name in "abc"), "cpu") == list("abc")
    assert log == sorted(log)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_pieces_of_any_length_in_order_and_no_more_than_there_is_room_for(device_type):
    started, ended = [], []

    def counted(name: int, steps: int):
        started.append(name)
        for step in range(steps):
            yield torch.tensor([step])
        ended.append(name)
        return name

    def pieces():
        for name, steps in enumerate([2, 7, 1, 2, 3, 1, 9, 2]):
            assert len(started) - len(ended) < (1 if device_type == "cpu" else GPU_PIECES)
            yield counted(name, steps)

    assert run_in_order(pieces(), device_type) == list(range(8))
    assert run_in_order(iter([]), device_type) == []


def test_a_piece_that_fails_fails_the_whole():
    def failing():
        yield torch.tensor([1])
        raise ValueError("a piece")

    with pytest.raises(ValueError, match="a piece"):
        run_in_order(iter([piece([], "a", 3), failing(), piece([], "b", 2)]), "cuda")


@pytest.mark.parametrize("min_prob", [1e-2, 1e-3, 0.0])
def test_the_bits_do_not_depend_on_what_else_is_under_way(monkeypatch, min_prob):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 1003, generator=generator) * torch.linspace(0.1, 9.0, 40)[:, None]
    logits[7] = torch.nan
    logits[9, 3:] = -torch.inf
    starts = torch.rand(40, dtype=torch.float64, generator=generator)
    capture, labels = CaptureSettings(min_prob=min_prob, max_k=30), torch.arange(40)
    monkeypatch.setattr(reduce, "CPU_CHUNK_BYTES", 4 * 4 * 1003)
    one = reduce.reduce_logits(logits, capture, labels_N=labels, starts_N=starts)
    seen = []
    monkeypatch.setattr(
        reduce, "run_in_order", lambda pieces, _: seen.append(1) or run_in_order(pieces, "cuda")
    )
    monkeypatch.setattr(reduce, "rows_per_dense_chunk", lambda *_: 4)
    several = reduce.reduce_logits(logits, capture, labels_N=labels, starts_N=starts)
    assert seen
    for a, b in zip(one, several, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
