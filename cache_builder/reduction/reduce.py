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
  1. maxima of the blocks, then of the row, m (one pass);
  2. sums over the blocks of exp(beta * (l - m)) for every beta (one pass): a beta that is the sum of two
     earlier ones costs a product, so seven temperatures cost one exponential.  The sums at beta = 1 give Z,
     hence the exact threshold;
  3. only blocks whose maximum passes the threshold can hold a head entry, at most 1/min_prob of them and in
     practice a few: they are gathered, the head is picked from them, and their share of the tail is summed
     again without it.  Blocks without a head entry are tail as they are.
Where too many blocks pass (min_prob = 0, flat rows) a plain top-k over the vocabulary replaces step 3.
Draws take no pass of their own: the block sums say which blocks to look at (draw_from_tails.py).

Cost: two passes over the logits and one exponential per entry; no sort of the vocabulary.

N: rows, V: vocabulary, K: tail nodes, E: kept entries of all rows, S: tail draws of all rows, G: blocks of a
row, J: entries in a block, Q: gathered blocks of all rows, H: candidates of the row that has most.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from cache_builder.reduction.block_sums import (
    BLOCK,
    block_statistics,
    block_sums,
    eager_sums,
    num_blocks,
)
from cache_builder.reduction.draw_from_tails import BlockedTail, block_entries, draw_from_tails, no_draws
from formats.capture_settings import CaptureSettings
from formats.logprobs.tail_draws import POWER
from formats.logprobs.tail_function import TAIL_BETAS

CPU_CHUNK_BYTES = 1 << 26
"""fp32 bytes of logits reduced at a time on a CPU; the two passes cut this into what fits its caches."""
CUDA_CHUNK_BYTES = 1 << 29
"""fp32 bytes of logits reduced at a time on a GPU: enough to fill it, little beside its memory."""
UNDERFLOW = 1e-30
"""Sums below this have lost terms to the range of fp32 and are taken again relative to their own maximum."""


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


class _Split(NamedTuple):
    """Head and rest of the rows of a chunk."""

    head_ids_NH: torch.Tensor
    head_NH: torch.Tensor
    """Logits; -inf after the last."""
    tail_sums_NK: torch.Tensor
    tail: BlockedTail
    """What to draw from."""


def rows_per_chunk(vocab_size: int, device_type: str) -> int:
    """Rows to reduce at a time so that their logits in fp32 fit the budget of the device."""
    budget = CPU_CHUNK_BYTES if device_type == "cpu" else CUDA_CHUNK_BYTES
    return max(1, budget // (4 * vocab_size))


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
    step = rows_per_chunk(vocab_size, logits_NV.device.type)
    parts = [
        _reduce_chunk(
            logits_NV[start : start + step].float(),
            capture,
            labels_N[start : start + step],
            starts_N[start : start + step],
        )
        for start in range(0, num_rows, step)
    ]
    return concatenate_rows(parts, logits_NV.device)


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
    capture: CaptureSettings,
    labels_N: torch.Tensor,
    starts_N: torch.Tensor,
) -> ReducedRows:
    vocab_size, max_k, min_prob = logits_NV.shape[1], capture.max_k, capture.min_prob
    max_k = min(max_k, vocab_size)
    betas_K = torch.tensor(TAIL_BETAS, dtype=torch.float32, device=logits_NV.device)
    maxima_NG, sums_NKG = block_statistics(logits_NV, TAIL_BETAS)
    max_N = maxima_NG.amax(-1)
    log_z_N = max_N + sums_NKG[:, TAIL_BETAS.index(1.0)].sum(-1).log()  # of exp(l - m), so m is added back
    least_N = log_z_N + (math.log(min_prob) if min_prob > 0.0 else -math.inf)

    passes_NG = maxima_NG >= torch.minimum(least_N, max_N).unsqueeze(-1)  # the likeliest entry always passes
    if int(passes_NG.sum()) * BLOCK * 3 > logits_NV.numel():
        split = _dense_head(logits_NV, max_N, least_N, max_k)
    else:
        split = _sparse_head(logits_NV, max_N, least_N, max_k, passes_NG, sums_NKG)
    head_ids_NH, head_NH, tail_sums_NK, tail = split
    log_tail_NK = tail_sums_NK.log() + (max_N - log_z_N).unsqueeze(-1) * betas_K
    keep_NH = head_NH > -math.inf
    keep_NH[:, 0] = True  # a NaN row keeps one entry, which carries the NaN to whoever reads it
    _repair_underflow(logits_NV, log_z_N, head_ids_NH, keep_NH, tail_sums_NK, log_tail_NK, betas_K)
    drawn = no_draws(len(logits_NV), logits_NV.device)
    if capture.draw_rate:
        drawn = draw_from_tails(
            tail, max_N, log_z_N, vocab_size=vocab_size, rate=capture.draw_rate, starts_N=starts_N
        )
    return ReducedRows(
        keep_NH.sum(-1, dtype=torch.int32),
        head_ids_NH[keep_NH].int(),
        (head_NH - log_z_N.unsqueeze(-1))[keep_NH],
        log_tail_NK,
        logits_NV.gather(-1, labels_N.unsqueeze(-1)).squeeze(-1) - log_z_N,
        *drawn,
    )


