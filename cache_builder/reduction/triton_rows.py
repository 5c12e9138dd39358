"""What `reduce` does in some two hundred operations, in three Triton kernels; for GPUs.

    block_kernel      maxima and sums of every block: the one look at the vocabulary
    pick_kernel       a program per row: normaliser, head, what it leaves of its blocks, the tail, the line of its draws
    hand_over_kernel  a program per row: kept entries and draws to their places in the ragged result

A block's entries lie a stripe apart, so a thread of `block_kernel` owns a block and adds up in its registers, in the
order of the stripes. Candidates of a row pass through scratch memory that has room for the most there can be, and are
sorted by the keys of `reduce`. No atomics: the same rows give the same bits.

On an H100 (2,616 rows of 128,256 logits, 2026-11-27) `block_kernel` takes 0.58 ms, 2.9 of the 3.0 TB/s that copies
reach there, where the kernel that torch.compile made of the same sums took 4.1 ms.

N: rows, V: vocabulary, G: blocks of a row, J: entries in a block, T: blocks at a time, C: candidates that a row has
room for, W: draws at a time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs

from cache_builder.reduction.blocks import BLOCK, LOWEST, num_blocks
from formats.logprobs.tail_draws import POWER, most_draws
from formats.logprobs.tail_function import TAIL_BETAS

INTERPRETED: bool = knobs.runtime.interpret
"""TRITON_INTERPRET=1: the kernels run on a CPU, for tests."""
assert TAIL_BETAS == (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0), "`_powers` and its callers spell them out"
_NODES = tl.constexpr(len(TAIL_BETAS))
_FIRST = tl.constexpr(TAIL_BETAS[0])
_POWER = tl.constexpr(POWER)
_AT_POWER = tl.constexpr(TAIL_BETAS.index(POWER))
_AT_ONE = tl.constexpr(TAIL_BETAS.index(1.0))
_INF = tl.constexpr(float("inf"))
_LOWEST = tl.constexpr(LOWEST)
_NO_KEY = tl.constexpr(-(1 << 63))
COLUMNS, COLUMN_WARPS = 32, 1
"""Blocks of a `block_kernel` program: as fast as any up to 512, and the fewest registers."""
TILE = 32
"""T: most rows have no more blocks to look into."""
DRAWS = 16
"""W."""
ROW_WARPS = 8


@triton.jit
def _powers(x):  # type: ignore[no-untyped-def]
    """exp(beta x) at the nodes, one exponential for all."""
    p1 = tl.exp(x * _FIRST)
    p2 = p1 * p1
    p4 = p2 * p2
    p6 = p4 * p2
    p8 = p4 * p4
    return p1, p2, p4, p6, p8, p6 * p6, p8 * p8


@triton.jit
def _ordered(values):  # type: ignore[no-untyped-def]
    """int64 that sort as these fp32 numbers do; -0 equals 0."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _of_keys(keys):  # type: ignore[no-untyped-def]
    """(value, id) of `(ordered << 32) - id`."""
    ids = (-keys).to(tl.int32)
    bits = ((keys + ids.to(tl.int64)) >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True), ids


@triton.jit
def block_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, maxima_ptr, sums_ptr, stride, vocab_size, num_blocks, COLUMNS: tl.constexpr, J: tl.constexpr
):  # fmt: skip
    """Maximum, and sums of exp(beta (l - maximum)), of some blocks of one row."""
    pieces = tl.cdiv(num_blocks, COLUMNS)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    blocks = tl.program_id(0) % pieces * COLUMNS + tl.arange(0, COLUMNS)
    inside = blocks < num_blocks
    ids = tl.arange(0, J)[:, None] * num_blocks + blocks[None, :]
    there = inside[None, :] & (ids < vocab_size)
    x = tl.load(logits_ptr + row * stride + ids, mask=there, other=-_INF).to(tl.float32)
    maxima = tl.max(x, 0)
    tl.store(maxima_ptr + row * num_blocks + blocks, maxima, mask=inside)
    p = _powers(x - tl.maximum(maxima, _LOWEST)[None, :])
    for node in tl.static_range(_NODES):
        at = sums_ptr + (row * _NODES + node) * num_blocks + blocks
        tl.store(at, tl.sum(p[node], 0), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "max_k", "rate", "most"])
