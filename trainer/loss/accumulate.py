"""The output head's gradient, summed over chunks in fp32 whatever the compute dtype.

A bf16 sum of many chunks loses their last bits. Where the device multiplies halves into an fp32 sum, one call does it:
products of bf16 numbers are exact in fp32, so nothing is rounded to bf16 on the way, and an element costs 8 bytes of
traffic. Elsewhere the product is made in the compute dtype and added slice by slice: 12 bytes, and one rounding.

C: rows of the chunk, V: vocabulary, D: hidden size.
"""

from functools import cache

import torch

ACCUMULATE_ROWS = 16_384
"""Rows of the output head updated at once when a half-precision product is added to the fp32 sum."""


def add_product(
    total_VD: torch.Tensor,
    gradient_CV: torch.Tensor,
    hidden_CD: torch.Tensor,
    scale: float,
    *,
    first: bool = False,
) -> None:
    """total += scale * gradient^T hidden; the total is fp32 (fp64) and contiguous.

    Args:
        first: write the product over whatever the total holds.
    """
    dtype, beta = gradient_CV.dtype, 0.0 if first else 1.0
    if total_VD.dtype == dtype:
        total_VD.addmm_(gradient_CV.t(), hidden_CD, beta=beta, alpha=scale)
        return
    if adds_in_fp32(total_VD.device, dtype):
        columns_VC, out_dtype = gradient_CV.t(), total_VD.dtype
        torch.addmm(
            total_VD, columns_VC, hidden_CD, beta=beta, alpha=scale, out_dtype=out_dtype, out=total_VD
        )
        return
    for start in range(0, total_VD.shape[0], ACCUMULATE_ROWS):
        product = gradient_CV[:, start : start + ACCUMULATE_ROWS].t() @ hidden_CD
        part = total_VD[start : start + ACCUMULATE_ROWS]
        if first:
            part.copy_(product).mul_(scale)
        else:
            part.add_(product, alpha=scale)


@cache
def adds_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build and device add a product of matrices of `dtype` to an fp32 matrix in place.

    CUDA has `addmm(out_dtype=)`, but its first builds refuse an fp32 sum beside factors of another dtype. So it is
    tried, once per process, on a sum that bf16 and fp16 cannot hold: 3 * 257 + 1/8.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    total = torch.full((16, 16), 0.125, device=device)
    ones = torch.ones(257, 16, dtype=dtype, device=device)
    try:
        torch.addmm(total, ones.t(), ones, alpha=3.0, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 771.125).all())
