"""Cached rows as a map-style `torch.utils.data.Dataset`, decoded where they are fetched, in the worker.

An item is a dict of compact numpy arrays, never lists and never int64. The tail mass is taken at the run's
temperature here, so the interpolation runs in the worker and the GPU sees one number per position.

L: tokens of the row, P: positions with teacher targets, E: their kept entries together, S: their tail draws.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.utils.data

from formats.cache import TeacherCache
from formats.cache_row import CacheRow
from formats.disk.token_row import IGNORED
from formats.errors import ConfigError, FormatError
from formats.logprobs.topk import TopKLogprobs
from trainer.config import ROW_LOSSES
from trainer.data.kl_tokens import chosen_positions, gate_weights, require_positions
from trainer.data.label_terms import label_terms, no_terms
from trainer.data.masked_label import with_labels_kept
from trainer.data.padded_teacher import without_padding
from trainer.objective import Choice, Objective

Item = dict[str, Any]
COUNTED_ROWS = 64
"""Rows that are read to estimate how many positions carry the KL."""


class Unit(tuple[int, ...]):
    """Row numbers that form one sequence of a batch: a single row, or several when packing."""

    __slots__ = ()
    is_filler = False


class Filler(Unit):
    """A unit that only keeps a rank busy while others finish: its rows carry no loss."""

    __slots__ = ()
    is_filler = True


class CachedDataset(torch.utils.data.Dataset[Any]):
    """Rows of one cache with their teacher targets, random access, picklable for spawned workers.

    `dataset[i]` is row i as a dict:

        input_ids         int32 [L]
        labels            int32 [L], not shifted: labels[t] is input_ids[t], or -100 where t carries no loss
        teacher_positions int32 [P]: hidden state at this index predicts the token after it
        teacher_counts    int32 [P]: kept entries per position
        teacher_token_ids int32 [E], teacher_logprobs float32 [E] at T = 1
        teacher_log_tail  float32 [P]: A(1/T) at `temperature`
        teacher_draw_counts int32 [P]: tail draws per position, where the cache has some
        teacher_draw_ids  int32 [S], teacher_draw_logprobs float32 [S] at T = 1,
                          teacher_draw_weights float32 [S]: as in `TeacherBatch`
        teacher_weights   float32 [P]: weight of each position's KL, where `objective` says so, as what follows
        teacher_masked    bool [E]: entries that the KL leaves out
        label_weights, label_logprobs float32 [L]: of the tokens' cross-entropy, and log p0
        temperature       float: that T

    Args:
        cache: an open `formats.TeacherCache`, or its path.
        temperature: T of the KL term.
        loss: `both`; `ce` leaves the teacher out; `kl` sets every label to -100.
        tail_draws: False leaves its tail draws out.
        objective: what each token's cross-entropy and each position's KL count; the latter only for `both`, text
            that is learnt.

    Raises:
        FormatError: the cache is missing, unfinished or broken.
        ConfigError: the cache has no rows, or no teacher positions (of the wanted kind) although KL is asked for.
    """

    def __init__(
        self,
        cache: TeacherCache | str | Path,
        temperature: float = 1.0,
        loss: str = "both",
        tail_draws: bool = True,
        objective: Objective | None = None,
    ) -> None:
        if loss not in ROW_LOSSES:
            raise ConfigError(f"loss must be one of {', '.join(ROW_LOSSES)}, got {loss!r}")
        self.cache = cache if isinstance(cache, TeacherCache) else TeacherCache(cache)
        self.temperature = float(temperature)
        self.loss = loss
        self.tail_draws = tail_draws
        self.objective = objective or Objective()
        self.of_kl = self.objective if loss == "both" else Objective()
        if loss != "kl" and self.objective.weighting == Choice("flow"):
            raise ConfigError("ce_weight flow needs its tau, got none; write flow:NATS")
        self.vocab_size: int | None = None
        """Tokens of a student whose head is padded less than the teacher's; None for the cache's own."""
        if len(self.cache) == 0:
            raise ConfigError(
                f"a training cache needs rows, got none in {self.name}; check the corpus it was built from"
            )
        if loss != "ce" and not self.cache.manifest.num_positions:
            raise ConfigError(
                f"KL needs teacher positions, got a cache without any: {self.name}; its rows carry no loss, "
                "rebuild with --positions all or train with --kl-coef 0"
            )
        if loss != "ce":
            require_positions(self.cache, self.of_kl.kl_on)

    @property
    def name(self) -> str:
        """What to call the cache in messages."""
        return str(self.cache.path)

    def __len__(self) -> int:
        return len(self.cache)

    @property
    def has_draws(self) -> bool:
        """Whether items carry tail draws."""
        return self.tail_draws and self.loss != "ce" and self.cache.manifest.codec.draw_rate > 0

    def kl_tokens_per_row(self) -> float:
        """Positions with KL per row, each counted by its weight; from a sample of rows where they must be read."""
        rows = len(self)
        if self.of_kl.kl_on in ("captured", "all") and self.of_kl.gate.name == "none":
            return self.cache.manifest.num_positions / rows
        sample = [self[int(row)] for row in np.linspace(0, rows - 1, min(rows, COUNTED_ROWS))]
        counts = [
            item.get("teacher_weights", np.ones(len(item["teacher_positions"]))).sum() for item in sample
        ]
        return float(np.mean(counts))

    def lengths(self) -> np.ndarray:
        """int32 [rows]: tokens per row, for packing and grouping."""
        return self.cache.lengths()

    def index_of(self, key: bytes) -> int:
        """The row with this content key; KeyError when the cache does not hold it."""
        return self.cache.index_of(key)

    def __getitem__(self, index: int) -> Item:
        row = self.cache[int(index)]
        topk = without_padding(row.teacher, self.vocab_size, self.name)
        if self.vocab_size is not None and int(row.input_ids.max(initial=0)) >= self.vocab_size:
            raise FormatError(
                f"row {index} of {self.name} has token id {row.input_ids.max()}, beyond the student's {self.vocab_size}"
            )
        if self.loss == "kl":
            labels = np.full(len(row.input_ids), IGNORED, np.int32)
        else:
            labels = np.where(row.loss_mask, row.input_ids, np.int32(IGNORED)).astype(np.int32)
        item: Item = {"input_ids": row.input_ids, "labels": labels, "temperature": self.temperature}
        positions = np.asarray(row.positions, dtype=np.int32)
        if len(positions) != len(topk):
            raise FormatError(
                f"row {index} of {self.name} has {len(positions)} positions but {len(topk)} targets"
            )
        weighting = self.objective.weighting
        item |= (
            no_terms(weighting, len(labels))
            if self.loss == "kl"
            else label_terms(weighting, row, topk, labels)
        )
        return item | (
            no_teacher() if self.loss == "ce" else self._teacher(row, topk, positions, item["labels"])
        )

    def _teacher(
        self, row: CacheRow, topk: TopKLogprobs, positions: np.ndarray, labels: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The teacher columns of a row."""
        columns: dict[str, np.ndarray] = {}
        chosen = chosen_positions(self.of_kl.kl_on, row.tokens, positions)
        if chosen is not None:
            positions, topk = positions[chosen], topk.take(chosen)
        if (weights := gate_weights(self.of_kl.gate, topk)) is not None:
            columns["teacher_weights"] = weights
        if self.of_kl.kl_target == "full":
            log_tail = np.asarray(topk.log_tail(self.temperature), dtype=np.float32)
        else:
            tokens = positions + 1
            topk, log_tail, columns["teacher_masked"] = with_labels_kept(
                topk, self.temperature, row.input_ids[tokens], labels[tokens] != IGNORED
            )
        if self.has_draws:
            columns |= {
                "teacher_draw_counts": topk.draws.counts.astype(np.int32),
                "teacher_draw_ids": topk.draws.token_ids,
                "teacher_draw_logprobs": topk.draws.logprobs,
                "teacher_draw_weights": topk.draws.weights,
            }
        return columns | {
            "teacher_positions": positions,
            "teacher_counts": topk.counts.astype(np.int32),
            "teacher_token_ids": topk.token_ids,
            "teacher_logprobs": topk.logprobs,
            "teacher_log_tail": log_tail,
        }


