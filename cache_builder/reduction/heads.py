"""Where the head of every row is: among a few blocks, or by a top-k over the vocabulary.

N: rows, V: vocabulary, K: tail nodes, G: blocks of a row, J: entries in a block, Q: gathered blocks of all rows, C:
candidates for a head of all rows, H: candidates of the row that has most.
"""

import math
from typing import NamedTuple

import torch

from cache_builder.reduction.block_sums import block_statistics, plain_sums
from cache_builder.reduction.blocks import BLOCK, Blocks
from cache_builder.reduction.draw_from_tails import BlockedTail, Cut, block_entries
from cache_builder.reduction.in_flight import Piece
from formats.logprobs.tail_draws import POWER
from formats.logprobs.tail_function import TAIL_BETAS

MAX_BOUND = 512
"""Up to so many candidates a row, room for the most there can be costs less than asking a GPU how many there are."""


class Head(NamedTuple):
    """Heads of the rows of a chunk, and the blocks that they leave."""

    ids_NH: torch.Tensor
    values_NH: torch.Tensor
    """Logits, largest first."""
    keep_NH: torch.Tensor
    """bool: the first few of every row."""
    counts_N: torch.Tensor
    """int64: how many."""
    tail: BlockedTail


def most_entries(min_prob: float) -> int:
    """How many entries of a row can reach a probability, rounding included."""
    return min(int(1.001 / min_prob) + 1, 1 << 31) if min_prob else 1 << 31