def pick_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, labels_ptr, starts_ptr, maxima_ptr, sums_ptr, log_z_ptr, tails_ptr, label_logprobs_ptr, keys_ptr,
    chosen_ptr, line_ptr, numbers_ptr, num_rows, stride, vocab_size, num_blocks, log_min_prob, max_k, rate, most,
    ROW: tl.constexpr, C: tl.constexpr, T: tl.constexpr, J: tl.constexpr, DRAW: tl.constexpr,
):  # fmt: skip
    """All of a row but its places in the result.

    Writes over what `block_kernel` found of the blocks that a head takes from. `numbers`: int64 [3, N], of entries, of
    draws, and 1 where there is no room for all candidates, whose row is not finished then.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    row_maxima_ptr = maxima_ptr + row * num_blocks
    row_sums_ptr = sums_ptr + row * _NODES * num_blocks
    blocks = tl.arange(0, ROW)
    inside = blocks < num_blocks

    maxima = tl.load(row_maxima_ptr + blocks, mask=inside, other=-_INF)
    at_one = tl.load(row_sums_ptr + _AT_ONE * num_blocks + blocks, mask=inside, other=0.0)
    top = tl.max(maxima)
    log_z = top + tl.log(
        tl.sum(tl.exp(maxima - top) * at_one)
    )  # NaN where a logit is NaN or +inf, or all are -inf
    least = log_z + log_min_prob
    tl.store(log_z_ptr + row, log_z)
    label = tl.load(labels_ptr + row)
    tl.store(label_logprobs_ptr + row, tl.load(row_ptr + label).to(tl.float32) - log_z)

    # The blocks to look into: those that reach the threshold, or hold the likeliest entry where none does; with a
    # threshold of NaN none.
    passes = inside & (maxima >= tl.where(least >= top, top, least))
    nth = tl.cumsum(passes.to(tl.int32)) - 1
    chosen_row_ptr = chosen_ptr + row * C
    tl.store(chosen_row_ptr + nth, blocks, mask=passes & (nth < C))
    num_chosen = tl.sum(passes.to(tl.int32))
    crowded = num_chosen > C
    num_chosen = tl.where(crowded, 0, num_chosen)
    tl.debug_barrier()

    keys_row_ptr = keys_ptr + row * C
    count = 0
    first = vocab_size - 1
    stripes = tl.arange(0, J)[None, :] * num_blocks
    for begin in range(0, num_chosen, T):
        nth_T = begin + tl.arange(0, T)
        chosen = tl.load(chosen_row_ptr + nth_T, mask=nth_T < num_chosen, other=0)
        ids = chosen[:, None] + stripes
        there = (nth_T < num_chosen)[:, None] & (ids < vocab_size)
        x = tl.load(row_ptr + ids, mask=there, other=-_INF).to(tl.float32)
        first = tl.minimum(first, tl.min(tl.min(tl.where(there & (x == top), ids, vocab_size - 1), 1), 0))
        reach = there & (x >= least) & (x > -_INF)
        place = count + tl.cumsum(tl.reshape(reach.to(tl.int32), [T * J])) - 1
        keys = tl.reshape((_ordered(x) << 32) - ids.to(tl.int64), [T * J])
        flat = tl.reshape(reach, [T * J])
        tl.store(keys_row_ptr + place, keys, mask=flat & (place < C))
        count += tl.sum(tl.sum(reach.to(tl.int32), 1), 0)
    crowded = crowded | (count > C)
    tl.debug_barrier()
    slots = tl.arange(0, C)
    keys = tl.load(keys_row_ptr + slots, mask=slots < count, other=_NO_KEY)
    only = (_ordered(top + 0.0 * log_z) << 32) - first.to(tl.int64)
    keys = tl.where((slots == 0) & (count == 0), only, keys)
    keys = tl.sort(keys, descending=True)
    tl.store(keys_row_ptr + slots, keys)
    count = tl.minimum(tl.maximum(count, 1), max_k)
    last, last_id = _of_keys(tl.max(tl.where(slots == count - 1, keys, _NO_KEY)))

    # What the head leaves of its blocks takes their place.
    for begin in range(0, num_chosen, T):
        nth_T = begin + tl.arange(0, T)
        real = nth_T < num_chosen
        chosen = tl.load(chosen_row_ptr + nth_T, mask=real, other=0)
        ids = chosen[:, None] + stripes
        there = real[:, None] & (ids < vocab_size)
        x = tl.load(row_ptr + ids, mask=there, other=-_INF).to(tl.float32)
        x = tl.where((x > last) | ((x == last) & (ids <= last_id)), -_INF, x)
        left = tl.max(x, 1)
        tl.store(row_maxima_ptr + chosen, left, mask=real)
        p = _powers(x - tl.maximum(left, _LOWEST)[:, None])
        for node in tl.static_range(_NODES):
            tl.store(row_sums_ptr + node * num_blocks + chosen, tl.sum(p[node], 1), mask=real)
    tl.debug_barrier()

    # The tail: relative to its largest logit, so that nothing underflows.
    maxima = tl.load(row_maxima_ptr + blocks, mask=inside, other=-_INF)
    highest = tl.maximum(tl.max(maxima), _LOWEST)
    above = highest - log_z
    for node in range(_NODES):  # not unrolled, and an exponential each: all at once would fill the registers
        beta = tl.where(node == 0, 0.125, tl.where(node < 5, 0.25 * node, 0.5 * node - 1.0))
        sums = tl.load(row_sums_ptr + node * num_blocks + blocks, mask=inside, other=0.0)
        total = tl.sum(tl.exp((maxima - highest) * beta) * sums)
        tl.store(tails_ptr + row * _NODES + node, tl.log(total) + above * beta)

    draws = tl.full([], 0, tl.int64)
    if DRAW:
        sums = tl.load(row_sums_ptr + _AT_POWER * num_blocks + blocks, mask=inside, other=0.0)
        expected = tl.exp((maxima - log_z) * _POWER) * sums
        line = tl.cumsum(tl.where(inside, expected, 0.0).to(tl.float64) * rate)
        tl.store(line_ptr + row * num_blocks + blocks, line, mask=inside)
        total = tl.sum(tl.where(blocks == num_blocks - 1, line, 0.0))
        start = tl.load(starts_ptr + row)
        wanted = tl.ceil(tl.where(tl.abs(total) < _INF, total, 0.0) - start)
        wanted = tl.minimum(tl.maximum(wanted, 0.0), most)
        # The last point may have been rounded onto the end of the line.
        wanted = tl.where(start + (wanted - 1.0) < total, wanted, tl.maximum(wanted - 1.0, 0.0))
        draws = wanted.to(tl.int64)
    tl.store(numbers_ptr + row, count.to(tl.int64))
    tl.store(numbers_ptr + num_rows + row, draws)
    tl.store(numbers_ptr + 2 * num_rows + row, crowded.to(tl.int64))


@triton.jit(do_not_specialize=["num_rows", "halvings"])
def hand_over_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, starts_ptr, log_z_ptr, keys_ptr, line_ptr, numbers_ptr, ends_ptr,
    ids_ptr, logprobs_ptr, draw_ids_ptr, draw_logprobs_ptr, num_rows, stride, vocab_size, num_blocks, halvings,
    C: tl.constexpr, W: tl.constexpr, J: tl.constexpr, DRAW: tl.constexpr,
):  # fmt: skip
    """A row's entries, and its draws: what lies at the points start, start + 1, ... of its line."""
    row = tl.program_id(0).to(tl.int64)
    log_z = tl.load(log_z_ptr + row)
    slots = tl.arange(0, C)
    count = tl.load(numbers_ptr + row)
    begin = tl.load(ends_ptr + row) - count
    keys = tl.load(keys_ptr + row * C + slots)
    values, ids = _of_keys(keys)
    tl.store(ids_ptr + begin + slots, ids, mask=slots < count)
    tl.store(logprobs_ptr + begin + slots, values - log_z, mask=slots < count)
    if DRAW:
        last, last_id = _of_keys(tl.max(tl.where(slots == count - 1, keys, _NO_KEY)))
        row_ptr = logits_ptr + row * stride
        line_row_ptr = line_ptr + row * num_blocks
        start = tl.load(starts_ptr + row)
        draws = tl.load(numbers_ptr + num_rows + row)
        begin = tl.load(ends_ptr + num_rows + row) - draws
        for done in range(0, draws, W):
            nth = done + tl.arange(0, W)
            live = nth < draws
            points = start + nth.to(tl.float64)
            low = tl.zeros([W], tl.int32)
            high = tl.full([W], 0, tl.int32) + num_blocks
            # Right of equal ends: a block of expected number zero ends where it begins, and no point picks it.
            for _ in range(halvings):
                middle = (low + high) // 2
                open_ = low < high
                beyond = open_ & (tl.load(line_row_ptr + middle, mask=live & open_, other=0.0) <= points)
                low = tl.where(beyond, middle + 1, low)
                high = tl.where(open_ & (beyond == 0), middle, high)
            block = tl.minimum(low, num_blocks - 1)
            begins = tl.load(line_row_ptr + block - 1, mask=live & (block > 0), other=0.0)
            share = (points - begins) / (tl.load(line_row_ptr + block, mask=live, other=1.0) - begins)
            stripe = tl.arange(0, J)[None, :]
            ids_WJ = block[:, None] + stripe * num_blocks
            there = live[:, None] & (ids_WJ < vocab_size)
            x = tl.load(row_ptr + ids_WJ, mask=there, other=-_INF).to(tl.float32)
            x = tl.where((x > last) | ((x == last) & (ids_WJ <= last_id)), -_INF, x)
            most = tl.maximum(tl.max(x, 1), _LOWEST)
            weights = tl.exp((x.to(tl.float64) - most.to(tl.float64)[:, None]) * _POWER)
            running = tl.cumsum(weights, 1)
            total = tl.sum(tl.where(stripe == J - 1, running, 0.0), 1)
            picked = tl.sum((running <= (share * total)[:, None]).to(tl.int32), 1)
            # The last entry that adds anything: rounding picks none beyond.
            picked = tl.minimum(picked, tl.sum((running < total[:, None]).to(tl.int32), 1))
            value = tl.sum(tl.where(stripe == picked[:, None], x, 0.0), 1)
            tl.store(draw_ids_ptr + begin + nth, block + num_blocks * picked, mask=live)
            tl.store(draw_logprobs_ptr + begin + nth, value - log_z, mask=live)