def _sparse_head(
    logits_NV: torch.Tensor,
    max_N: torch.Tensor,
    least_N: torch.Tensor,
    max_k: int,
    passes_NG: torch.Tensor,
    sums_NKG: torch.Tensor,
) -> _Split:
    """Step 3: only the blocks that pass."""
    num_rows, vocab_size = logits_NV.shape
    blocks, device = num_blocks(vocab_size), logits_NV.device
    rows_Q, blocks_Q = passes_NG.nonzero(as_tuple=True)
    ids_JQ = blocks_Q + blocks * torch.arange(BLOCK, device=device).unsqueeze(-1)
    outside_JQ = ids_JQ >= vocab_size
    values_JQ = logits_NV[rows_Q, ids_JQ.clamp_(max=vocab_size - 1)].masked_fill_(outside_JQ, -math.inf)
    # Transposed, so that the entries of a row come one after the other.  NaN compares false: no entry.
    c_E, s_E = (values_JQ >= torch.minimum(least_N, max_N)[rows_Q]).t().nonzero(as_tuple=True)

    rows_E = rows_Q[c_E]
    counts_N = torch.bincount(rows_E, minlength=num_rows)
    width = max(int(counts_N.max()), 1)
    rank_E = torch.arange(len(rows_E), device=device) - (counts_N.cumsum(0) - counts_N)[rows_E]
    head_NH = torch.full((num_rows, width), -math.inf, device=device)
    # Empty slots need an id that exists: a NaN row keeps its first slot, and the repair indexes by it.
    head_ids_NH = torch.full((num_rows, width), vocab_size - 1, device=device)
    head_NH[rows_E, rank_E] = values_JQ[s_E, c_E]
    head_ids_NH[rows_E, rank_E] = ids_JQ[s_E, c_E]
    head_NH, head_ids_NH = _by_value_then_id(head_NH, head_ids_NH)
    head_NH, head_ids_NH = _below_out(head_NH[:, :max_k], least_N), head_ids_NH[:, :max_k]

    # The gathered blocks once more, without the head.
    rows_E, slots_E = (head_NH > -math.inf).nonzero(as_tuple=True)
    ids_E = head_ids_NH[rows_E, slots_E]
    gathered_NG = (passes_NG.view(-1).cumsum(0) - 1).view_as(passes_NG)
    values_JQ[ids_E // blocks, gathered_NG[rows_E, ids_E % blocks]] = -math.inf
    shifted_JQ = values_JQ - max_N[rows_Q]
    sums_KQ = eager_sums(shifted_JQ.unsqueeze(0), shifted_JQ.new_zeros(1), TAIL_BETAS)[0]
    tail_sums_NK = sums_NKG.masked_fill_(passes_NG.unsqueeze(1), 0).sum(-1)
    tail_sums_NK.index_add_(0, rows_Q, sums_KQ.t())

    def tail_entries(rows_S: torch.Tensor, blocks_S: torch.Tensor) -> torch.Tensor:
        entries_SJ = block_entries(logits_NV, rows_S, blocks_S)
        passes_S = passes_NG[rows_S, blocks_S]
        at_S = gathered_NG[rows_S[passes_S], blocks_S[passes_S]]
        entries_SJ[passes_S] = values_JQ.t()[at_S]  # the head is out of these
        return entries_SJ

    power = TAIL_BETAS.index(POWER)
    power_NG = sums_NKG[:, power]
    power_NG[rows_Q, blocks_Q] = sums_KQ[power]
    return _Split(head_ids_NH, head_NH, tail_sums_NK, BlockedTail(power_NG, tail_entries))


def _by_value_then_id(values_NH: torch.Tensor, ids_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries by descending value, equal ones by ascending id: one sort of 64-bit keys.

    The bits of an fp32 number, read as an integer and mirrored where negative, sort like the number.
    """
    bits_NH = values_NH.view(torch.int32)
    ordered_NH = torch.where(bits_NH < 0, bits_NH ^ 0x7FFFFFFF, bits_NH).long()
    order_NH = ((ordered_NH << 32) - ids_NH).argsort(dim=-1, descending=True)
    return values_NH.gather(-1, order_NH), ids_NH.gather(-1, order_NH)


def _below_out(head_NH: torch.Tensor, least_N: torch.Tensor) -> torch.Tensor:
    """-inf for sorted entries below the threshold, except the likeliest of each row."""
    below_NH = head_NH < least_N.unsqueeze(-1)
    below_NH[:, 0] = False
    return head_NH.masked_fill(below_NH, -math.inf)


def _dense_head(
    logits_NV: torch.Tensor,
    max_N: torch.Tensor,
    least_N: torch.Tensor,
    max_k: int,
) -> _Split:
    """Step 3 without blocks: top-k over the vocabulary, then the sums again without the head."""
    head_NH, head_ids_NH = _topk_by_id(logits_NV, max_k)
    head_NH = _below_out(head_NH, least_N)
    masked_NV = logits_NV.clone()
    rows_E, slots_E = (head_NH > -math.inf).nonzero(as_tuple=True)
    masked_NV[rows_E, head_ids_NH[rows_E, slots_E]] = -math.inf
    sums_NKG = block_sums(masked_NV, max_N, TAIL_BETAS)
    tail = BlockedTail(sums_NKG[:, TAIL_BETAS.index(POWER)], partial(block_entries, masked_NV))
    return _Split(head_ids_NH, head_NH, sums_NKG.sum(-1), tail)


def _topk_by_id(logits_NV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`torch.topk` with ties broken by ascending id, also at the cut."""
    values_NH, ids_NH = logits_NV.topk(k, dim=-1)
    last_N1 = values_NH[:, -1:]
    tied_N = (logits_NV == last_N1).sum(-1) > (values_NH == last_N1).sum(-1)
    rows_R = tied_N.nonzero().squeeze(-1)
    if len(rows_R):
        values_RV, ids_RV = logits_NV[rows_R].sort(stable=True, dim=-1, descending=True)
        values_NH[rows_R], ids_NH[rows_R] = values_RV[:, :k], ids_RV[:, :k]
    return _by_value_then_id(values_NH, ids_NH)


def _repair_underflow(
    logits_NV: torch.Tensor,
    log_z_N: torch.Tensor,
    head_ids_NH: torch.Tensor,
    keep_NH: torch.Tensor,
    tail_sums_NK: torch.Tensor,
    log_tail_NK: torch.Tensor,
    betas_K: torch.Tensor,
) -> None:
    """Rows so peaked that the tail left the range of fp32: once more, relative to the maximum of the tail."""
    rows_R = (tail_sums_NK.amin(-1) < UNDERFLOW).nonzero().squeeze(-1)
    if len(rows_R) == 0:
        return
    logprobs_RV = logits_NV[rows_R] - log_z_N[rows_R].unsqueeze(-1)
    row_E, slot_E = keep_NH[rows_R].nonzero(as_tuple=True)
    logprobs_RV[row_E, head_ids_NH[rows_R][row_E, slot_E]] = -math.inf
    max_R = logprobs_RV.amax(-1).clamp(min=torch.finfo(torch.float32).min)  # -inf where the tail is empty
    sums_RK = block_sums(logprobs_RV, max_R, betas_K.tolist()).sum(-1)
    log_tail_NK[rows_R] = sums_RK.log() + max_R.unsqueeze(-1) * betas_K
