"""Which rows form which batch: mixing, shuffling, length grouping and the split over ranks, in one place.

An epoch is a list of units (rows or packs). Every source contributes `round(weight * units of the target)` of them,
taken from an endless chain of seeded permutations (of its own order, without shuffling), so that a replay cache of
weight 0.1 shows other rows in the next epoch until all were seen. The sources are interleaved evenly, so that every
optimizer step has each in its proportion, as far as it is long enough: a KL term is a mean over its step's tokens, and
by chance alone a sixth of steps of eight units would have none of a source that gives a fifth. The list depends on the
seed and the epoch alone.

An optimizer step covers `batch_size * accumulation * world_size` consecutive units and micro-batch j of it
goes to rank j % world_size: the same step, and the same gradient, however the batch is split over
accumulation and ranks. Where the last micro-batches do not reach every rank, the others get a `Filler` that
carries no loss.

Nothing is kept between epochs: to resume is to ask for the same epoch again and skip.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch.utils.data

from trainer.data.dataset import CachedDataset, Filler, Unit
from trainer.data.mixture import Share, require_drawn, unit_weights

GROUPING_WINDOW = 32
"""Optimizer steps over which units are sorted by length; wider pads less and shuffles less."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The units of one cache, in overall row numbers, and how many of them an epoch takes."""

    units: Sequence[Sequence[int]]
    """Row numbers of each unit."""
    weight: float = 1.0
    """Units per epoch, relative to the units of the first source."""


def sources_of(
    units: Sequence[Sequence[Sequence[int]]], datasets: Sequence[CachedDataset], amounts: Sequence[float]
) -> list[Source]:
    """The sources of a mixture: of every dataset its units, and how many an epoch takes.

    Args:
        units: of every dataset, in overall row numbers.
        datasets: the target first.
        amounts: of each a weight or a `Share`.

    Raises:
        ConfigError: an amount comes to less than half a unit, and so to none.
    """
    weights: Sequence[float] = amounts
    if any(isinstance(amount, Share) for amount in amounts):  # else no row's length is read
        tokens = [int(dataset.lengths().sum()) for dataset in datasets]
        weights = unit_weights(amounts, [len(each) for each in units], tokens)
    for amount, weight in zip(amounts[1:], weights[1:], strict=True):
        require_drawn(amount, weight, len(units[0]))
    return [Source(units=each, weight=weight) for each, weight in zip(units, weights, strict=True)]


def interleaved(which_U: np.ndarray) -> np.ndarray:
    """int64 [U]: an order of U units in which each source is spread evenly over the whole.

    Any neighbours hold each source in its share, as nearly as whole units allow; every source keeps its own order, and
    a single one stays as it is.

    Args:
        which_U: int [U], the source of each unit.
    """
    counts = np.bincount(which_U)
    rank_U = np.empty(len(which_U), np.int64)
    for source, count in enumerate(counts.tolist()):
        rank_U[which_U == source] = np.arange(count)
    return np.lexsort((which_U, (rank_U + 0.5) / counts[which_U]))


class EpochBatches(torch.utils.data.Sampler[list[Unit]]):
    """The batches of one rank: a batch sampler whose order depends on (seed, epoch) alone.

    Args:
        sources: the first is the target, whose weight is 1.
        batch_size: units per micro-batch and rank.
        lengths: int [rows], tokens per row by overall number; needed to group by length.
        window: micro-batches of one optimizer step on all ranks together (accumulation * world size).
        rank, world_size: this process, and how many there are.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        lengths: np.ndarray | None = None,
        window: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert sources and 0 <= rank < world_size and batch_size > 0
        self.sources = list(sources)
        self.counts = [round(source.weight * len(sources[0].units)) for source in self.sources]
        self.counts[0] = len(sources[0].units)
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.lengths, self.window = lengths, window
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches the next iteration yields."""
        self.epoch = epoch

    @property
    def num_batches(self) -> int:
        """Micro-batches of an epoch on all ranks, without fillers."""
        return -(-sum(self.counts) // self.batch_size)

    def __len__(self) -> int:
        return -(-self.num_batches // self.world_size)

    def _drawn(self, which: int) -> list[Unit]:
        """This epoch's units of one source: a window of the endless chain of its permutations, or of its order."""
        units, count = self.sources[which].units, self.counts[which]
        position, stop = self.epoch * count, (self.epoch + 1) * count
        if not self.shuffle:
            return [Unit(units[i % len(units)]) for i in range(position, stop)]
        drawn: list[Unit] = []
        while position < stop:
            turn, start = divmod(position, len(units))
            order = np.random.default_rng([self.seed, which, turn]).permutation(len(units))
            chosen = order[start : start + stop - position]
            drawn += [Unit(units[i]) for i in chosen.tolist()]
            position += len(chosen)
        return drawn

    def units(self) -> list[Unit]:
        """All units of the epoch, in training order, on every rank the same."""
        units = [unit for which in range(len(self.sources)) for unit in self._drawn(which)]
        generator = np.random.default_rng([self.seed, len(self.sources), self.epoch])
        order = generator.permutation(len(units)) if self.shuffle else np.arange(len(units))
        which = np.repeat(np.arange(len(self.counts)), self.counts)
        order = order[interleaved(which[order])]
        units = [units[i] for i in order.tolist()]
        return units if self.lengths is None or not self.shuffle else self._grouped(units, generator)

    def _grouped(self, units: list[Unit], generator: np.random.Generator) -> list[Unit]:
        """Sort within wide windows, then shuffle whole optimizer steps: similar lengths meet, order stays
        random.
        """
        assert self.lengths is not None
        totals = np.asarray([int(self.lengths[list(unit)].sum()) for unit in units])
        step = self.batch_size * self.window
        order: list[int] = []
        for start in range(0, len(units), step * GROUPING_WINDOW):
            inside = np.arange(start, min(start + step * GROUPING_WINDOW, len(units)))
            order += inside[np.argsort(-totals[inside], kind="stable")].tolist()
        full = len(order) // step
        # The short step at the end stays last; the longest comes first, so that memory runs out at once or
        # never.
        steps = [order[i * step : (i + 1) * step] for i in generator.permutation(full).tolist()]
        if steps:
            longest = max(range(full), key=lambda i: int(totals[steps[i]].max()))
            steps.insert(0, steps.pop(longest))
        return [units[i] for chosen in [*steps, order[full * step :]] for i in chosen]

    def __iter__(self) -> Iterator[list[Unit]]:
        units = self.units()
        for index in range(self.rank, len(self) * self.world_size, self.world_size):
            batch = units[index * self.batch_size : (index + 1) * self.batch_size]
            yield batch or [Filler(units[0])]


def sample_rows(dataset: CachedDataset, count: int, seed: int) -> np.ndarray:
    """`count` distinct rows, chosen by seed, in ascending order."""
    count = min(count, len(dataset))
    return np.sort(np.random.default_rng([seed, 0x5703]).choice(len(dataset), count, replace=False))
