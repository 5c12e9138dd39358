"""The teacher's side of one batch: which rows it speaks about, its head entries, and the mass of its tail.

Everything is ragged and flat, so that a batch moves to the device in a few copies and no padding is ever
built. Row k of the batch is the hidden state `rows[k]` of the flattened [batch * sequence, hidden] tensor;
its entries are `offsets[k]:offsets[k + 1]`.

K: rows with teacher targets, E: head entries of all rows together, V: vocabulary, F: token features,
S: tail draws of all rows together.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from formats.errors import FormatError
from formats.logprobs.topk import TopKLogprobs

LARGEST_FEATURE = 127 / 32
LARGEST_NOISE = 1e6
"""Stands for "nothing is known": a tail without mass has no mean."""


def tail_means(topk: TopKLogprobs, moment_steps: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(mean feature of every tail float32 [P, F], variance of its error float32 [P]) from stored moments.

    Quantisation moves a moment by up to half a step, evenly distributed: a variance of step^2 / 12, which the
    division by the tail's mass enlarges.
    """
    with np.errstate(over="ignore", divide="ignore"):
        per_mass_P = np.exp(-topk.log_tail(1.0).astype(np.float64))
        noise_P = np.zeros(len(topk)) if moment_steps is None else per_mass_P**2 / (12.0 * moment_steps**2)
    known_P = np.isfinite(per_mass_P) & (per_mass_P < 1e30)
    mean_PF = np.zeros((len(topk), 0)) * np.where(known_P, per_mass_P, 0.0)[:, None]
    noise_P = np.where(known_P, np.minimum(noise_P, LARGEST_NOISE), LARGEST_NOISE)
    return mean_PF.clip(-LARGEST_FEATURE, LARGEST_FEATURE).astype(np.float32), noise_P.astype(np.float32)


