"""One yardstick of a comparison: a text or a task, on the side of what was known or of what is learnt.

Gains are differences of *scores*, which are higher for a better model and add up along a way of small steps: nats
per token for a perplexity (-ln), the value itself for other metrics, negated where lower is better.
"""

import math
from dataclasses import dataclass
from pathlib import Path

SIDES = ("source", "target")
PERPLEXITY = "perplexity"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What one number of a model means."""

    side: str
    """`source`: what the initial model knew; `target`: what the models learn."""
    name: str
    """As in the table; unique on its side."""
    kind: str
    """`text` (a cache) or `task` (of bench.json)."""
    measure: str
    """`perplexity` for a text, `metric,filter` for a task."""
    higher_is_better: bool
    where: str = ""
    """The cache or the tasks it is read from."""

    @property
    def key(self) -> str:
        """`source:NAME` or `target:NAME`."""
        return f"{self.side}:{self.name}"

    @property
    def logarithmic(self) -> bool:
        """Whether differences are taken of the logarithm: of every perplexity."""
        return self.measure.partition(",")[0].endswith(PERPLEXITY)

    def score(self, value: float) -> float:
        """Higher is better; nats per token (or word, or byte) for a perplexity."""
        if self.logarithmic:
            return -math.log(value) if value > 0 else math.nan
        return value if self.higher_is_better else -value

    def value(self, score: float) -> float:
        """The inverse of `score`; infinite where a perplexity is."""
        if self.logarithmic:
            return math.exp(-score) if -score < 700 else math.inf
        return score if self.higher_is_better else -score

    def loss(self, value: float, initial: float) -> float | None:
        """What was lost relative to the initial value: 0.02 for a perplexity 2 % higher or an accuracy 2 % lower.

        Relative, not in points: 0.50 instead of 0.51 is 0.0196. None where the initial value is zero: there was
        nothing to lose.
        """
        if not initial or not math.isfinite(initial):
            return None
        # Of |initial|: a correlation may be below 0.
        change = math.copysign(value / initial - 1, value - initial)
        return -change if self.higher_is_better else change


def task_of(word: str) -> tuple[str, int | None, str | None]:
    """(task, shots, metric) of `TASK`, `TASK:SHOTS`, `TASK:METRIC` or `TASK:SHOTS:METRIC`; None for what is not said.

    The metric is `metric` or `metric,filter`; no metric of the harness is a number.
    """
    task, _, rest = word.partition(":")
    number, _, after = rest.partition(":")
    if number.isdecimal():
        return task, int(number), after or None
    return task, None, rest or None


def is_task(word: str) -> bool:
    """Whether a source or target is a task rather than a cache: no directory, and not written like a place."""
    return could_be_task(word) and not Path(word).is_dir()


def could_be_task(word: str) -> bool:
    """Whether it is not written like a place, whatever there is of that name."""
    return not ("/" in word or word.startswith((".", "~")))