class Picked(NamedTuple):
    """What `pick_kernel` found, as far as `hand_over` needs it."""

    logits_NV: torch.Tensor
    starts_N: torch.Tensor
    log_z_N: torch.Tensor
    log_tail_nodes_NK: torch.Tensor
    label_logprobs_N: torch.Tensor
    keys_NC: torch.Tensor
    line_NG: torch.Tensor
    numbers_3N: torch.Tensor
    ends_3N: torch.Tensor
    """int64: sums of the numbers up to each row; the last ones are what the host asks for."""


class HandedOver(NamedTuple):
    """Entries and draws of all rows, one row after the other."""

    ids_E: torch.Tensor
    logprobs_E: torch.Tensor
    draw_ids_S: torch.Tensor
    draw_logprobs_S: torch.Tensor


def block_statistics(logits_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(float32 [N, G], float32 [N, K, G]): maxima of all blocks and their sums at `TAIL_BETAS`, of any float dtype."""
    num_rows, vocab_size = logits_NV.shape
    assert logits_NV.stride(-1) == 1, logits_NV.stride()
    blocks = num_blocks(vocab_size)
    maxima_NG = torch.empty(num_rows, blocks, device=logits_NV.device)
    sums_NKG = torch.empty(num_rows, len(TAIL_BETAS), blocks, device=logits_NV.device)
    if num_rows:
        # Triton launches on the current device, wherever its arguments are.
        with torch.cuda.device_of(logits_NV):
            block_kernel[(num_rows * triton.cdiv(blocks, COLUMNS),)](
                logits_NV, maxima_NG, sums_NKG, logits_NV.stride(0), vocab_size, blocks,
                COLUMNS=COLUMNS, J=BLOCK, num_warps=COLUMN_WARPS,
            )  # fmt: skip
    return maxima_NG, sums_NKG


def pick(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    starts_N: torch.Tensor,
    *,
    room: int,
    log_min_prob: float,
    max_k: int,
    rate: int,
) -> Picked:
    """Queue all that does not depend on how much is kept.

    Args:
        room: so many candidates, and blocks to look into, at most in a row.
    """
    num_rows, vocab_size = logits_NV.shape
    device = logits_NV.device
    labels_N, starts_N = labels_N.contiguous(), starts_N.contiguous()
    maxima_NG, sums_NKG = block_statistics(logits_NV)
    blocks, width = maxima_NG.shape[1], triton.next_power_of_2(room)
    log_z_N, labels_logprobs_N = torch.empty(2, num_rows, device=device).unbind()
    tails_NK = torch.empty(num_rows, len(TAIL_BETAS), device=device)
    keys_NC = torch.empty(num_rows, width, dtype=torch.int64, device=device)
    chosen_NC = torch.empty(num_rows, width, dtype=torch.int32, device=device)
    line_NG = torch.empty(num_rows if rate else 0, blocks, dtype=torch.float64, device=device)
    numbers_3N = torch.empty(3, num_rows, dtype=torch.int64, device=device)
    with torch.cuda.device_of(logits_NV):
        pick_kernel[(num_rows,)](
            logits_NV, labels_N, starts_N, maxima_NG, sums_NKG, log_z_N, tails_NK, labels_logprobs_N, keys_NC,
            chosen_NC, line_NG, numbers_3N, num_rows, logits_NV.stride(0), vocab_size, blocks, log_min_prob, max_k,
            rate, most_draws(vocab_size, rate),
            ROW=triton.next_power_of_2(blocks), C=width, T=TILE, J=BLOCK, DRAW=rate > 0, num_warps=ROW_WARPS,
        )  # fmt: skip
    return Picked(
        logits_NV,
        starts_N,
        log_z_N,
        tails_NK,
        labels_logprobs_N,
        keys_NC,
        line_NG,
        numbers_3N,
        numbers_3N.cumsum(1),
    )


def hand_over(picked: Picked, num_entries: int, num_draws: int) -> HandedOver:
    """Queue the rest, once the host knows how much is kept."""
    num_rows, vocab_size = picked.logits_NV.shape
    blocks, device = num_blocks(vocab_size), picked.logits_NV.device
    found = HandedOver(
        torch.empty(num_entries, dtype=torch.int32, device=device),
        torch.empty(num_entries, device=device),
        torch.empty(num_draws, dtype=torch.int32, device=device),
        torch.empty(num_draws, device=device),
    )
    with torch.cuda.device_of(picked.logits_NV):
        hand_over_kernel[(num_rows,)](
            picked.logits_NV, picked.starts_N, picked.log_z_N, picked.keys_NC, picked.line_NG, picked.numbers_3N,
            picked.ends_3N, *found, num_rows, picked.logits_NV.stride(0), vocab_size, blocks, blocks.bit_length(),
            C=picked.keys_NC.shape[1], W=DRAWS, J=BLOCK, DRAW=num_draws > 0,
        )  # fmt: skip
    return found
