"""The two passes over the vocabulary: maxima of blocks, and sums of blocks at every tail node.

N: rows, V: vocabulary, K: blocks of a row (the last one may be short), B: tail nodes.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch

BLOCK = 64
"""Entries in a block: long enough that block data are small, short enough that few entries are gathered."""


@lru_cache
def power_plan(betas: tuple[float, ...]) -> tuple[tuple[int, int] | None, ...]:
    """For every node, two earlier nodes whose betas add up to its own, or None where there are none.

    exp((a + b) x) = exp(a x) * exp(b x): a product is an order of magnitude cheaper than an exponential.
    """
    plan: list[tuple[int, int] | None] = []
    for node, beta in enumerate(betas):
        pairs = ((i, j) for i in range(node) for j in range(i, node) if betas[i] + betas[j] == beta)
        # The largest first factor: short chains of products lose the fewest bits.
        plan.append(max(pairs, default=None))
    return tuple(plan)


def block_maxima(logits_NV: torch.Tensor) -> torch.Tensor:
    """float32 [N, K]: the maximum of every block."""
    vocab_size = logits_NV.shape[1]
    whole = vocab_size // BLOCK * BLOCK
    maxima_NK = logits_NV[:, :whole].unflatten(1, (-1, BLOCK)).amax(-1) if whole else logits_NV[:, :0]
    if whole == vocab_size:
        return maxima_NK
    return torch.cat([maxima_NK, logits_NV[:, whole:].amax(-1, keepdim=True)], -1)


def block_sums(logits_NV: torch.Tensor, max_N: torch.Tensor, betas: Sequence[float]) -> torch.Tensor:
    """float32 [N, B, K]: sums of exp(beta * (l - max)) over every block."""
    num_rows, vocab_size = logits_NV.shape
    whole = vocab_size // BLOCK * BLOCK
    num_blocks = -(-vocab_size // BLOCK)
    sums_NBK = logits_NV.new_empty(num_rows, len(betas), num_blocks)
    shifted_NV = logits_NV - max_N.unsqueeze(-1)
    powers: list[torch.Tensor] = []
    for node, pair in enumerate(power_plan(tuple(betas))):
        power_NV = (shifted_NV * betas[node]).exp_() if pair is None else powers[pair[0]] * powers[pair[1]]
        powers.append(power_NV)
        if whole:
            sums_NBK[:, node, : whole // BLOCK] = power_NV[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)
        if whole != vocab_size:
            sums_NBK[:, node, -1] = power_NV[:, whole:].sum(-1)
    return sums_NBK
