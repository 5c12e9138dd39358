"""Two Triton kernels over a chunk's projection: the sums of its rows, and what is written over it.

    row_sums   reads a row once: its maximum, and the sums of exp(z) and exp(beta z), online
    row_map    reads it again and writes a function of z: the gradient, or the tail's normalised exponentials

Both compute in fp32, whatever the dtype in memory, and apply bias, scale and softcap on the way in. A logit
of -inf is hidden: it counts in no sum and gets a zero. Bytes per logit of two bytes: 2, and 4.

R: rows of a block, B: tokens of a block, F: token features.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def _logits(raw, bias_ptr, columns_B, inside_B, scale, cap, BIAS: tl.constexpr, CAP: tl.constexpr):
    """(z, dz/dx) of a block; x is the projection plus bias, times scale. -inf stays -inf."""
    x = raw.to(tl.float32)
    hidden = x == -float("inf")
    if BIAS:
        x += tl.load(bias_ptr + columns_B, mask=inside_B, other=0.0)[None, :]
    x *= scale
    slope = tl.full(x.shape, 1.0, tl.float32)
    if CAP:
        decay = tl.exp(-2.0 * tl.abs(x / cap))  # at most 1: tanh without overflow
        tanh = (1.0 - decay) / (1.0 + decay)
        slope = 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
        x = tl.where(x < 0, -tanh, tanh) * cap
    return tl.where(hidden, -float("inf"), x), slope


@triton.jit
def row_sums(
    raw_ptr, bias_ptr, max_ptr, one_ptr, tempered_ptr, num_tokens, stride, scale, cap, beta,
    BIAS: tl.constexpr, CAP: tl.constexpr, TEMPERED: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Maximum of a row (from what `max_ptr` holds on), sums of exp(z - max) and of exp(beta (z - max))."""
    row = tl.program_id(0)
    row_ptr = raw_ptr + row.to(tl.int64) * stride  # C V may exceed 32 bits
    largest = tl.load(max_ptr + row)
    one = 0.0
    tempered = 0.0
    for start in range(0, num_tokens, B):
        columns_B = start + tl.arange(0, B)
        inside_B = columns_B < num_tokens
        raw = tl.load(row_ptr + columns_B, mask=inside_B, other=-float("inf"))[None, :]
        z, _ = _logits(raw, bias_ptr, columns_B, inside_B, scale, cap, BIAS, CAP)
        new = tl.maximum(largest, tl.max(z))
        one = one * tl.exp(largest - new) + tl.sum(tl.exp(z - new))
        if TEMPERED:
            tempered = tempered * tl.exp(beta * (largest - new)) + tl.sum(tl.exp(beta * (z - new)))
        largest = new
    tl.store(max_ptr + row, largest)
    tl.store(one_ptr + row, one)
    if TEMPERED:
        tl.store(tempered_ptr + row, tempered)


@triton.jit
def row_map(
    raw_ptr, bias_ptr, max_ptr, one_ptr, tempered_ptr, slope_ptr, features_ptr, out_ptr,
    num_rows, num_tokens, num_features, stride, scale, cap, beta,
    BIAS: tl.constexpr, CAP: tl.constexpr, DERIVATIVE: tl.constexpr, ONE: tl.constexpr,
    SLOPES: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """out = (one exp(z - max) + exp(beta (z - max)) (tempered + slope . u)) dz/dx; parts as the flags say."""
    rows_R = tl.program_id(0) * R + tl.arange(0, R)
    columns_B = tl.program_id(1) * B + tl.arange(0, B)
    row_inside_R, inside_B = rows_R < num_rows, columns_B < num_tokens
    inside = row_inside_R[:, None] & inside_B[None, :]
    offsets = rows_R.to(tl.int64)[:, None] * stride + columns_B[None, :]
    raw = tl.load(raw_ptr + offsets, mask=inside, other=-float("inf"))
    z, derivative = _logits(raw, bias_ptr, columns_B, inside_B, scale, cap, BIAS, CAP)
    z -= tl.load(max_ptr + rows_R, mask=row_inside_R, other=0.0)[:, None]
    factor = tl.load(tempered_ptr + rows_R, mask=row_inside_R, other=0.0)[:, None]
    if SLOPES:
        dot = tl.zeros((R, B), tl.float32)
        for start in range(0, num_features, 16):  # 64 features at once would not fit the registers
            features_F = start + tl.arange(0, 16)
            known_F = features_F < num_features
            slope_RF = tl.load(
                slope_ptr + rows_R[:, None] * num_features + features_F[None, :],
                mask=row_inside_R[:, None] & known_F[None, :],
                other=0.0,
            )
            u_FB = tl.load(
                features_ptr + features_F[:, None] * num_tokens + columns_B[None, :],
                mask=known_F[:, None] & inside_B[None, :],
                other=0.0,
            )
            dot = tl.dot(slope_RF, u_FB, dot, input_precision="ieee")
        factor += dot
    out = tl.exp(beta * z) * factor
    if ONE:
        out += tl.exp(z) * tl.load(one_ptr + rows_R, mask=row_inside_R, other=0.0)[:, None]
    if DERIVATIVE:
        out *= derivative
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)
