"""Reduce full-vocabulary logits to what a cache keeps: an adaptive head and the tail function at its nodes.

For every row of logits l, with p = softmax(l):

    head        the entries with p >= min_prob, at most max_k of them, always the likeliest one
    log p       of the head, natural log, normalised over the whole vocabulary
    A(beta)     log sum over the rest of exp(beta * log p), for every beta in `TAIL_BETAS`
    labels      log p of the token that comes next in the text, whether it is in the head or not
    draws       a few tokens of the rest with their log p (formats/logprobs/tail_draws.py), if there is a rate

Every number is a sum of positive terms.  The tail is never a difference: where the head holds nearly all of
the mass, `total - head` in fp32 would be noise.

Algorithm, per chunk of rows; the vocabulary is cut into blocks:
  1. the maximum m of every block, and its sums of exp(beta * (l - m)) for every beta (one pass): a beta that is the sum
     of two earlier ones costs a product, so seven temperatures cost one exponential.  The sums at beta = 1 give Z,
     hence the exact threshold;
  2. only blocks whose maximum passes the threshold can hold a head entry, at most 1/min_prob of them and in
     practice a few: they are gathered, and the head is picked from them;
  3. what the head leaves of those blocks takes their place, maximum and sums: the blocks are the tail now, and are
     added up relative to the largest of their maxima.
Where too many blocks pass (min_prob = 0, flat rows) a plain top-k over the vocabulary finds the head, and a second pass
over what it leaves the blocks of the tail.
Draws take no pass of their own: the blocks say where to look (draw_from_tails.py).

Cost: one pass over the logits and one exponential per entry; no sort of the vocabulary. On a GPU three kernels
(triton_rows.py) do all of it where heads and ties have room, and the host asks once a chunk, for the numbers of entries
and draws; PyTorch's operations do it elsewhere, and ask for the number of blocks that pass too. Meanwhile a GPU works
on other chunks (in_flight.py).
Every sum is taken in a fixed order, so the same rows give the same bits.

N: rows, V: vocabulary, K: tail nodes, E: kept entries of all rows, S: tail draws of all rows, G: blocks of a row, H:
candidates for a head of the row that has most.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from cache_builder.reduction import kernels
from cache_builder.reduction.block_sums import block_statistics, totals
from cache_builder.reduction.blocks import BLOCK, LOWEST, Blocks
from cache_builder.reduction.draw_from_tails import draw_from_tails, lay_out, no_draws
from cache_builder.reduction.heads import MAX_BOUND, dense_head, most_entries, nonzero, sparse_head
from cache_builder.reduction.in_flight import GPU_PIECES, Piece, run_in_order
from formats.capture_settings import CaptureSettings
from formats.logprobs.tail_function import TAIL_BETAS

CPU_CHUNK_BYTES = 1 << 26
"""fp32 bytes of logits reduced at a time on a CPU; the two passes cut this into what fits its caches."""
GPU_CHUNK_SHARE = 64
"""What part of a GPU's memory the fp32 logits of a chunk may take, of which a few are under way at a time..."""
GPU_CHUNK_BYTES = 1 << 29
"""... and never more than this: more is no faster (H200: 33, 34, 32 and 31 ms a step of 16,384 tokens for 0.5, 1, 2 and
4 GiB), and takes as much more memory.  vLLM's memory profiling runs the pooler, and so counts them."""
DENSE_SHARE = 8
"""What a GPU reduces at a time where heads are found by a top-k over the vocabulary, as a share of a chunk."""


class ReducedRows(NamedTuple):
    """Head and tail of N rows, ragged: row i owns the next `counts[i]` entries."""

    counts: torch.Tensor
    """int32 [N], at least 1."""
    token_ids: torch.Tensor
    """int32 [E], by descending logprob within a row."""
    logprobs: torch.Tensor
    """float32 [E]."""
    log_tail_nodes: torch.Tensor
    """float32 [N, K]; -inf where the rest of the vocabulary is empty or impossible."""
    label_logprobs: torch.Tensor
    """float32 [N]; where the label is in the head, the very number that stands there."""
    draw_counts: torch.Tensor
    """int32 [N]: row i owns the next `draw_counts[i]` draws."""
    draw_ids: torch.Tensor
    """int32 [S]."""
    draw_logprobs: torch.Tensor
    """float32 [S]."""


class Chunk(NamedTuple):
    """Rows to reduce together; see `reduce_logits`."""

    logits_NV: torch.Tensor
    labels_N: torch.Tensor
    starts_N: torch.Tensor


