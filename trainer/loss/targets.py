"""The teacher at the loss temperature, and the rules that every value of a batch must keep.

P: positions with teacher targets, E: their kept entries, S: their tail draws.
"""

from dataclasses import dataclass

import torch

from formats.disk.token_row import IGNORED
from formats.errors import AnnealError, ConfigError, FormatError
from trainer.data.teacher_batch import TeacherBatch

# Logarithms of masses are floored here: a mass that underflows gives finite numbers times zero, not NaN.
LOG_FLOOR = {torch.float32: -80.0, torch.float64: -700.0}


@dataclass(frozen=True)
class DrawTargets:
    """Tokens drawn from the teacher's tail, at temperature T."""

    offsets_P1: torch.Tensor
    """int64 [P + 1]: draws of each position."""
    position_S: torch.Tensor
    """int64: the position that each draw belongs to."""
    token_ids_S: torch.Tensor
    """int64."""
    log_probs_S: torch.Tensor
    """log p_T of the token."""
    scale_S: torch.Tensor
    """p_T over the token's expected number of draws."""

    def slice(self, positions: tuple[int, int], draws: tuple[int, int]) -> "DrawTargets":
        """The draws of a run of positions, numbered from its first one."""
        run = slice(*draws)
        return DrawTargets(
            self.offsets_P1[positions[0] : positions[1] + 1] - draws[0],
            self.position_S[run] - positions[0],
            self.token_ids_S[run],
            self.log_probs_S[run],
            self.scale_S[run],
        )


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher at temperature T, normalised over the kept entries and one tail bucket."""

    place_P: torch.Tensor
    """int64: where the position's row stands among all rows that count, or among those of a chunk."""
    offsets_P1: torch.Tensor
    """int64 [P + 1]: entries of each position."""
    position_E: torch.Tensor
    """int64: the position that each entry belongs to."""
    token_ids_E: torch.Tensor
    """int64."""
    probs_E: torch.Tensor
    """p_T of every entry."""
    log_probs_E: torch.Tensor
    """Its logarithm."""
    tail_P: torch.Tensor
    """The mass of all tokens that are not kept."""
    log_tail_P: torch.Tensor
    """Its logarithm, floored."""
    draws: DrawTargets | None = None
    """Tokens drawn from the tail."""
    weights_P: torch.Tensor | None = None
    """What each position's KL weighs; None for 1."""

    def slice(
        self, first_row: int, positions: tuple[int, int], entries: tuple[int, int], draws: tuple[int, int]
    ) -> "TeacherTargets":
        """The targets of a chunk that begins at `first_row`: runs of positions, entries and draws."""
        of_positions, of_entries = slice(*positions), slice(*entries)
        return TeacherTargets(
            place_P=self.place_P[of_positions] - first_row,
            offsets_P1=self.offsets_P1[positions[0] : positions[1] + 1] - entries[0],
            position_E=self.position_E[of_entries] - positions[0],
            token_ids_E=self.token_ids_E[of_entries],
            probs_E=self.probs_E[of_entries],
            log_probs_E=self.log_probs_E[of_entries],
            tail_P=self.tail_P[of_positions],
            log_tail_P=self.log_tail_P[of_positions],
            draws=None if self.draws is None else self.draws.slice(positions, draws),
            weights_P=None if self.weights_P is None else self.weights_P[of_positions],
        )


def segment_sum(values_E: torch.Tensor, offsets_P1: torch.Tensor) -> torch.Tensor:
    """[P] sums of consecutive runs of `values_E`; deterministic on every device, 0 for an empty run."""
    return torch.segment_reduce(values_E, "sum", offsets=offsets_P1, unsafe=True)


def segment_of_each(offsets_P1: torch.Tensor, num_entries: int) -> torch.Tensor:
    """int64 [num_entries]: the run that each entry belongs to."""
    counts_P = offsets_P1[1:] - offsets_P1[:-1]
    runs_P = torch.arange(len(counts_P), device=counts_P.device)
    return torch.repeat_interleave(runs_P, counts_P, output_size=num_entries)