@dataclass(frozen=True, eq=False)
class TeacherBatch:
    """Teacher targets of one batch at one temperature.

    Raises:
        FormatError: the shapes do not fit together, or the temperature is not positive.
    """

    rows: torch.Tensor
    """int64 [K], ascending, each at most once: the hidden state of this row predicts the target token."""
    offsets: torch.Tensor
    """int64 [K + 1]: the entries of row k are offsets[k] to offsets[k + 1]."""
    token_ids: torch.Tensor
    """int32 or int64 [E]: the kept tokens; no token twice within a row."""
    logprobs: torch.Tensor
    """float32 [E]: their natural logprobs at T = 1, normalised over the whole vocabulary."""
    log_tail: torch.Tensor
    """float32 [K]: A(1/T) = log of the sum of exp(logprob / T) over all tokens not kept; -inf if none."""
    temperature: float = 1.0
    """The T at which `log_tail` was taken, and at which the loss compares teacher and student."""
    tail_mean: torch.Tensor | None = None
    """float32 [K, F]: the mean token feature of the teacher's tail at T = 1; None leaves the tail's shape to
    the student."""
    tail_noise: torch.Tensor | None = None
    """float32 [K]: the variance of the error of each `tail_mean`, from its quantisation."""
    features: torch.Tensor | None = None
    """int8 [V, F]: the token features, in steps of 1 / `FEATURE_UNIT`."""
    draw_offsets: torch.Tensor | None = None
    """int64 [K + 1]: the tail draws of row k are draw_offsets[k] to draw_offsets[k + 1]; None without any."""
    draw_ids: torch.Tensor | None = None
    """int32 or int64 [S]: tokens drawn from the tail; never one of the row's head."""
    draw_logprobs: torch.Tensor | None = None
    """float32 [S]: their natural logprobs at T = 1."""
    draw_weights: torch.Tensor | None = None
    """float32 [S]: the reciprocal of each one's expected number of draws."""

    def __post_init__(self) -> None:
        num_rows, num_entries = self.rows.numel(), self.token_ids.numel()
        if self.offsets.numel() != num_rows + 1 or self.log_tail.numel() != num_rows:
            raise FormatError(
                f"teacher targets for {num_rows} rows need {num_rows + 1} offsets and {num_rows} tails, "
                f"got {self.offsets.numel()} and {self.log_tail.numel()}; build the batch with the collator"
            )
        if self.logprobs.numel() != num_entries:
            raise FormatError(
                f"every kept token needs one logprob, got {num_entries} token ids and "
                f"{self.logprobs.numel()} logprobs; build the batch with the collator"
            )
        shape = (self.tail_mean, self.tail_noise, self.features)
        if any(part is None for part in shape) != all(part is None for part in shape):
            raise FormatError("tail_mean, tail_noise and features come together; build with the collator")
        if self.tail_mean is not None and self.tail_noise is not None and self.features is not None:
            expected = (num_rows, self.features.shape[-1])
            if self.tail_mean.shape != expected or self.tail_noise.numel() != num_rows:
                raise FormatError(
                    f"tail_mean must have shape {list(expected)}, got {list(self.tail_mean.shape)}; "
                    "build the batch with the collator"
                )
        drawn = (self.draw_offsets, self.draw_ids, self.draw_logprobs, self.draw_weights)
        if any(part is not None for part in drawn):
            sizes = [None if part is None else part.numel() for part in drawn]
            if sizes[0] != num_rows + 1 or sizes[1] is None or sizes[1:] != [sizes[1]] * 3:
                raise FormatError(
                    f"draws need {num_rows + 1} offsets, and ids, logprobs and weights of one length, got "
                    f"{sizes}; build the batch with the collator"
                )
        if not self.temperature > 0:
            raise FormatError(f"temperature must be positive, got {self.temperature}; the default is 1.0")

    def __len__(self) -> int:
        return self.rows.numel()

    @property
    def counts(self) -> torch.Tensor:
        """int64 [K]: entries per row."""
        return self.offsets[1:] - self.offsets[:-1]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TeacherBatch":
        """The same batch on `device`."""
        tensors = {name: part for name, part in vars(self).items() if isinstance(part, torch.Tensor)}
        moved: dict[str, Any] = {
            name: part.to(device, non_blocking=non_blocking) for name, part in tensors.items()
        }
        return replace(self, **moved)

    def without_draws(self) -> "TeacherBatch":
        """The same targets, their tails known by mass and moments alone."""
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
            (
                "tail means must be finite",
                self.tail_mean is None or bool(torch.isfinite(self.tail_mean).all()),
            ),
        )
        for rule, holds in rules:
            if not holds:
                raise FormatError(f"teacher targets: {rule}; rebuild the batch with the collator")
        if self.draw_offsets is not None and self.draw_ids is not None:
            self._validate_draws(self.draw_offsets.cpu(), self.draw_ids.cpu().long(), vocab_size)
        row_of_entry = torch.repeat_interleave(torch.arange(len(rows)), offsets[1:] - offsets[:-1])
        if torch.unique(row_of_entry * vocab_size + ids).numel() != ids.numel():
            raise FormatError("teacher targets: a token may occur once per row; rebuild with the collator")

    def _validate_draws(self, offsets: torch.Tensor, ids: torch.Tensor, vocab_size: int) -> None:
        counts = offsets[1:] - offsets[:-1]
        in_range = bool((counts >= 0).all() and ((ids >= 0) & (ids < vocab_size)).all())
        if int(offsets[0]) != 0 or int(offsets[-1]) != ids.numel() or not in_range:
            raise FormatError(
                f"teacher targets: draws must be tokens in [0, {vocab_size}); rebuild with the collator"
            )
        drawn = torch.repeat_interleave(torch.arange(len(counts)), counts) * vocab_size + ids
        head = torch.repeat_interleave(torch.arange(len(self)), self.counts.cpu().long()) * vocab_size
        if torch.isin(drawn, head + self.token_ids.cpu().long()).any():
            raise FormatError("teacher targets: a draw must not be in the head; rebuild with the collator")

    @classmethod
    def from_topk(
        cls,
        rows: Any,
        topk: TopKLogprobs,
        temperature: float = 1.0,
        features: Any = None,
        moment_steps: int | None = None,
        draws: bool = True,
    ) -> "TeacherBatch":
        """Targets from a `formats.TopKLogprobs` whose position k belongs to hidden row `rows[k]`.

        Args:
            features: of the cache; None leaves tail moments out.
            moment_steps: `moment_resolution` of the cache's codec; None for moments that were not quantised.
            draws: False leaves tail draws out.
        """
        shape: dict[str, torch.Tensor] = {}
        if features is not None:
            mean, noise = tail_means(topk, moment_steps)
            shape = {"tail_mean": torch.as_tensor(mean), "tail_noise": torch.as_tensor(noise)}
            shape["features"] = torch.as_tensor(features.codes)
        if draws and topk.draws.rate:
            shape |= {
                "draw_offsets": torch.as_tensor(topk.draws.offsets),
                "draw_ids": torch.as_tensor(topk.draws.token_ids),
                "draw_logprobs": torch.as_tensor(topk.draws.logprobs),
                "draw_weights": torch.as_tensor(topk.draws.weights),
            }
        return cls(
            rows=torch.as_tensor(np.ascontiguousarray(rows, dtype=np.int64)),
            offsets=torch.as_tensor(np.ascontiguousarray(topk.offsets, dtype=np.int64)),
            token_ids=torch.as_tensor(np.ascontiguousarray(topk.token_ids, dtype=np.int32)),
            logprobs=torch.as_tensor(np.ascontiguousarray(topk.logprobs, dtype=np.float32)),
            log_tail=torch.as_tensor(np.ascontiguousarray(topk.log_tail(temperature), dtype=np.float32)),
            temperature=float(temperature),
            **shape,
        )

    @classmethod
    def empty(cls, temperature: float = 1.0) -> "TeacherBatch":
        """Targets for no row at all."""
        none = torch.empty(0)
        return cls(none.long(), torch.zeros(1, dtype=torch.int64), none.int(), none, none, temperature)
