"""Tail draws of many rows at once, out of the block sums that the reduction has anyway.

formats/logprobs/tail_draws.py says what a draw is. The expected numbers of a row's tail tokens are laid end to
end, block after block, and a block's share of that line is its sum at beta = 3/4: the line is known without another
look at the vocabulary. Each point is looked up among the blocks; only the few blocks that are hit are read,
and the point is looked up among their entries.

N: rows, S: draws of all rows, E: kept entries of all rows, G: blocks of a row, J: entries in a block, W: points of the
row that has most.
"""

from typing import NamedTuple

import torch

from cache_builder.reduction.blocks import BLOCK, Blocks, num_blocks
from formats.logprobs.tail_draws import POWER, most_draws


class Cut(NamedTuple):
    """Where each row's head ends: it holds what is larger, and what is as large with an id up to this one."""

    last_N: torch.Tensor
    """float32: logit of the head's last entry."""
    last_id_N: torch.Tensor
    """int64."""

    def above(self, rows: torch.Tensor | slice, values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """bool: which of some logits, along the last axis of each of these rows, are in the head; NaN never is."""
        last, last_id = self.last_N[rows].unsqueeze(-1), self.last_id_N[rows].unsqueeze(-1)
        return (values > last) | ((values == last) & (ids <= last_id))


class BlockedTail(NamedTuple):
    """The vocabulary without the heads, block by block."""

    blocks: Blocks
    """With the sums at the nodes."""
    power: int
    """Which of the nodes is `POWER`."""
    cut: Cut


class Draws(NamedTuple):
    """Draws of N rows, ragged: row i owns the next `counts[i]`."""

    counts: torch.Tensor
    """int32 [N]."""
    token_ids: torch.Tensor
    """int32 [S], a token that was drawn twice twice."""
    logprobs: torch.Tensor
    """float32 [S]."""


class Line(NamedTuple):
    """The expected numbers of every row's tail laid end to end, and how many points lie on it."""

    ends_NG: torch.Tensor
    """float64: where each block ends."""
    counts_N: torch.Tensor
    """int64."""


def no_draws(num_rows: int, device: torch.device | str = "cpu") -> Draws:
    """What rows have of which nothing is drawn."""
    none = torch.zeros(0, device=device)
    return Draws(torch.zeros(num_rows, dtype=torch.int32, device=device), none.int(), none)


def block_entries(
    logits_NV: torch.Tensor, rows_S: torch.Tensor, blocks_S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(float32 [S, J], int64 [S, J]): the entries of these blocks of these rows and their ids; -inf, and the last id,
    outside the vocabulary."""
    vocab_size = logits_NV.shape[1]
    strides_J = num_blocks(vocab_size) * torch.arange(BLOCK, device=logits_NV.device)
    ids_SJ = blocks_S.unsqueeze(-1) + strides_J
    outside_SJ = ids_SJ >= vocab_size
    ids_SJ = ids_SJ.clamp_(max=vocab_size - 1)
    values_SJ = logits_NV[rows_S.unsqueeze(-1), ids_SJ]
    return values_SJ.masked_fill_(outside_SJ, -torch.inf), ids_SJ


def lay_out(
    tail: BlockedTail, log_z_N: torch.Tensor, *, vocab_size: int, rate: int, starts_N: torch.Tensor
) -> Line:
    """How much of each block is expected, and how many points start, start + 1, ... fall on it.

    Args:
        tail: what is not in the heads.
        log_z_N: float32, the logarithm of each row's partition function.
        rate: as in `formats.logprobs.tail_draws.TailDraws`.
        starts_N: float64 in [0, 1), see `formats.logprobs.tail_draws.starts`.
    """
    maxima_NG, sums_NKG = tail.blocks
    expected_NG = ((maxima_NG - log_z_N.unsqueeze(-1)) * POWER).exp_() * sums_NKG[:, tail.power]
    ends_NG = expected_NG.double().mul_(rate).cumsum(-1)
    totals_N = ends_NG[:, -1]
    counts_N = (totals_N.nan_to_num(0.0, 0.0, 0.0) - starts_N).ceil_()
    counts_N.clamp_(0, most_draws(vocab_size, rate))
    # The last point may have been rounded onto the end of the line; NaN compares false, and counts nothing.
    on_N = starts_N + (counts_N - 1) < totals_N
    return Line(ends_NG, torch.where(on_N, counts_N, (counts_N - 1).clamp_(min=0)).long())


def draw_from_tails(
    logits_NV: torch.Tensor,
    tail: BlockedTail,
    line: Line,
    log_z_N: torch.Tensor,
    *,
    starts_N: torch.Tensor,
    num_draws: int,
    width: int,
) -> Draws:
    """Systematic draws of every row: what lies at the points start, start + 1, ... of its line.

    Args:
        tail, log_z_N, starts_N: as for `lay_out`.
        num_draws, width: sum and maximum of the line's counts, which the caller has fetched from the device.

    Returns:
        `Draws` on the device of the logits; a row with NaN has none.
    """
    device = logits_NV.device
    if num_draws == 0:
        return no_draws(len(logits_NV), device)
    rows_S = torch.repeat_interleave(
        torch.arange(len(logits_NV), device=device), line.counts_N, output_size=num_draws
    )
    nth_S = torch.arange(num_draws, device=device) - (line.counts_N.cumsum(0) - line.counts_N)[rows_S]
    points_NW = starts_N.unsqueeze(-1) + torch.arange(width, device=device)
    # Right of equal ends: a block of expected number zero ends where it begins, and no point picks it.
    blocks_S = torch.searchsorted(line.ends_NG, points_NW, right=True)[rows_S, nth_S]
    begins_S = line.ends_NG[rows_S, (blocks_S - 1).clamp_(min=0)].masked_fill_(blocks_S == 0, 0.0)
    shares_S = (points_NW[rows_S, nth_S] - begins_S) / (line.ends_NG[rows_S, blocks_S] - begins_S)

    entries_SJ, ids_SJ = block_entries(logits_NV, rows_S, blocks_S)
    entries_SJ.masked_fill_(tail.cut.above(rows_S, entries_SJ, ids_SJ), -torch.inf)
    most_S1 = entries_SJ.amax(-1, keepdim=True)
    running_SJ = (POWER * (entries_SJ.double() - most_S1)).exp_().cumsum(-1)
    total_S1 = running_SJ[:, -1:]
    picked_S = (running_SJ <= shares_S.unsqueeze(-1) * total_S1).sum(-1)
    last_S = (running_SJ < total_S1).sum(-1)  # the last entry that adds anything: rounding picks none beyond
    picked_S = torch.minimum(picked_S, last_S)
    return Draws(
        line.counts_N.int(),
        (blocks_S + num_blocks(logits_NV.shape[1]) * picked_S).int(),
        entries_SJ.gather(-1, picked_S.unsqueeze(-1)).squeeze(-1) - log_z_N[rows_S],
    )
