"""Lost, gone, hidden: what a tuned model lost, and how much of it a little old text brings back.

M is how good a model is on held-out source text, higher being better: minus the cross-entropy in nats, or the share of
known tokens that are still right.

    lost    M(initial) - M(tuned)
    gone    M(control) - M(restored)
    hidden  lost - gone

The control is the initial model after the same text. `gone` is the paper's actual forgetting, `hidden` its pseudo
forgetting: how much more the text did for the tuned model than for the initial one.

The paper (Zhang et al. 2024) compares the restored model with the initial one and has no control; text that makes the
initial model better, or worse, by itself is then taken for restoring. A model that was not tuned at all has lost, gone
and hidden of exactly zero here, and a restoring that does nothing brings nothing back.
"""

import math
from dataclasses import dataclass

LITTLE = 0.005
"""Nats below which nothing is said to be lost: less than a seed moves a run."""


@dataclass(frozen=True)
class Shares:
    """Of one tuned model, in one measure."""

    lost: float
    gone: float

    @property
    def hidden(self) -> float:
        """What comes back."""
        return self.lost - self.gone

    @property
    def back(self) -> float | None:
        """The share of the loss that comes back; None where nothing to speak of was lost (noise)."""
        return self.hidden / self.lost if self.lost >= LITTLE else None

    @classmethod
    def of(cls, *, initial: float, tuned: float, control: float, restored: float) -> "Shares":
        """From the four measurements."""
        return cls(lost=initial - tuned, gone=control - restored)

    def verdict(self) -> str:
        """One sentence for people, of shares in nats."""
        if not math.isfinite(self.lost) or not math.isfinite(self.gone):
            return "no number: the model has diverged on this text"
        if self.back is None:
            return "nothing to speak of was lost"
        if self.back >= 0.5:
            return "mostly hidden: a little old text brings it back"
        if self.back >= 0.2:
            return "mostly gone: train less, or hold on (kl_coef)"
        return "gone: train less, or hold on (kl_coef)"
