"""Sequential fine-tuning with averaging: training is interrupted to walk part of the way back.

Kleiman et al. 2025 (arXiv 2501.05559): every p * T steps, and at the end, theta becomes
(1 - beta) theta + beta theta0; theta0 are the weights that the run starts from, the paper's theta_o: in a chain of
tasks those of the last task's merged model. The optimiser's state is left as it is. Between two averages training is
ordinary, so a step costs nothing; a checkpoint between them is not averaged.

Cost: one more copy of the trained weights.
"""

import torch

from trainer.retention.anchor import Anchor
from trainer.retention.method import RetentionMethod
from trainer.retention.settings import SfaSettings


def averaging_steps(period: float, max_steps: int) -> set[int]:
    """The steps, counted from 1, after which the weights are averaged: the multiples of period * max_steps,
    rounded, and the last one.
    """
    count = int(1 / period + 1e-9)
    rounded = {int(number * period * max_steps + 0.5) for number in range(1, count + 1)}
    return {max(step, 1) for step in rounded} | {max_steps}


class Sfa(RetentionMethod):
    """Averages with the initial weights at `averaging_steps`."""

    name = "sfa"

    def __init__(self, settings: SfaSettings) -> None:
        self.settings = settings

    @torch.no_grad()
    def after_step(self, anchor: Anchor, step: int, max_steps: int) -> None:
        """theta <- (1 - beta) theta + beta theta0 in place, where this is a step to average."""
        if step in averaging_steps(self.settings.period, max_steps):
            for held in anchor.held:
                held.value.mul_(1 - self.settings.beta).add_(held.initial, alpha=self.settings.beta)
