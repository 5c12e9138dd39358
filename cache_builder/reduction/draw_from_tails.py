"""Tail draws of many rows at once, out of the block sums that the reduction has anyway.

formats/logprobs/tail_draws.py says what a draw is. The expected numbers of a row's tail tokens are laid end to
end, block after block, and a block's share of that line is its sum at beta = 3/4: the line is known without another
look at the vocabulary. Each point is looked up among the blocks; only the few blocks that are hit are read,
and the point is looked up among their entries.

N: rows, S: draws of all rows, G: blocks of a row, J: entries in a block, W: points of the row that has most.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from cache_builder.reduction.block_sums import BLOCK, num_blocks
from formats.logprobs.tail_draws import POWER, most_draws


class BlockedTail(NamedTuple):
    """The vocabulary without the heads, block by block."""

    sums_NG: torch.Tensor
    """float32: sums over the blocks of exp(POWER * (l - max))."""
    entries: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """float32 [S, J]: the logits of a block for every (row [S], block [S]); -inf where an entry is in the
    head or outside the vocabulary."""


class Draws(NamedTuple):
    """Draws of N rows, ragged: row i owns the next `counts[i]`."""

    counts: torch.Tensor
    """int32 [N]."""
    token_ids: torch.Tensor
    """int32 [S], a token that was drawn twice twice."""
    logprobs: torch.Tensor
    """float32 [S]."""


def no_draws(num_rows: int, device: torch.device | str = "cpu") -> Draws:
    """What rows have of which nothing is drawn."""
    none = torch.zeros(0, device=device)
    return Draws(torch.zeros(num_rows, dtype=torch.int32, device=device), none.int(), none)


def block_entries(logits_NV: torch.Tensor, rows_S: torch.Tensor, blocks_S: torch.Tensor) -> torch.Tensor:
    """float32 [S, J]: the entries of these blocks of these rows, -inf outside the vocabulary."""
    vocab_size = logits_NV.shape[1]
    strides_J = num_blocks(vocab_size) * torch.arange(BLOCK, device=logits_NV.device)
    ids_SJ = blocks_S.unsqueeze(-1) + strides_J
    outside_SJ = ids_SJ >= vocab_size
    values_SJ = logits_NV[rows_S.unsqueeze(-1), ids_SJ.clamp_(max=vocab_size - 1)]
    return values_SJ.masked_fill_(outside_SJ, -torch.inf)


def draw_from_tails(
    tail: BlockedTail,
    max_N: torch.Tensor,
    log_z_N: torch.Tensor,
    *,
    vocab_size: int,
    rate: int,
    starts_N: torch.Tensor,
) -> Draws:
    """Systematic draws of every row: points start, start + 1, ... on the line of expected numbers.

    Args:
        tail: what is not in the heads.
        max_N, log_z_N: float32, the largest logit of each row and the logarithm of its partition function.
        rate: as in `formats.logprobs.tail_draws.TailDraws`.
        starts_N: float64 in [0, 1), see `formats.logprobs.tail_draws.starts`.

    Returns:
        `Draws` on the device of the logits; a row with NaN has none.
    """
    device = max_N.device
    scale_N = rate * (POWER * (max_N.double() - log_z_N)).exp()
    ends_NG = tail.sums_NG.double().mul_(scale_N.unsqueeze(-1)).cumsum(-1)
    totals_N = ends_NG[:, -1]
    needed_N = (totals_N.nan_to_num(0.0, 0.0, 0.0) - starts_N).ceil()
    width = int(needed_N.clamp_(0, most_draws(vocab_size, rate)).amax())
    if width == 0:
        return no_draws(len(max_N), device)
    points_NW = starts_N.unsqueeze(-1) + torch.arange(width, device=device)
    hits_NW = points_NW < totals_N.unsqueeze(-1)  # NaN compares false
    # Right of equal ends: a block of expected number zero ends where it begins, and no point picks it.
    blocks_NW = torch.searchsorted(ends_NG, points_NW, right=True)
    rows_S, nth_S = hits_NW.nonzero(as_tuple=True)
    blocks_S = blocks_NW[rows_S, nth_S]
    begins_S = ends_NG[rows_S, (blocks_S - 1).clamp_(min=0)].masked_fill_(blocks_S == 0, 0.0)
    shares_S = (points_NW[rows_S, nth_S] - begins_S) / (ends_NG[rows_S, blocks_S] - begins_S)

    entries_SJ = tail.entries(rows_S, blocks_S)
    running_SJ = (POWER * (entries_SJ.double() - max_N[rows_S].unsqueeze(-1))).exp_().cumsum(-1)
    total_S1 = running_SJ[:, -1:]
    picked_S = (running_SJ <= shares_S.unsqueeze(-1) * total_S1).sum(-1)
    last_S = (running_SJ < total_S1).sum(-1)  # the last entry that adds anything: rounding picks none beyond
    picked_S = torch.minimum(picked_S, last_S)
    return Draws(
        hits_NW.sum(-1, dtype=torch.int32),
        (blocks_S + tail.sums_NG.shape[1] * picked_S).int(),
        entries_SJ.gather(-1, picked_S.unsqueeze(-1)).squeeze(-1) - log_z_N[rows_S],
    )
