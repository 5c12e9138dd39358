"""TIES trims a task vector as a whole: the `density` largest of all its entries stay, in whichever tensors they lie.

Yadav et al. 2023 (arXiv 2306.01708) flatten each model's task vector before they trim it; the threshold then is one
number per model. It is found without the vector in memory: the bits of a positive float32, read as an integer, have the
order of the number, so two counts of them (upper 16 bits, then the lower 16 of the one bin that matters) give
the threshold exactly. Entries that equal it stay in the order in which they are stored until the count is reached.

Time: two reads of every model. Memory: a few times the largest tensor, and 98,304 counts per model.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch

from formats.progress import Progress
from trainer.merging.weights import wide
from trainer.result.stored_weights import StoredWeights
from trainer.result.weight_distance import SLICE

UPPER, LOWER = 1 << 15, 1 << 16
"""Values of the upper and of the lower bits of a float32 without its sign."""


class WholeModelTrim:
    """Which entries of each task vector stay.

    Args:
        initial: theta0; integers, which do not move, count nothing, and a weight stored twice counts once.
        tuned: the models.
        names: for each of them the name of theta0's tensors in it.
        density: share of the entries that stay, in (0, 1]; their number is rounded and at least 1.
        progress: a phase of tensors.
    """

    def __init__(
        self,
        initial: StoredWeights,
        tuned: Sequence[StoredWeights],
        names: Sequence[Mapping[str, str]],
        density: float,
        progress: Progress,
    ) -> None:
        self.initial, self.tuned, self.names = initial, tuned, names
        self.twins = stored_twice(initial, tuned, names)
        floating = [
            n for n, t in initial.tensors.items() if t.dtype.is_floating_point and n not in self.twins
        ]
        progress.start("trim", 2 * len(floating), unit="tensor")
        upper = self._count(floating, UPPER, lambda bits, _: bits >> 16, progress)
        total = int(upper[0].sum())
        self.num_kept = max(1, round(density * total))
        """Entries of each model's task vector that stay."""
        found = [_place(counts, self.num_kept) for counts in upper]

        def lower_bits(bits: torch.Tensor, model: int) -> torch.Tensor:
            return bits[bits >> 16 == found[model][0]] & (LOWER - 1)

        lower = self._count(floating, LOWER, lower_bits, progress)
        places = [_place(counts, rest) for counts, (_, rest) in zip(lower, found, strict=True)]
        progress.finish()
        self._threshold = [(top << 16) | low for (top, _), (low, _) in zip(found, places, strict=True)]
        self._left = [rest for _, rest in places]
        self._left_at: dict[str, list[int]] = {}

    def _count(
        self,
        names: Sequence[str],
        num_values: int,
        values: Callable[[torch.Tensor, int], torch.Tensor],
        progress: Progress,
    ) -> list[torch.Tensor]:
        counts = [torch.zeros(num_values, dtype=torch.int64) for _ in self.tuned]
        for name in names:
            theta0 = wide(self.initial[name])
            for model, (weights, known) in enumerate(zip(self.tuned, self.names, strict=True)):
                bits = magnitude_bits(weights[known[name]].to(theta0.dtype) - theta0)
                for part in bits.split(SLICE):  # counting takes 8 bytes an entry
                    counts[model] += torch.bincount(values(part, model), minlength=num_values)
            progress.advance(1)
        return counts

    def kept(self, name: str, vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Per model which entries of its task vector stay, bool of its shape.

        Args:
            name: of the tensor; each is asked for once, in the order in which theta0 stores them.
            vectors: theta_i - theta0 of that tensor.
        """
        original = self.twins.get(name, name)
        left = self._left_at.setdefault(original, list(self._left))
        masks, after = [], []
        for vector, threshold, room in zip(vectors, self._threshold, left, strict=True):
            bits = magnitude_bits(vector)
            mask, equal = bits > threshold, (bits == threshold).nonzero()[:room, 0]
            mask[equal] = True
            masks.append(mask.reshape(vector.shape))
            after.append(room - len(equal))
        if name == original:
            self._left = after
        return masks


def magnitude_bits(vector: torch.Tensor) -> torch.Tensor:
    """int32 [entries], ordered as the magnitudes are in float32."""
    return vector.abs().float().reshape(-1).view(torch.int32)


def _place(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """The value of the `rank`-th largest entry (from 1), and which it is among those of that value."""
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, rank))
    before = int(above[place - 1]) if place else 0
    return len(counts) - 1 - place, rank - before


def stored_twice(
    initial: StoredWeights, tuned: Sequence[StoredWeights], names: Sequence[Mapping[str, str]]
) -> dict[str, str]:
    """Name -> the earlier name of the same weight: matrices that are equal in theta0 and in every tuned model, which
    is how some savers write tied weights.
    """
    found: dict[str, str] = {}
    seen: dict[tuple, str] = {}
    for name, entry in initial.tensors.items():
        if len(entry.shape) < 2 or not entry.dtype.is_floating_point:
            continue
        data = initial[name].contiguous().reshape(-1).view(torch.uint8).numpy().data
        key = (entry.shape, entry.dtype, hashlib.blake2b(data).digest())
        first = seen.setdefault(key, name)
        if first != name and all(
            weights.same(known[first], known[name]) for weights, known in zip(tuned, names, strict=True)
        ):
            found[name] = first
    return found
