"""Tail draws of many rows at once, out of the block sums that the reduction has anyway.

formats/logprobs/tail_draws.py says what a draw is. The expected numbers of a row's tail tokens are laid end to
end, block after block, and a block's share of that line is its sum at beta = 3/4: the line is known without another
look at the vocabulary. Each point is looked up among the blocks; only the few blocks that are hit are read,
and the point is looked up among their entries.

N: rows, K: blocks of a row, S: entries in a block, W: points of the row that has most, D: draws of all rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from cache_builder.reduction.block_sums import BLOCK, num_blocks
from formats.logprobs.tail_draws import POWER, most_draws


class BlockedTail(NamedTuple):
    """The vocabulary without the heads, block by block."""

    sums_NK: torch.Tensor
    """float32: sums over the blocks of exp(POWER * (l - max))."""
    entries: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """float32 [D, S]: the logits of a block for every (row [D], block [D]); -inf where an entry is in the
    head or outside the vocabulary."""


class Draws(NamedTuple):
    """Draws of N rows, ragged: row i owns the next `counts[i]`."""

    counts: torch.Tensor
    """int32 [N]."""
    token_ids: torch.Tensor
    """int32 [D], a token that was drawn twice twice."""
    logprobs: torch.Tensor
    """float32 [D]."""


def no_draws(num_rows: int, device: torch.device | str = "cpu") -> Draws:
    """What rows have of which nothing is drawn."""
    none = torch.zeros(0, device=device)
    return Draws(torch.zeros(num_rows, dtype=torch.int32, device=device), none.int(), none)


def block_entries(logits_NV: torch.Tensor, rows_D: torch.Tensor, blocks_D: torch.Tensor) -> torch.Tensor:
    """float32 [D, S]: the entries of these blocks of these rows, -inf outside the vocabulary."""
    vocab_size = logits_NV.shape[1]
    strides_S = num_blocks(vocab_size) * torch.arange(BLOCK, device=logits_NV.device)
    ids_DS = blocks_D.unsqueeze(-1) + strides_S
    outside_DS = ids_DS >= vocab_size
    values_DS = logits_NV[rows_D.unsqueeze(-1), ids_DS.clamp_(max=vocab_size - 1)]
    return values_DS.masked_fill_(outside_DS, -torch.inf)


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
    ends_NK = tail.sums_NK.double().mul_(scale_N.unsqueeze(-1)).cumsum(-1)
    totals_N = ends_NK[:, -1]
    needed_N = (totals_N.nan_to_num(0.0, 0.0, 0.0) - starts_N).ceil()
    width = int(needed_N.clamp_(0, most_draws(vocab_size, rate)).amax())
    if width == 0:
        return no_draws(len(max_N), device)
    points_NW = starts_N.unsqueeze(-1) + torch.arange(width, device=device)
    hits_NW = points_NW < totals_N.unsqueeze(-1)  # NaN compares false
    # Right of equal ends: a block of expected number zero ends where it begins, and no point picks it.
    blocks_NW = torch.searchsorted(ends_NK, points_NW, right=True)
    rows_D, nth_D = hits_NW.nonzero(as_tuple=True)
    blocks_D = blocks_NW[rows_D, nth_D]
    begins_D = ends_NK[rows_D, (blocks_D - 1).clamp_(min=0)].masked_fill_(blocks_D == 0, 0.0)
    shares_D = (points_NW[rows_D, nth_D] - begins_D) / (ends_NK[rows_D, blocks_D] - begins_D)

    entries_DS = tail.entries(rows_D, blocks_D)
    running_DS = (POWER * (entries_DS.double() - max_N[rows_D].unsqueeze(-1))).exp_().cumsum(-1)
    total_D1 = running_DS[:, -1:]
    picked_D = (running_DS <= shares_D.unsqueeze(-1) * total_D1).sum(-1)
    last_D = (running_DS < total_D1).sum(-1)  # the last entry that adds anything: rounding picks none beyond
    picked_D = torch.minimum(picked_D, last_D)
    return Draws(
        hits_NW.sum(-1, dtype=torch.int32),
        (blocks_D + tail.sums_NK.shape[1] * picked_D).int(),
        entries_DS.gather(-1, picked_D.unsqueeze(-1)).squeeze(-1) - log_z_N[rows_D],
    )
