"""How often a GPU would have to be waited for: a budget that one more wait breaks."""

import pytest
import torch
from host_waits import HostWaits

from cache_builder.reduction import heads, reduce
from cache_builder.reduction.reduce import reduce_logits
from formats.capture_settings import CaptureSettings

WAITS = {
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
    "boolean write": lambda x: x.index_put_((x > 0,), torch.ones(1)),
    "int": lambda x: int(x.sum()),
    "bool": lambda x: bool((x > 0).any()),
    "item": lambda x: x.sum().item(),
    "list": lambda x: x.tolist(),
    "bincount": lambda x: x.long().abs().bincount(),
    "unique": lambda x: x.unique(),
    "repeat": lambda x: x.repeat_interleave(x.long().abs()),
    "masked select": lambda x: x.masked_select(x > 0),
    "to the host": lambda x: x.cpu(),
}
GOES_ON = {
    "fixed nonzero": lambda x: (x > 0).nonzero_static(size=2),
    "index": lambda x: x[torch.tensor([0, 1])],
    "masked fill": lambda x: x.masked_fill(x > 0, 0.0),
    "fixed repeat": lambda x: torch.repeat_interleave(x, torch.tensor([1, 1, 1]), output_size=3),
    "sort": lambda x: x.sort(),
}


@pytest.mark.parametrize("name", [*WAITS, *GOES_ON])
def test_the_counter_sees_what_waits(name):
    with HostWaits() as waits:
        (WAITS | GOES_ON)[name](torch.tensor([1.0, -1.0, 2.0]))
    assert len(waits.found) == (name in WAITS), waits.found


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    real = heads._room
    monkeypatch.setattr(heads, "_room", lambda counts, most, ask: real(counts, most, most > heads.MAX_BOUND))


def reduced(logits: torch.Tensor, draw_rate: int = 8, **settings) -> list[str]:
    """What is waited for in one chunk."""
    num_rows = len(logits)
    capture = CaptureSettings(draw_rate=draw_rate, **settings)
    with HostWaits() as waits:
        reduce_logits(
            logits,
            capture,
            labels_N=torch.zeros(num_rows, dtype=torch.int64),
            starts_N=torch.zeros(num_rows, dtype=torch.float64),
        )
    return waits.found


@pytest.mark.parametrize("draw_rate", [0, 8])
@pytest.mark.parametrize("num_rows", [1, 20])
def test_two_waits_a_chunk(as_on_a_gpu, num_rows, draw_rate):
    logits = 3 * torch.randn(num_rows, 4099, generator=torch.Generator().manual_seed(0))
    assert reduced(logits, draw_rate) == ["tolist", "tolist"]


def test_peaked_rows_and_ties_wait_no_more(as_on_a_gpu):
    logits = 3 * torch.randn(20, 4099, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    logits[3, 100] = 200.0
    logits[4, 1:] = -torch.inf
    logits[5] = torch.nan
    assert len(reduced(logits)) == 2


def test_a_lower_threshold_costs_one_more(as_on_a_gpu):
    logits = 6 * torch.randn(20, 32000, generator=torch.Generator().manual_seed(0))
    assert len(reduced(logits, min_prob=1e-3)) == 3


def test_chunks_wait_each(as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(reduce, "CPU_CHUNK_BYTES", 5 * 4 * 4099)
    logits = 3 * torch.randn(20, 4099, generator=torch.Generator().manual_seed(0))
    assert len(reduced(logits)) == 4 * 2