def teacher_targets(teacher: TeacherBatch, place_P: torch.Tensor, dtype: torch.dtype) -> TeacherTargets:
    """Normalise a batch at its temperature: Z = sum over kept tokens of exp(l / T) + exp(A(1/T)), in `dtype`.

    Linear in kept entries and draws; waits for nothing.
    """
    position_E = segment_of_each(teacher.offsets, teacher.token_ids.numel())
    scaled_E = teacher.logprobs.to(dtype) / teacher.temperature
    log_tail_P = teacher.log_tail.to(dtype)
    log_z_P = torch.logaddexp(segment_sum(scaled_E.exp(), teacher.offsets).log(), log_tail_P)
    log_probs_E = scaled_E - log_z_P[position_E]
    log_tail_P = log_tail_P - log_z_P
    return TeacherTargets(
        place_P=place_P,
        offsets_P1=teacher.offsets,
        position_E=position_E,
        token_ids_E=teacher.token_ids.long(),
        probs_E=log_probs_E.exp(),
        log_probs_E=log_probs_E,
        tail_P=log_tail_P.exp(),
        log_tail_P=log_tail_P.clamp_min(LOG_FLOOR[dtype]),
        draws=_draw_targets(teacher, log_z_P, dtype),
        weights_P=None if teacher.weights is None else teacher.weights.to(dtype),
    )


def _draw_targets(teacher: TeacherBatch, log_z_P: torch.Tensor, dtype: torch.dtype) -> DrawTargets | None:
    if teacher.draw_offsets is None:
        return None
    assert teacher.draw_ids is not None
    assert teacher.draw_logprobs is not None and teacher.draw_weights is not None
    offsets_P1 = teacher.draw_offsets
    position_S = segment_of_each(offsets_P1, teacher.draw_ids.numel())
    log_probs_S = teacher.draw_logprobs.to(dtype) / teacher.temperature - log_z_P[position_S]
    scale_S = teacher.draw_weights.to(dtype) * log_probs_S.exp()
    return DrawTargets(offsets_P1, position_S, teacher.draw_ids.long(), log_probs_S, scale_S)


@dataclass(frozen=True)
class ValueRule:
    """A rule that every value of one tensor must keep."""

    error: type[AnnealError]
    rule: str
    values: torch.Tensor
    broken: torch.Tensor
    """bool, on the device: where it is not kept."""
    remedy: str

    def refuse(self) -> None:
        """Raise the error, with the first value that breaks the rule."""
        raise self.error(f"{self.rule}, got {self.values[self.broken][0].item()}; {self.remedy}")


def value_rules(labels_N: torch.Tensor, teacher: TeacherBatch | None, vocab_size: int) -> list[ValueRule]:
    """What has to hold before any value is used as an index: on a GPU one out of range kills the process.

    Nothing is fetched from the device here, so that all rules are answered in one transfer.

    Raises:
        ConfigError: labels and teacher are on different devices.
    """
    num_rows = labels_N.numel()
    bad_N = (labels_N != IGNORED) & ((labels_N < 0) | (labels_N >= vocab_size))
    rule = f"labels must be {IGNORED} or lie in [0, {vocab_size})"
    rules = [ValueRule(ConfigError, rule, labels_N, bad_N, "check the tokenizer")]
    if teacher is None:
        return rules
    rows = teacher.rows
    if rows.device != labels_N.device:
        raise ConfigError(
            f"teacher targets must be on {labels_N.device} like the labels, got {rows.device}; "
            "call teacher.to(device)"
        )
    bad_P = (rows < 0) | (rows >= num_rows)
    bad_P[1:] |= rows[1:] <= rows[:-1]
    rule = f"teacher rows must be ascending, unique and in [0, {num_rows})"
    rules.append(ValueRule(FormatError, rule, rows, bad_P, "check the collator"))
    rules += _ragged_rules("teacher", teacher.token_ids, teacher.offsets, vocab_size)
    if teacher.draw_ids is not None and teacher.draw_offsets is not None:
        rules += _ragged_rules("drawn", teacher.draw_ids, teacher.draw_offsets, vocab_size)
    return rules


def _ragged_rules(
    what: str, ids: torch.Tensor, offsets: torch.Tensor, vocab_size: int
) -> tuple[ValueRule, ValueRule]:
    bad_ids = (ids < 0) | (ids >= vocab_size)
    bad_offsets = torch.zeros_like(offsets, dtype=torch.bool)
    bad_offsets[0] = offsets[0] != 0
    bad_offsets[1:] = offsets[1:] < offsets[:-1]
    bad_offsets[-1:] |= offsets[-1:] != ids.numel()
    ids_rule = f"{what} token ids must lie in [0, {vocab_size})"
    offsets_rule = f"{what} offsets must ascend from 0 to {ids.numel()}"
    return (
        ValueRule(FormatError, ids_rule, ids, bad_ids, "the cache has another vocabulary"),
        ValueRule(FormatError, offsets_rule, offsets, bad_offsets, "check the collator"),
    )
