"""The two passes over the vocabulary: maxima of blocks, and sums of blocks at every tail node.

A block is a residue class: with G blocks, block g holds the ids g, g + G, g + 2G, ...  Any partition would
do, and this one turns both reductions into sums of whole vectors, with nothing to add up across a vector
register.

On a CPU the passes are plain operations on a scratch buffer that is kept between calls: fresh temporaries
of this size cost more in page faults than the arithmetic.  On a GPU `torch.compile` fuses them into one
kernel, and where that fails the plain operations run instead.  ANNEAL_COMPILE=1 compiles on a CPU as well,
which proves the path where no GPU is and was not faster on the CPU it was tried on; ANNEAL_COMPILE=0
compiles nowhere.

N: rows, V: vocabulary, G: blocks of a row, J: entries in a block, K: tail nodes.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

CPU_CACHE_BYTES = 1 << 21
"""fp32 bytes of logits that a pass works on at a time, per thread of a CPU.  More falls out of its caches,
less pays for the calls."""
BLOCK = 32
"""J: long enough that block data are small, short enough that few entries are gathered."""


def num_blocks(vocab_size: int) -> int:
    """G: as few as hold the vocabulary.  The last stripe of G ids may be short."""
    return -(-vocab_size // BLOCK)


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


def rows_per_pass(num_rows: int, vocab_size: int, device_type: str) -> int:
    """Rows that a pass works on at a time: on a CPU those whose logits fit its caches, elsewhere all."""
    if device_type != "cpu":
        return max(1, num_rows)
    return max(1, CPU_CACHE_BYTES * torch.get_num_threads() // (4 * vocab_size))


def block_statistics(logits_NV: torch.Tensor, betas: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """`block_maxima` and `block_sums`, the latter relative to the maximum of each row.

    On a CPU both run over a few rows at a time, while their logits are in its cache.
    """
    num_rows, vocab_size = logits_NV.shape
    step = rows_per_pass(num_rows, vocab_size, logits_NV.device.type)
    blocks = num_blocks(vocab_size)
    maxima_NG = logits_NV.new_empty(num_rows, blocks)
    sums_NKG = logits_NV.new_empty(num_rows, len(betas), blocks)
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        maxima_NG[rows] = block_maxima(logits_NV[rows])
        sums_NKG[rows] = block_sums(logits_NV[rows], maxima_NG[rows].amax(-1), betas)
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


def block_sums(logits_NV: torch.Tensor, max_N: torch.Tensor, betas: Sequence[float]) -> torch.Tensor:
    """float32 [N, K, G]: sums of exp(beta * (l - max)) over every block."""
    vocab_size = logits_NV.shape[1]
    blocks = num_blocks(vocab_size)
    whole = vocab_size // blocks
    stripes_NJG = logits_NV[:, : whole * blocks].unflatten(1, (whole, blocks))
    sums_NKG = _sums_of(stripes_NJG, max_N, tuple(betas))
    short = vocab_size - whole * blocks
    if short:
        rest_N1G = logits_NV[:, whole * blocks :].unsqueeze(1)
        sums_NKG[:, :, :short] += eager_sums(rest_N1G, max_N, tuple(betas))
    return sums_NKG


def compiles_on(device_type: str) -> bool:
    """Whether the sums are compiled on this kind of device, by the environment and the default."""
    setting = os.environ.get("ANNEAL_COMPILE", "")
    return setting == "1" or (setting != "0" and device_type != "cpu")


def _sums_of(x_NJG: torch.Tensor, max_N: torch.Tensor, betas: tuple[float, ...]) -> torch.Tensor:
    if compiles_on(x_NJG.device.type):
        fused = _fused_sums(betas)
        if fused is not None:
            try:
                return fused(x_NJG, max_N)
            except Exception as error:  # no compiler, no Triton, an unsupported device: slower, not wrong
                _FAILED.add(betas)
                warnings.warn(f"torch.compile failed, reducing without it: {error}"[:300], stacklevel=2)
    return eager_sums(x_NJG, max_N, betas)


_FAILED: set[tuple[float, ...]] = set()


@lru_cache
def _compiled(betas: tuple[float, ...]) -> Callable[..., torch.Tensor]:
    plan = power_plan(betas)

    def sums(x_NJG: torch.Tensor, max_N: torch.Tensor) -> torch.Tensor:
        shifted_NJG = x_NJG - max_N[:, None, None]
        powers: list[torch.Tensor] = []
        for beta, pair in zip(betas, plan, strict=True):
            powers.append((shifted_NJG * beta).exp() if pair is None else powers[pair[0]] * powers[pair[1]])
        return torch.stack([power.sum(1) for power in powers], 1)

    return torch.compile(sums, dynamic=True)


def _fused_sums(betas: tuple[float, ...]) -> Callable[..., torch.Tensor] | None:
    return None if betas in _FAILED else _compiled(betas)


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


def eager_sums(x_NJG: torch.Tensor, max_N: torch.Tensor, betas: tuple[float, ...]) -> torch.Tensor:
    """float32 [N, K, G]: sums over J of exp(beta * (x - max)), by plain operations on scratch memory."""
    plan = power_plan(betas)
    buffers, slots = _assign_buffers(plan)
    powers = scratch(buffers, x_NJG.shape, x_NJG.device)
    sums_NKG = x_NJG.new_empty(len(x_NJG), len(betas), x_NJG.shape[2])
    for node, pair in enumerate(plan):
        power_NJG = powers[slots[node]]
        if pair is None:
            beta = betas[node]
            torch.add((max_N * -beta)[:, None, None], x_NJG, alpha=beta, out=power_NJG)
            power_NJG.exp_()
        else:
            torch.mul(powers[slots[pair[0]]], powers[slots[pair[1]]], out=power_NJG)
        torch.sum(power_NJG, 1, out=sums_NKG[:, node])
    return sums_NKG


@lru_cache
def _assign_buffers(plan: tuple[tuple[int, int] | None, ...]) -> tuple[int, tuple[int, ...]]:
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
