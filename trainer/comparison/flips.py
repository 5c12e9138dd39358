"""Which items changed: right before and wrong now (1->0, forgotten), or the reverse (0->1), without those by luck.

An average hides both: ten items lost and ten others won leave the accuracy as it was.

A model that picks among c choices without knowing is right once in c. With "knows or guesses" as the model of an
answer, a model of accuracy a guesses on a share (1 - a) c / (c - 1) of the items and is right by luck on
(1 - a) / (c - 1) of them. If the two models' luck is independent, the share of items that flip by luck alone is

    luck = (1 - a) (1 - b) / (c - 1)        in either direction, a and b the accuracies before and after

(right by luck before and wrong now, or wrong before and right by luck now; the two are equal). It is taken off the
observed shares, and what would fall below zero is zero: Harmon et al. 2025, "Mapping post-training forgetting in
language models at scale", arXiv 2510.17776. Where items have different numbers of choices, each number is a group of
its own with its own a and b, and luck is added up. A written answer is hardly right by luck: nothing is taken off.

Limits. The adjustment cancels in the difference of the two directions. It takes both models' knowledge and luck as
independent, which a tuned model's are not: where both guess the same items, more flips by luck than it says; where they
make the same lucky or wrong choice, fewer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.comparison.intervals import mcnemar


@dataclass(frozen=True)
class Flips:
    """Counts of items, of one task and two models, or their means over several pairs."""

    num_items: int
    lost: float
    """1->0: right before, wrong now."""
    won: float
    """0->1: wrong before, right now."""
    luck: float
    """Items expected to flip by luck in each direction; 0 where nothing is guessed."""
    p_value: float | None
    """McNemar's exact test of `lost` against `won`; None of a mean: the items of several pairs are the same ones."""

    @property
    def lost_adjusted(self) -> float:
        """Items lost beyond luck."""
        return max(0.0, self.lost - self.luck)

    @property
    def won_adjusted(self) -> float:
        """Items won beyond luck."""
        return max(0.0, self.won - self.luck)

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain values under stable keys."""
        return {
            "num_items": self.num_items,
            "lost": self.lost,
            "won": self.won,
            "luck": self.luck,
            "lost_adjusted": self.lost_adjusted,
            "won_adjusted": self.won_adjusted,
            "p_value": self.p_value,
        }


def count_flips(first_N: np.ndarray, second_N: np.ndarray, num_choices_N: np.ndarray) -> Flips | None:
    """Flips between two models on the same items; None unless all values are 0 or 1.

    Args:
        first_N, second_N: [N], 1 where the answer is right.
        num_choices_N: [N], choices to pick from; below 2 where the answer is written.
    """
    if not all(np.isin(values, (0.0, 1.0)).all() for values in (first_N, second_N)) or not len(first_N):
        return None
    lost = int(((first_N == 1) & (second_N == 0)).sum())
    won = int(((first_N == 0) & (second_N == 1)).sum())
    luck = 0.0
    for choices in np.unique(num_choices_N[num_choices_N >= 2]):
        here = num_choices_N == choices
        wrong = (1 - first_N[here].mean()) * (1 - second_N[here].mean())
        luck += float(here.sum() * wrong / (int(choices) - 1))
    return Flips(len(first_N), lost, won, luck, mcnemar(lost, won))


def mean_flips(pairs: Sequence[Flips | None]) -> Flips | None:
    """The mean over several pairs of models; None where one of them has no flips."""
    known = [pair for pair in pairs if pair is not None]
    if len(known) < len(pairs) or not known:
        return None
    if len(known) == 1:
        return known[0]
    lost, won, luck = (
        sum(getattr(pair, name) for pair in known) / len(known) for name in ("lost", "won", "luck")
    )
    return Flips(known[0].num_items, lost, won, luck, None)
