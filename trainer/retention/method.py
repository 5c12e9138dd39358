"""The interface of a retention method: three moments of a run at which it may act.

A penalty hands its gradient, known in closed form, straight to `.grad`: once per optimizer step, behind the
last backward pass and before clipping. So it needs no autograd graph, and it is exact under accumulation and
on any number of ranks: at that point DDP and FSDP have averaged the gradients already, and what every rank
then adds counts once.
"""

import torch

from trainer.retention.anchor import Anchor
from trainer.running import RunningTrainer


class RetentionMethod:
    """Does nothing; methods override what they need."""

    name = ""
    """Its key in the settings, and in the log."""

    def prepare(self, trainer: RunningTrainer, anchor: Anchor) -> None:
        """Before the first step of this call of the Trainer, everything being placed. Collective."""

    def add_gradients(self, anchor: Anchor, scale: float) -> torch.Tensor | None:
        """Add the penalty's gradient, times `scale`, to the parameters' gradients.

        Returns:
            0-d: a number whose mean over the ranks is the penalty, unscaled; None for methods without one.
        """
        return None

    def after_step(self, anchor: Anchor, step: int, max_steps: int) -> None:
        """After optimizer step number `step`, counted from 1, and before a checkpoint of it is written."""


def add_quadratic(
    anchor: Anchor, coef: float, weights: dict[str, torch.Tensor] | None, scale: float
) -> torch.Tensor:
    """The gradient of coef / 2 * sum_i w_i (theta_i - theta0_i)^2, times `scale`, into `.grad`.

    Parameters without a gradient are left alone: no optimiser moves them, so they are where they were.
    Memory: two temporaries the size of one parameter.

    Args:
        anchor: theta and theta0.
        coef: strength.
        weights: name -> w, this rank's parts; None for 1.
        scale: factor on the gradient alone, such as that of a loss scaler.

    Returns:
        0-d, at least float32: a number whose mean over the ranks is the value, unscaled.
    """
    total: torch.Tensor | None = None
    for held in anchor.held:
        gradient = held.gradient
        if gradient is None:
            continue
        difference = held.value - held.initial
        weighted = difference if weights is None else weights[held.name] * difference
        gradient.add_(weighted, alpha=coef * scale)
        wide = torch.promote_types(difference.dtype, torch.float32)
        value = torch.sum(weighted * difference, dtype=wide) * (0.5 * coef * held.num_shards)
        total = value if total is None else total + value.to(total.device)
    return torch.zeros(()) if total is None else total
