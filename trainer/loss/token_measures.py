"""What a model says of each token, beside its loss: is it right, how sure is it, and does it still know it.

Over the tokens that carry loss, at T = 1, from the logits of a chunk while they exist. Sums alone leave this
file, so that batches, accumulation and ranks of any size give the same means. The calibration error is that
of Guo et al., "On Calibration of Modern Neural Networks" (2017), Eq. 3, with equal bins ((i - 1)/10, i/10].

C: rows of a chunk, R: rows of a slice of it, V: vocabulary, N: rows of the batch, E: kept entries.
"""

from collections.abc import Callable

import torch

from formats.disk.token_row import IGNORED
from trainer.data.teacher_batch import TeacherBatch
from trainer.loss.targets import segment_of_each, segment_sum

NUM_BINS = 10
FIELDS = ("right", "entropy", "confidence", "known", "kept")
"""Sums over tokens: argmax is the label; nats; probability of the argmax; the initial model had it right with
more than one half; and the model has it right too."""
NUM_SUMS = len(FIELDS) + NUM_BINS
"""The fields, then for each bin of confidence the sum of confidence less the number of right tokens."""
KNOWN_LOGPROB = -0.6931471805599453
"""log 1/2: a token of more is the largest of its position, so the cache keeps it."""
SLICES = 16
"""A chunk is read in so many parts: what is computed on the way takes two of them, not two chunks."""


class TokenMeasures:
    """The sums of one batch.

    Args:
        labels_N: shifted, IGNORED where a row carries no loss.
        teacher: the initial model's logprobs at T = 1, of whatever rows have them.
        dtype: of the sums.
    """

    def __init__(self, labels_N: torch.Tensor, teacher: TeacherBatch | None, dtype: torch.dtype) -> None:
        self.known_N = known_rows(labels_N, teacher)
        self.sums = torch.zeros(NUM_SUMS, dtype=dtype, device=labels_N.device)
        """[NUM_SUMS]."""

    def reader(self, rows_C: torch.Tensor, labels_C: torch.Tensor) -> Callable[..., None]:
        """What adds up a chunk: called with its number of rows, and with what gives logits [R, V] of a slice."""
        known_C = self.known_N[rows_C]

        def read(num_rows: int, logits_of: Callable[[slice], torch.Tensor]) -> None:
            step = -(-num_rows // SLICES)
            for start in range(0, num_rows, step):
                part = slice(start, min(start + step, num_rows))
                self._add(logits_of(part), labels_C[part], known_C[part])

        return read

    def _add(self, logits_RV: torch.Tensor, labels_R: torch.Tensor, known_R: torch.Tensor) -> None:
        probs_RV = logits_RV.softmax(dim=1)
        entropy_R = torch.special.entr(probs_RV).sum(dim=1)
        confidence_R, token_R = probs_RV.max(dim=1)
        del probs_RV
        counts_R = labels_R != IGNORED
        right_R = token_R == labels_R  # never where it is IGNORED
        fields = (right_R, entropy_R * counts_R, confidence_R * counts_R, known_R, known_R & right_R)
        # A model that has diverged has confidence NaN, of which there is no bin.
        bin_R = (confidence_R.nan_to_num() * NUM_BINS).ceil().long().clamp(1, NUM_BINS)
        gap_R = (confidence_R - right_R.to(confidence_R.dtype)) * counts_R
        self.sums[: len(FIELDS)] += torch.stack([field.to(self.sums.dtype).sum() for field in fields])
        one_hot_RB = (bin_R[:, None] - 1) == torch.arange(NUM_BINS, device=bin_R.device)
        self.sums[len(FIELDS) :] += (gap_R[:, None] * one_hot_RB).to(self.sums.dtype).sum(dim=0)


def known_rows(labels_N: torch.Tensor, teacher: TeacherBatch | None) -> torch.Tensor:
    """bool [N]: rows whose label the initial model gave more than one half."""
    known_N = torch.zeros(labels_N.shape, dtype=torch.bool, device=labels_N.device)
    if teacher is None or len(teacher) == 0:
        return known_N
    position_E = segment_of_each(teacher.offsets, teacher.token_ids.numel())
    label_E = labels_N[teacher.rows][position_E]
    hit_E = (teacher.token_ids == label_E) & (teacher.logprobs > KNOWN_LOGPROB)
    return known_N.index_copy_(0, teacher.rows, segment_sum(hit_E.float(), teacher.offsets) > 0)
