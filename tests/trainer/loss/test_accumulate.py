"""The sum of the output head's gradient over chunks: fp32 whatever the factors, on the CPU and on a GPU where there is
one.
"""

import pytest
import torch
from loss_on_device import DEVICE

from trainer.loss import accumulate
from trainer.loss.accumulate import add_product, adds_in_fp32


def factors(num_chunks: int, dtype: torch.dtype, rows: int = 32, vocab: int = 70, width: int = 24):
    generator = torch.Generator().manual_seed(0)
    shapes = ((num_chunks, rows, vocab), (num_chunks, rows, width))
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


@pytest.mark.parametrize("slice_rows", (16, 16_384))
@pytest.mark.parametrize("scale", (1.0, 0.3))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_the_sum_is_that_of_float64(dtype, scale, slice_rows, monkeypatch):
    monkeypatch.setattr(accumulate, "ACCUMULATE_ROWS", slice_rows)
    gradients, hidden = factors(40, dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    total = torch.full((70, 24), torch.nan, dtype=exact, device=DEVICE)
    for number, (gradient_CV, hidden_CD) in enumerate(zip(gradients, hidden, strict=True)):
        add_product(total, gradient_CV, hidden_CD, scale, first=number == 0)
    expected = scale * torch.einsum("kcv,kcd->vd", gradients.double(), hidden.double())
    error = float((total.double() - expected).norm() / expected.norm())
    # One rounding of each product, where it is made in the factors' dtype; none where the device adds in fp32.
    whole = dtype.itemsize >= 4 or adds_in_fp32(DEVICE, dtype)
    assert error < (1e-14 if exact == torch.float64 else 1e-6 if whole else torch.finfo(dtype).eps / 2)


def test_only_a_gpu_adds_halves_in_fp32():
    assert not adds_in_fp32(torch.device("cpu"), torch.bfloat16)
    if torch.cuda.is_available():
        device = torch.device("cuda", 0)
        assert not adds_in_fp32(device, torch.float32)
        assert adds_in_fp32(device, torch.bfloat16) and adds_in_fp32(device, torch.float16)