def no_teacher() -> Item:
    """The teacher columns of a row without teacher targets."""
    return {
        "teacher_positions": np.zeros(0, np.int32),
        "teacher_counts": np.zeros(0, np.int32),
        "teacher_token_ids": np.zeros(0, np.int32),
        "teacher_logprobs": np.zeros(0, np.float32),
        "teacher_log_tail": np.zeros(0, np.float32),
    }


def without_loss(item: Item) -> Item:
    """The row as a filler: its tokens, and nothing that is learnt or held."""
    return item | {"labels": np.full_like(item["labels"], IGNORED)} | no_teacher()


class UnitDataset(torch.utils.data.Dataset[Any]):
    """Several datasets end to end, fetched by `Unit`: what the loader of a mixed, packed run reads.

    `dataset[unit]` is the list of the unit's items. Row r of dataset d has the number `offsets[d] + r`.
    """

    def __init__(self, datasets: Sequence[Any]) -> None:
        self.datasets = list(datasets)
        counts = [len(dataset) for dataset in self.datasets]
        self.offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def row(self, number: int) -> Item:
        """The item of a row by its overall number."""
        if not 0 <= number < len(self):
            raise IndexError(f"row must be below {len(self)}, got {number}")
        which = int(np.searchsorted(self.offsets, number, side="right")) - 1
        return self.datasets[which][number - int(self.offsets[which])]

    def __getitem__(self, unit: Unit | int) -> list[Item]:
        if isinstance(unit, int):
            unit = Unit((unit,))
        items = [self.row(number) for number in unit]
        return [without_loss(item) for item in items] if unit.is_filler else items


def require_one_tail(datasets: Sequence[CachedDataset]) -> None:
    """Caches whose rows meet in one batch must say the same kind of thing about tails.

    Raises:
        ConfigError: only some have tail draws.
    """
    scored = [dataset for dataset in datasets if dataset.loss != "ce"]
    for other in scored[1:]:
        first = scored[0]
        if other.has_draws != first.has_draws:
            having, lacking = (first, other) if first.has_draws else (other, first)
            raise ConfigError(
                f"caches of one run must all have tail draws or none, but {having.name} has some and "
                f"{lacking.name} has none; build them alike, or train with tail_draws: false"
            )