def nonzero(mask: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """`mask.nonzero(as_tuple=True)` of a mask that is known to hold `size`, which asks a GPU for nothing."""
    return mask.nonzero_static(size=size, fill_value=0).unbind(-1)


def _kept(values_NH: torch.Tensor, least_N: torch.Tensor) -> torch.Tensor:
    """bool [N, H]: entries from the threshold up; the first of each row whatever it is, and of a row with NaN one
    entry, which carries the NaN to whoever reads it."""
    keep_NH = (values_NH >= least_N.unsqueeze(-1)) & (values_NH > -math.inf)
    keep_NH[:, 0] = True
    return keep_NH


def _cut(ids_NH: torch.Tensor, values_NH: torch.Tensor, counts_N: torch.Tensor) -> Cut:
    """Behind the first few entries of every row."""
    last_N1 = counts_N.unsqueeze(-1) - 1
    return Cut(values_NH.gather(-1, last_N1).squeeze(-1), ids_NH.gather(-1, last_N1).squeeze(-1))


def _room(counts_N: torch.Tensor, most: int, ask: bool) -> Piece[tuple[int, int]]:
    """How many candidates there are in all, and in a row, or at most can be where we do not ask."""
    if not ask:
        return most * len(counts_N), most
    number, width = yield torch.stack([counts_N.sum(), counts_N.amax()])
    return number, max(width, 1)


def sparse_head(
    logits_NV: torch.Tensor,
    max_N: torch.Tensor,
    least_N: torch.Tensor,
    max_k: int,
    passes_NG: torch.Tensor,
    num_passes: int,
    blocks: Blocks,
    most: int,
) -> Piece[Head]:
    """Only the blocks that pass; what is left of them is written into `blocks`."""
    num_rows, vocab_size = logits_NV.shape
    device, last_id = logits_NV.device, vocab_size - 1
    rows_Q, blocks_Q = nonzero(
        passes_NG, max(num_passes, 1)
    )  # where all is NaN, and nothing passes: any block
    values_QJ, ids_QJ = block_entries(logits_NV, rows_Q, blocks_Q)

    # The likeliest, which is the whole head of a row where none reaches the threshold.  NaN equals nothing.
    firsts_Q = ids_QJ.masked_fill(values_QJ != max_N[rows_Q].unsqueeze(-1), last_id).amin(-1)
    first_N = torch.full((num_rows,), last_id, device=device).scatter_reduce_(0, rows_Q, firsts_Q, "amin")
    reach_QJ = (values_QJ >= least_N[rows_Q].unsqueeze(-1)) & (values_QJ > -math.inf)
    counts_N = torch.zeros(num_rows, dtype=torch.int64, device=device).index_add_(0, rows_Q, reach_QJ.sum(-1))
    room, width = yield from _room(counts_N, most, device.type == "cpu" or most > MAX_BOUND)
    # Room that stays empty belongs to one row more than there are.
    at_C = reach_QJ.view(-1).nonzero_static(size=room, fill_value=-1).squeeze(-1)
    rows_C = rows_Q[at_C.clamp(min=0) // BLOCK]
    rank_C = torch.arange(room, device=device) - (counts_N.cumsum(0) - counts_N)[rows_C]
    rows_C = rows_C.masked_fill_(at_C < 0, num_rows)
    rank_C.clamp_(max=width - 1)
    values_NH = torch.full((num_rows + 1, width), -math.inf, device=device)
    ids_NH = torch.full((num_rows + 1, width), last_id, device=device)
    values_NH[rows_C, rank_C] = values_QJ.view(-1)[at_C]
    ids_NH[rows_C, rank_C] = ids_QJ.view(-1)[at_C]
    values_NH, ids_NH = values_NH[:num_rows], ids_NH[:num_rows]
    none_N = counts_N == 0
    values_NH[:, 0] = torch.where(none_N, max_N, values_NH[:, 0])
    ids_NH[:, 0] = torch.where(none_N, first_N, ids_NH[:, 0])
    values_NH, ids_NH = _by_value_then_id(values_NH, ids_NH)
    values_NH, ids_NH = values_NH[:, :max_k], ids_NH[:, :max_k]

    keep_NH = _kept(values_NH, least_N)
    counts_N = keep_NH.sum(-1)
    cut = _cut(ids_NH, values_NH, counts_N)
    values_QJ.masked_fill_(cut.above(rows_Q, values_QJ, ids_QJ), -math.inf)
    maxima_Q = values_QJ.amax(-1)
    sums_KQ = plain_sums(values_QJ.t().unsqueeze(0), maxima_Q.unsqueeze(0), TAIL_BETAS)[0]
    blocks.maxima_NG[rows_Q, blocks_Q] = maxima_Q
    blocks.sums_NKG[rows_Q, :, blocks_Q] = sums_KQ.t()
    return Head(ids_NH, values_NH, keep_NH, counts_N, BlockedTail(blocks, TAIL_BETAS.index(POWER), cut))


def _by_value_then_id(values_NH: torch.Tensor, ids_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries by descending value, equal ones by ascending id: one sort of 64-bit keys.

    The bits of an fp32 number, read as an integer and mirrored where negative, sort like the number.
    """
    bits_NH = (values_NH + 0.0).view(torch.int32)  # -0 equals 0
    ordered_NH = torch.where(bits_NH < 0, bits_NH ^ 0x7FFFFFFF, bits_NH).long()
    order_NH = ((ordered_NH << 32) - ids_NH).argsort(dim=-1, descending=True)
    return values_NH.gather(-1, order_NH), ids_NH.gather(-1, order_NH)


def dense_head(logits_NV: torch.Tensor, least_N: torch.Tensor, max_k: int) -> Head:
    """Top-k over the vocabulary, and the blocks of all that it leaves."""
    values_NH, ids_NH = _topk_by_id(logits_NV, max_k)
    keep_NH = _kept(values_NH, least_N)
    counts_N = keep_NH.sum(-1)
    cut = _cut(ids_NH, values_NH, counts_N)
    ids_V = torch.arange(logits_NV.shape[1], device=logits_NV.device)
    in_head_NV = cut.above(slice(None), logits_NV, ids_V)
    blocks = block_statistics(logits_NV.masked_fill(in_head_NV, -math.inf), TAIL_BETAS)
    return Head(ids_NH, values_NH, keep_NH, counts_N, BlockedTail(blocks, TAIL_BETAS.index(POWER), cut))


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
