"""The teacher's side of one batch: which rows it speaks about, its kept tokens, and the mass of its tail.

Everything is ragged and flat, so that a batch moves to the device in a few copies and no padding is ever
built. Position p of the batch is the hidden state `rows[p]` of the flattened [batch * sequence, hidden]
tensor; its kept tokens are `offsets[p]:offsets[p + 1]`.

P: positions with teacher targets, E: kept entries of all positions together, S: tail draws of all positions
together.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from formats.errors import FormatError


@dataclass(frozen=True, eq=False)
class TeacherBatch:
    """Teacher targets of one batch at one temperature.

    Raises:
        FormatError: the shapes do not fit together, or the temperature is not positive.
    """

    rows: torch.Tensor
    """int64 [P], ascending, each at most once: the hidden state of this row predicts the target token."""
    offsets: torch.Tensor
    """int64 [P + 1]: the entries of position p are offsets[p] to offsets[p + 1]."""
    token_ids: torch.Tensor
    """int32 or int64 [E]: the kept tokens; no token twice within a position."""
    logprobs: torch.Tensor
    """float32 [E]: their natural logprobs at T = 1, normalised over the whole vocabulary."""
    log_tail: torch.Tensor
    """float32 [P]: A(1/T) = log of the sum of exp(logprob / T) over all tokens not kept; -inf if none."""
    temperature: float = 1.0
    """The T at which `log_tail` was taken, and at which the loss compares teacher and student."""
    draw_offsets: torch.Tensor | None = None
    """int64 [P + 1]: the tail draws of p are draw_offsets[p] to draw_offsets[p + 1]; None without any."""
    draw_ids: torch.Tensor | None = None
    """int32 or int64 [S]: tokens drawn from the tail; never one that the position keeps."""
    draw_logprobs: torch.Tensor | None = None
    """float32 [S]: their natural logprobs at T = 1."""
    draw_weights: torch.Tensor | None = None
    """float32 [S]: the reciprocal of each one's expected number of draws."""
    weights: torch.Tensor | None = None
    """float32 [P]: what each position's KL weighs; None for 1."""

    def __post_init__(self) -> None:
        num_positions, num_entries = self.rows.numel(), self.token_ids.numel()
        if self.offsets.numel() != num_positions + 1 or self.log_tail.numel() != num_positions:
            raise FormatError(
                f"teacher targets for {num_positions} rows need {num_positions + 1} offsets and "
                f"{num_positions} tails, got {self.offsets.numel()} and {self.log_tail.numel()}; build the "
                "batch with the collator"
            )
        if self.logprobs.numel() != num_entries:
            raise FormatError(
                f"every kept token needs one logprob, got {num_entries} token ids and "
                f"{self.logprobs.numel()} logprobs; build the batch with the collator"
            )
        if self.weights is not None and self.weights.numel() != num_positions:
            raise FormatError(
                f"every position needs one weight, got {num_positions} rows and {self.weights.numel()} weights; build "
                "the batch with the collator"
            )
        drawn = (self.draw_offsets, self.draw_ids, self.draw_logprobs, self.draw_weights)
        if any(part is not None for part in drawn):
            sizes = [None if part is None else part.numel() for part in drawn]
            if sizes[0] != num_positions + 1 or sizes[1] is None or sizes[1:] != [sizes[1]] * 3:
                raise FormatError(
                    f"draws need {num_positions + 1} offsets, and ids, logprobs and weights of one length, "
                    f"got {sizes}; build the batch with the collator"
                )
        if not self.temperature > 0:
            raise FormatError(f"temperature must be positive, got {self.temperature}; the default is 1.0")

    def __len__(self) -> int:
        return self.rows.numel()

    @property
    def counts(self) -> torch.Tensor:
        """int64 [P]: kept entries per position."""
        return self.offsets[1:] - self.offsets[:-1]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TeacherBatch":
        """The same batch on `device`."""
        tensors = {name: part for name, part in vars(self).items() if isinstance(part, torch.Tensor)}
        moved: dict[str, Any] = {
            name: part.to(device, non_blocking=non_blocking) for name, part in tensors.items()
        }
        return replace(self, **moved)

    def without_draws(self) -> "TeacherBatch":
        """The same targets, their tails known by mass alone."""
        return replace(self, draw_offsets=None, draw_ids=None, draw_logprobs=None, draw_weights=None)

    def validate(self, *, num_rows: int, vocab_size: int) -> None:
        """Check every value, not only shapes: linear in the batch, for tests and for debugging a loader.

        Raises:
            FormatError: naming the first rule that does not hold.
        """
        rows, offsets, ids = self.rows.cpu(), self.offsets.cpu().long(), self.token_ids.cpu().long()
        rules = (
            ("rows must be ascending and unique", bool((rows[1:] > rows[:-1]).all())),
            (f"rows must lie in [0, {num_rows})", bool(((rows >= 0) & (rows < num_rows)).all())),
            ("offsets must start at 0", int(offsets[0]) == 0),
            ("offsets must not decrease", bool((offsets[1:] >= offsets[:-1]).all())),
            ("offsets must end at the number of entries", int(offsets[-1]) == ids.numel()),
            (f"token ids must lie in [0, {vocab_size})", bool(((ids >= 0) & (ids < vocab_size)).all())),
            ("logprobs must be finite", bool(torch.isfinite(self.logprobs).all())),
            ("tails must not be NaN or +inf", bool((self.log_tail < torch.inf).all())),
            ("weights must not be negative or NaN", self.weights is None or bool((self.weights >= 0).all())),
        )
        for rule, holds in rules:
            if not holds:
                raise FormatError(f"teacher targets: {rule}; rebuild the batch with the collator")
        if self.draw_offsets is not None and self.draw_ids is not None:
            self._validate_draws(self.draw_offsets.cpu(), self.draw_ids.cpu().long(), vocab_size)
        position_E = torch.repeat_interleave(torch.arange(len(rows)), offsets[1:] - offsets[:-1])
        if torch.unique(position_E * vocab_size + ids).numel() != ids.numel():
            raise FormatError("teacher targets: a token may occur once per row; rebuild with the collator")

    def _validate_draws(self, offsets: torch.Tensor, ids: torch.Tensor, vocab_size: int) -> None:
        counts = offsets[1:] - offsets[:-1]
        in_range = bool((counts >= 0).all() and ((ids >= 0) & (ids < vocab_size)).all())
        if int(offsets[0]) != 0 or int(offsets[-1]) != ids.numel() or not in_range:
            raise FormatError(
                f"teacher targets: draws must be tokens in [0, {vocab_size}); rebuild with the collator"
            )
        drawn = torch.repeat_interleave(torch.arange(len(counts)), counts) * vocab_size + ids
        kept = torch.repeat_interleave(torch.arange(len(self)), self.counts.cpu().long()) * vocab_size
        if torch.isin(drawn, kept + self.token_ids.cpu().long()).any():
            raise FormatError("teacher targets: a draw must not be a kept token; rebuild with the collator")
