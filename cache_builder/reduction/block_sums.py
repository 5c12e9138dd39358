"""One look at the vocabulary: the maximum of every block, and its sums at every tail node.

On a CPU the passes are plain operations on a scratch buffer that is kept between calls: fresh temporaries
of this size cost more in page faults than the arithmetic.  On a GPU one kernel holds a block in registers
(triton_rows.py); where there is no Triton, or ANNEAL_TRITON=0 forbids it, the plain operations run there too.

N: rows, V: vocabulary, G: blocks of a row, J: entries in a block, K: tail nodes.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch

from cache_builder.reduction import kernels
from cache_builder.reduction.blocks import LOWEST, Blocks, num_blocks
from formats.logprobs.tail_function import TAIL_BETAS

CPU_CACHE_BYTES = 1 << 21
"""fp32 bytes of logits that a pass works on at a time, per thread of a CPU.  More falls out of its caches,
less pays for the calls."""
PLAIN_PASS_BYTES = 1 << 28
"""The same for the plain operations on a GPU, which hold a few times as much in scratch memory."""
Plan = tuple[tuple[int, int] | None, ...]


@lru_cache
def power_plan(betas: tuple[float, ...]) -> Plan:
    """For every node, two earlier nodes whose betas add up to its own, or None where there are none.

    exp((a + b) x) = exp(a x) * exp(b x): a product is an order of magnitude cheaper than an exponential.
    """
    plan: list[tuple[int, int] | None] = []
    for node, beta in enumerate(betas):
        pairs = ((i, j) for i in range(node) for j in range(i, node) if betas[i] + betas[j] == beta)
        # The largest first factor: short chains of products lose the fewest bits.
        plan.append(max(pairs, default=None))
    return tuple(plan)


def powers(x: torch.Tensor, betas: tuple[float, ...], plan: Plan) -> list[torch.Tensor]:
    """exp(beta * x) for every beta, by the plan for these."""
    found: list[torch.Tensor] = []
    for beta, pair in zip(betas, plan, strict=True):
        found.append((x * beta).exp() if pair is None else found[pair[0]] * found[pair[1]])
    return found


def rows_per_pass(num_rows: int, vocab_size: int, device_type: str) -> int:
    """Rows that the plain operations work on at a time: on a CPU those whose logits fit its caches."""
    if device_type != "cpu":
        return max(1, min(num_rows, PLAIN_PASS_BYTES // (4 * vocab_size)))
    return max(1, CPU_CACHE_BYTES * torch.get_num_threads() // (4 * vocab_size))


def block_statistics(logits_NV: torch.Tensor, betas: Sequence[float]) -> Blocks:
    """Maxima and sums of all blocks; `betas` are `TAIL_BETAS` where the device has kernels."""
    if kernels.run_on(logits_NV.device.type, logits_NV.shape[1]):
        assert tuple(betas) == TAIL_BETAS, betas
        from cache_builder.reduction import triton_rows

        return Blocks(*triton_rows.block_statistics(logits_NV))
    return Blocks(*_plain_statistics(logits_NV, betas=tuple(betas)))


def totals(blocks: Blocks, betas: Sequence[float], top_N: torch.Tensor) -> torch.Tensor:
    """float32 [N, K]: sums over all blocks of exp(beta * (l - top)).

    Args:
        blocks: with the sums at `betas`.
        top_N: what to be relative to, finite: the largest of the maxima where that is.
    """
    factors = powers(blocks.maxima_NG - top_N.unsqueeze(1), tuple(betas), power_plan(tuple(betas)))
    return torch.stack(
        [(blocks.sums_NKG[:, node] * factor).sum(-1) for node, factor in enumerate(factors)], -1
    )


# --- plain ------------------------------------------------------------------------------------------------


def _plain_statistics(
    logits_NV: torch.Tensor, *, betas: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A few rows at a time: on a CPU both passes run over them while they are in its cache."""
    num_rows, vocab_size = logits_NV.shape
    step = rows_per_pass(num_rows, vocab_size, logits_NV.device.type)
    blocks = num_blocks(vocab_size)
    maxima_NG = logits_NV.new_empty(num_rows, blocks)
    sums_NKG = logits_NV.new_empty(num_rows, len(betas), blocks)
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        maxima_NG[rows] = block_maxima(logits_NV[rows])
        sums_NKG[rows] = block_sums(logits_NV[rows], maxima_NG[rows], betas)
    return maxima_NG, sums_NKG


