"""Which rows the loss looks at, in which chunks, and the teacher's distribution at the loss temperature.

A row counts when it has a label or a teacher target; no other row is ever projected onto the vocabulary.
All sizes that the chunk loop needs are fetched from the device here, in three small transfers per call, so
that the loop itself never waits for the device. Cost: linear in rows and head entries.

N: rows given, M: rows that count, K: rows with teacher targets, E: head entries, F: token features,
S: tail draws.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from formats.errors import AnnealError, ConfigError, FormatError
from trainer.data.teacher_batch import TeacherBatch

IGNORE_INDEX = -100
# Logarithms of masses are floored here: a mass that underflows gives finite numbers times zero, not NaN.
LOG_FLOOR = {torch.float32: -80.0, torch.float64: -700.0}


@dataclass(frozen=True)
class DrawTargets:
    """Tokens drawn from the teacher's tail, at temperature T."""

    offsets_K1: torch.Tensor
    """int64 [K + 1]: draws of each row."""
    row_S: torch.Tensor
    """int64: index into the K rows, for every draw."""
    token_ids_S: torch.Tensor
    """int64."""
    log_probs_S: torch.Tensor
    """log p_T of the token."""
    scale_S: torch.Tensor
    """p_T over the token's expected number of draws."""

    def slice(self, teacher_rows: tuple[int, int], drawn: tuple[int, int]) -> "DrawTargets":
        """The draws of a run of rows, numbered from its first row."""
        draws = slice(*drawn)
        return DrawTargets(
            self.offsets_K1[teacher_rows[0] : teacher_rows[1] + 1] - drawn[0],
            self.row_S[draws] - teacher_rows[0],
            self.token_ids_S[draws],
            self.log_probs_S[draws],
            self.scale_S[draws],
        )


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher at temperature T, normalised over the head entries and one tail bucket."""

    position_K: torch.Tensor
    """int64: where the row stands among the M rows that count (inside a chunk: among the chunk's rows)."""
    offsets_K1: torch.Tensor
    """int64 [K + 1]: entries of each row."""
    row_E: torch.Tensor
    """int64: index into the K rows, for every entry."""
    token_ids_E: torch.Tensor
    """int64."""
    probs_E: torch.Tensor
    """p_T(j) of every entry."""
    log_probs_E: torch.Tensor
    """Its logarithm."""
    tail_K: torch.Tensor
    """1 - P: the mass outside the head."""
    log_tail_K: torch.Tensor
    """Its logarithm, floored."""
    tail_mean_KF: torch.Tensor | None = None
    """The mean token feature of the tail at T = 1."""
    tail_noise_K: torch.Tensor | None = None
    """The variance of its error."""
    draws: DrawTargets | None = None
    """Tokens drawn from the tail."""

    def slice(self, chunk: "Chunk") -> "TeacherTargets":
        """The targets of one chunk, numbered from the chunk's first row."""
        rows, entries = slice(*chunk.teacher_rows), slice(*chunk.entries)
        return TeacherTargets(
            position_K=self.position_K[rows] - chunk.start,
            offsets_K1=self.offsets_K1[chunk.teacher_rows[0] : chunk.teacher_rows[1] + 1] - chunk.entries[0],
            row_E=self.row_E[entries] - chunk.teacher_rows[0],
            token_ids_E=self.token_ids_E[entries],
            probs_E=self.probs_E[entries],
            log_probs_E=self.log_probs_E[entries],
            tail_K=self.tail_K[rows],
            log_tail_K=self.log_tail_K[rows],
            tail_mean_KF=None if self.tail_mean_KF is None else self.tail_mean_KF[rows],
            tail_noise_K=None if self.tail_noise_K is None else self.tail_noise_K[rows],
            draws=None if self.draws is None else self.draws.slice(chunk.teacher_rows, chunk.draws),
        )


@dataclass(frozen=True)
class Chunk:
    """A run of the rows that count: start and stop of rows, teacher rows, entries, draws; host integers."""

    start: int
    stop: int
    teacher_rows: tuple[int, int] = (0, 0)
    entries: tuple[int, int] = (0, 0)
    draws: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class RowPlan:
    """The rows that count and how they are walked."""

    rows_M: torch.Tensor
    """int64: indices into the N rows, ascending."""
    labels_M: torch.Tensor
    """int64: their labels, IGNORE_INDEX where a row has only a teacher target."""
    chunks: tuple[Chunk, ...]
    targets: TeacherTargets | None

    @property
    def num_labelled(self) -> torch.Tensor:
        """Rows with cross-entropy, a 0-d tensor."""
        return (self.labels_M != IGNORE_INDEX).sum()


def segment_sum(values_E: torch.Tensor, offsets_K1: torch.Tensor) -> torch.Tensor:
    """[K] sums of consecutive runs of `values_E`; deterministic on every device, 0 for an empty run."""
    return torch.segment_reduce(values_E, "sum", offsets=offsets_K1, unsafe=True)


def segment_rows(offsets_K1: torch.Tensor, num_entries: int) -> torch.Tensor:
    """int64 [num_entries]: the run that each entry belongs to."""
    counts_K = offsets_K1[1:] - offsets_K1[:-1]
    rows_K = torch.arange(len(counts_K), device=counts_K.device)
    return torch.repeat_interleave(rows_K, counts_K, output_size=num_entries)


def teacher_targets(teacher: TeacherBatch, position_K: torch.Tensor, dtype: torch.dtype) -> TeacherTargets:
    """Normalise a batch at its temperature: Z = sum over the head of exp(l / T) + exp(A(1/T)), in `dtype`."""
    row_E = segment_rows(teacher.offsets, teacher.token_ids.numel())
    scaled_E = teacher.logprobs.to(dtype) / teacher.temperature
    log_tail_K = teacher.log_tail.to(dtype)
    log_z_K = torch.logaddexp(segment_sum(scaled_E.exp(), teacher.offsets).log(), log_tail_K)
    log_probs_E = scaled_E - log_z_K[row_E]
    log_tail_K = log_tail_K - log_z_K
    return TeacherTargets(
        position_K=position_K,
        offsets_K1=teacher.offsets,
        row_E=row_E,
        token_ids_E=teacher.token_ids.long(),
        probs_E=log_probs_E.exp(),
        log_probs_E=log_probs_E,
        tail_K=log_tail_K.exp(),
        log_tail_K=log_tail_K.clamp_min(LOG_FLOOR[dtype]),
        tail_mean_KF=None if teacher.tail_mean is None else teacher.tail_mean.to(dtype),
        tail_noise_K=None if teacher.tail_noise is None else teacher.tail_noise.to(dtype),
        draws=_draw_targets(teacher, log_z_K, dtype),
    )


def _draw_targets(teacher: TeacherBatch, log_z_K: torch.Tensor, dtype: torch.dtype) -> DrawTargets | None:
    if teacher.draw_offsets is None:
        return None
    assert teacher.draw_ids is not None
    assert teacher.draw_logprobs is not None and teacher.draw_weights is not None
    offsets_K1 = teacher.draw_offsets
    row_S = segment_rows(offsets_K1, teacher.draw_ids.numel())
    log_probs_S = teacher.draw_logprobs.to(dtype) / teacher.temperature - log_z_K[row_S]
    scale_S = teacher.draw_weights.to(dtype) * log_probs_S.exp()
    return DrawTargets(offsets_K1, row_S, teacher.draw_ids.long(), log_probs_S, scale_S)


def plan_rows(
    labels_N: torch.Tensor,
    teacher: TeacherBatch | None,
    *,
    vocab_size: int,
    chunk_size: int,
    dtype: torch.dtype,
) -> RowPlan:
    """Select the rows that count and cut them into chunks of nearly equal size, at most `chunk_size` rows.

    Raises:
        ConfigError: a label is outside the vocabulary.
        FormatError: teacher rows are not ascending or not in the batch, or a token is not in the vocabulary.
    """
    num_rows = labels_N.numel()
    if teacher is not None and len(teacher) == 0:
        teacher = None
    _check_values(labels_N, teacher, num_rows=num_rows, vocab_size=vocab_size)
    counts_N = labels_N != IGNORE_INDEX
    if teacher is not None:
        counts_N = counts_N.index_fill(0, teacher.rows, True)
    rows_M = counts_N.nonzero().squeeze(1)
    labels_M = labels_N[rows_M].long()
    num_selected = rows_M.numel()
    num_chunks = math.ceil(num_selected / chunk_size)
    bounds = [num_selected * i // max(num_chunks, 1) for i in range(num_chunks + 1)]
    if teacher is None:
        chunks = tuple(Chunk(a, b) for a, b in pairwise(bounds))
        return RowPlan(rows_M, labels_M, chunks, None)
    position_K = torch.searchsorted(rows_M, teacher.rows)
    edges = torch.searchsorted(position_K, torch.tensor(bounds, device=position_K.device))
    draws_at = torch.zeros_like(edges) if teacher.draw_offsets is None else teacher.draw_offsets[edges]
    at = torch.stack([edges, teacher.offsets[edges], draws_at]).tolist()
    chunks = tuple(
        Chunk(bounds[i], bounds[i + 1], *((start[i], start[i + 1]) for start in at))
        for i in range(num_chunks)
    )
    return RowPlan(rows_M, labels_M, chunks, teacher_targets(teacher, position_K, dtype))


_Check = tuple[type[AnnealError], str, torch.Tensor, torch.Tensor, str]
"""Error, rule, values, where the rule is broken, remedy."""


def _ragged_checks(
    what: str, ids: torch.Tensor, offsets: torch.Tensor, vocab_size: int
) -> tuple[_Check, _Check]:
    bad_ids = (ids < 0) | (ids >= vocab_size)
    bad_offsets = torch.zeros_like(offsets, dtype=torch.bool)
    bad_offsets[0] = offsets[0] != 0
    bad_offsets[1:] = offsets[1:] < offsets[:-1]
    bad_offsets[-1:] |= offsets[-1:] != ids.numel()
    ids_rule = f"{what} token ids must lie in [0, {vocab_size})"
    offsets_rule = f"{what} offsets must ascend from 0 to {ids.numel()}"
    return (
        (FormatError, ids_rule, ids, bad_ids, "the cache has another vocabulary"),
        (FormatError, offsets_rule, offsets, bad_offsets, "check the collator"),
    )


def _check_values(
    labels_N: torch.Tensor, teacher: TeacherBatch | None, *, num_rows: int, vocab_size: int
) -> None:
    """One transfer for all value checks: an index out of range on a GPU otherwise kills the whole process."""
    bad_N = (labels_N != IGNORE_INDEX) & ((labels_N < 0) | (labels_N >= vocab_size))
    rule = f"labels must be {IGNORE_INDEX} or lie in [0, {vocab_size})"
    checks: list[_Check] = [(ConfigError, rule, labels_N, bad_N, "check the tokenizer")]
    if teacher is not None:
        if teacher.rows.device != labels_N.device:
            raise ConfigError(
                f"teacher targets must be on {labels_N.device} like the labels, got {teacher.rows.device}; "
                "call teacher.to(device)"
            )
        if teacher.features is not None and len(teacher.features) != vocab_size:
            raise FormatError(
                f"token features must be of the head's {vocab_size} tokens, got {len(teacher.features)}; "
                "pass vocab_size if the head has padding, else the cache has another vocabulary"
            )
        rows = teacher.rows
        bad_rows = (rows < 0) | (rows >= num_rows)
        bad_rows[1:] |= rows[1:] <= rows[:-1]
        rule = f"teacher rows must be ascending, unique and in [0, {num_rows})"
        checks.append((FormatError, rule, rows, bad_rows, "check the collator"))
        checks += _ragged_checks("teacher", teacher.token_ids, teacher.offsets, vocab_size)
        if teacher.draw_ids is not None and teacher.draw_offsets is not None:
            checks += _ragged_checks("drawn", teacher.draw_ids, teacher.draw_offsets, vocab_size)
    found = torch.stack([bad.any() for _, _, _, bad, _ in checks]).tolist()
    for (error, rule, values, bad, remedy), broken in zip(checks, found, strict=True):
        if broken:
            raise error(f"{rule}, got {values[bad][0].item()}; {remedy}")