def chunk_bytes(device: torch.device) -> int:
    """fp32 bytes of logits to reduce at a time on this device."""
    if device.type == "cpu":
        return CPU_CHUNK_BYTES
    return min(GPU_CHUNK_BYTES, torch.cuda.get_device_properties(device).total_memory // GPU_CHUNK_SHARE)


def rows_per_chunk(vocab_size: int, budget: int) -> int:
    """Rows whose logits in fp32 fit so many bytes."""
    return max(1, budget // (4 * vocab_size))


def rows_per_dense_chunk(vocab_size: int, device: torch.device) -> int:
    """The same where heads are found by a top-k over the vocabulary, which holds several copies of the logits."""
    share = 1 if device.type == "cpu" else DENSE_SHARE
    return rows_per_chunk(vocab_size, chunk_bytes(device) // share)


def reduce_logits(
    logits_NV: torch.Tensor,
    capture: CaptureSettings,
    *,
    labels_N: torch.Tensor,
    starts_N: torch.Tensor | None = None,
) -> ReducedRows:
    """Head, tail function, label and tail draws of every row of `logits_NV`.

    Args:
        logits_NV: [N, V], any floating dtype, without padding columns; -inf marks impossible tokens.
        capture: what to keep.  Equal logits are ordered by ascending id.
        labels_N: int64, the token that comes next in the text.
        starts_N: float64 in [0, 1), where the points of each row begin (`formats.logprobs.tail_draws.starts`); only
            needed to draw.

    Returns:
        `ReducedRows` on the device of the logits.  A row with NaN or +inf logits has NaN logprobs.
    """
    num_rows, vocab_size = logits_NV.shape
    assert labels_N.shape == (num_rows,) and labels_N.dtype == torch.int64, labels_N
    if capture.draw_rate:
        assert starts_N is not None and len(starts_N) == num_rows, starts_N
        assert starts_N.dtype == torch.float64, starts_N.dtype
    else:
        starts_N = torch.zeros(num_rows, dtype=torch.float64, device=logits_NV.device)
    if capture.min_prob:
        step = rows_per_chunk(vocab_size, chunk_bytes(logits_NV.device))
    else:
        step = rows_per_dense_chunk(vocab_size, logits_NV.device)
    chunks = (
        Chunk(logits_NV[start : start + step], labels_N[start : start + step], starts_N[start : start + step])
        for start in range(0, num_rows, step)
    )
    return reduce_chunks(chunks, capture, logits_NV.device)


def reduce_chunks(chunks: Iterator[Chunk], capture: CaptureSettings, device: torch.device) -> ReducedRows:
    """The same for rows that come in chunks, whose logits need not exist before their turn: those of up to
    `in_flight.GPU_PIECES` chunks are held on a GPU."""
    pieces = (_reduce_chunk(logits.float(), labels, starts, capture) for logits, labels, starts in chunks)
    return concatenate_rows(run_in_order(pieces, device.type), device)


def reduce_hardest(vocab_size: int, capture: CaptureSettings, device: torch.device) -> ReducedRows:
    """Reduce chunks of the rows that take most memory, as many as are under way at a time: equal logits, which no block
    can be left out of."""
    rows = rows_per_chunk(vocab_size, chunk_bytes(device))
    none_N = torch.zeros(rows, dtype=torch.int64, device=device)
    flat = (
        Chunk(torch.zeros(rows, vocab_size, device=device), none_N, none_N.double())
        for _ in range(GPU_PIECES)
    )
    return reduce_chunks(flat, capture, device)


def concatenate_rows(parts: Sequence[ReducedRows], device: torch.device | str = "cpu") -> ReducedRows:
    """Join parts in order; no parts make zero rows."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        none = torch.zeros(0, device=device)
        nodes = torch.zeros(0, len(TAIL_BETAS), device=device)
        return ReducedRows(none.int(), none.int(), none, nodes, none, *no_draws(0, device))
    return ReducedRows(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _reduce_chunk(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    starts_N: torch.Tensor,
    capture: CaptureSettings,
) -> Piece[ReducedRows]:
    """By the kernels where they run and have room, else by PyTorch's operations."""
    num_rows, vocab_size = logits_NV.shape
    has_room = num_rows > 0 and most_entries(capture.min_prob) <= MAX_BOUND
    if has_room and kernels.run_on(logits_NV.device.type, vocab_size):
        found = yield from _reduce_by_kernels(logits_NV, labels_N, starts_N, capture)
        if found is not None:
            return found
    return (yield from _reduce_by_operations(logits_NV, labels_N, starts_N, capture))


def _reduce_by_kernels(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    starts_N: torch.Tensor,
    capture: CaptureSettings,
) -> Piece[ReducedRows | None]:
    """None where a row has more blocks to look into than there is room for: ties of its likeliest entry."""
    from cache_builder.reduction import triton_rows

    picked = triton_rows.pick(
        logits_NV,
        labels_N,
        starts_N,
        room=most_entries(capture.min_prob),
        log_min_prob=math.log(capture.min_prob),
        max_k=min(capture.max_k, logits_NV.shape[1]),
        rate=capture.draw_rate,
    )
    num_entries, num_draws, crowded = yield picked.ends_3N[:, -1]
    if crowded:
        return None
    found = triton_rows.hand_over(picked, num_entries, num_draws)
    counts_N, draw_counts_N = picked.numbers_3N[:2].int()
    return ReducedRows(
        counts_N,
        found.ids_E,
        found.logprobs_E,
        picked.log_tail_nodes_NK,
        picked.label_logprobs_N,
        draw_counts_N,
        found.draw_ids_S,
        found.draw_logprobs_S,
    )


def _reduce_by_operations(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    starts_N: torch.Tensor,
    capture: CaptureSettings,
) -> Piece[ReducedRows]:
    vocab_size, min_prob = logits_NV.shape[1], capture.min_prob
    max_k = min(capture.max_k, vocab_size)
    blocks = block_statistics(logits_NV, TAIL_BETAS)
    max_N = blocks.maxima_NG.amax(-1)
    one = slice(TAIL_BETAS.index(1.0), TAIL_BETAS.index(1.0) + 1)
    at_one = Blocks(blocks.maxima_NG, blocks.sums_NKG[:, one])
    log_z_N = max_N + totals(at_one, (1.0,), max_N).squeeze(-1).log()  # of exp(l - m), so m is added back
    least_N = log_z_N + (math.log(min_prob) if min_prob > 0.0 else -math.inf)

    # The likeliest entry always passes.
    passes_NG = blocks.maxima_NG >= torch.minimum(least_N, max_N).unsqueeze(-1)
    (num_passes,) = yield passes_NG.sum().unsqueeze(0)
    if num_passes * BLOCK * 3 > logits_NV.numel():
        step = rows_per_dense_chunk(vocab_size, logits_NV.device)
        if len(logits_NV) > step:
            parts = []
            for start in range(0, len(logits_NV), step):
                rows = slice(start, start + step)
                parts.append(
                    (
                        yield from _reduce_by_operations(
                            logits_NV[rows], labels_N[rows], starts_N[rows], capture
                        )
                    )
                )
            return concatenate_rows(parts)
        head = dense_head(logits_NV, least_N, max_k)
    else:
        head = yield from sparse_head(
            logits_NV, max_N, least_N, max_k, passes_NG, num_passes, blocks, most_entries(min_prob)
        )
    sizes = [head.counts_N.sum()]
    if capture.draw_rate:
        line = lay_out(head.tail, log_z_N, vocab_size=vocab_size, rate=capture.draw_rate, starts_N=starts_N)
        sizes += [line.counts_N.sum(), line.counts_N.amax()]
    num_entries, *numbers = yield torch.stack(sizes)
    drawn = no_draws(len(logits_NV), logits_NV.device)
    if capture.draw_rate:
        num_draws, width = numbers
        drawn = draw_from_tails(
            logits_NV, head.tail, line, log_z_N, starts_N=starts_N, num_draws=num_draws, width=width
        )
    rows_E, slots_E = nonzero(head.keep_NH, num_entries)
    return ReducedRows(
        head.counts_N.int(),
        head.ids_NH[rows_E, slots_E].int(),
        head.values_NH[rows_E, slots_E] - log_z_N[rows_E],
        _log_tail(head.tail.blocks, log_z_N),
        logits_NV.gather(-1, labels_N.unsqueeze(-1)).squeeze(-1) - log_z_N,
        *drawn,
    )


def _log_tail(blocks: Blocks, log_z_N: torch.Tensor) -> torch.Tensor:
    """float32 [N, K]: A at every node, relative to the largest logit of the tail, so that none underflows."""
    top_N = blocks.maxima_NG.amax(-1).clamp_(min=LOWEST)  # -inf where the tail is empty
    betas_K = _betas(log_z_N.device)
    return totals(blocks, TAIL_BETAS, top_N).log_().addcmul_((top_N - log_z_N).unsqueeze(-1), betas_K)


@lru_cache
def _betas(device: torch.device) -> torch.Tensor:
    """float32 [K], sent to the device once."""
    with torch.inference_mode(False):
        return torch.tensor(TAIL_BETAS, device=device)