def block_maxima(logits_NV: torch.Tensor) -> torch.Tensor:
    """float32 [N, G]: the maximum of every block."""
    vocab_size = logits_NV.shape[1]
    blocks = num_blocks(vocab_size)
    whole = vocab_size // blocks
    maxima_NG = logits_NV[:, : whole * blocks].unflatten(1, (whole, blocks)).amax(1)
    short = vocab_size - whole * blocks
    if short:
        maxima_NG[:, :short] = torch.maximum(maxima_NG[:, :short], logits_NV[:, whole * blocks :])
    return maxima_NG


def block_sums(logits_NV: torch.Tensor, maxima_NG: torch.Tensor, betas: Sequence[float]) -> torch.Tensor:
    """float32 [N, K, G]: sums of exp(beta * (l - max)) over every block."""
    vocab_size = logits_NV.shape[1]
    blocks = num_blocks(vocab_size)
    whole = vocab_size // blocks
    stripes_NJG = logits_NV[:, : whole * blocks].unflatten(1, (whole, blocks))
    sums_NKG = plain_sums(stripes_NJG, maxima_NG, tuple(betas))
    short = vocab_size - whole * blocks
    if short:
        rest_N1G = logits_NV[:, whole * blocks :].unsqueeze(1)
        sums_NKG[:, :, :short] += plain_sums(rest_N1G, maxima_NG[:, :short], tuple(betas))
    return sums_NKG


_SCRATCH: dict[torch.device, torch.Tensor] = {}


def scratch(num_buffers: int, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """float32 [num_buffers, *shape], contents undefined, valid until the next call."""
    needed = num_buffers * shape.numel()
    kept = _SCRATCH.get(device)
    if kept is None or len(kept) < needed:
        # A tensor made in inference mode could not be written outside it, and this one outlives the mode.
        with torch.inference_mode(False):
            kept = _SCRATCH[device] = torch.empty(needed, device=device)
    return kept[:needed].view(num_buffers, *shape)


def plain_sums(x_NJG: torch.Tensor, maxima_NG: torch.Tensor, betas: tuple[float, ...]) -> torch.Tensor:
    """float32 [N, K, G]: sums over J of exp(beta * (x - maximum)), by plain operations on scratch memory."""
    plan = power_plan(betas)
    buffers, slots = _assign_buffers(plan)
    held = scratch(buffers, x_NJG.shape, x_NJG.device)
    sums_NKG = x_NJG.new_empty(len(x_NJG), len(betas), x_NJG.shape[2])
    # -inf - -inf would not be a number.
    above_N1G = maxima_NG.clamp(min=LOWEST).unsqueeze(1)
    for node, pair in enumerate(plan):
        power_NJG = held[slots[node]]
        if pair is None:
            torch.add(above_N1G * -betas[node], x_NJG, alpha=betas[node], out=power_NJG)
            power_NJG.exp_()
        else:
            torch.mul(held[slots[pair[0]]], held[slots[pair[1]]], out=power_NJG)
        torch.sum(power_NJG, 1, out=sums_NKG[:, node])
    return sums_NKG


@lru_cache
def _assign_buffers(plan: Plan) -> tuple[int, tuple[int, ...]]:
    """(number of buffers, buffer of every node): a buffer is reused once no later node needs its power."""
    last_use = [
        max([m for m, pair in enumerate(plan) if pair and n in pair], default=n) for n in range(len(plan))
    ]
    free: list[int] = []
    slots: list[int] = []
    count = 0
    for node in range(len(plan)):
        # A factor used for the last time here may be overwritten by the product itself.
        free += [slots[n] for n in range(node) if last_use[n] == node]
        free += [slots[node - 1]] if node and last_use[node - 1] == node - 1 else []
        if free:
            slots.append(free.pop())
        else:
            slots.append(count)
            count += 1
    return count, tuple(slots)
