"""A budget instead of a coefficient: hold the KL of the new text near so many nats.

Dual ascent on the constraint mean KL <= budget, in the logarithm of the coefficient c so that it stays positive, with
the step held to RATE either way:

    c <- c exp(RATE * clamp(KL / budget - 1, -1, 1))

KL is the mean of the step's own positions, over all micro-batches and processes, so c does not depend on how a step
is split. It stays on the device; nothing is read until a line is logged or a checkpoint is written.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from trainer.preflight.best_model import require_steady
from trainer.running import RunningTrainer

RATE = 0.1
"""Largest change of log c in a step."""
SPAN = 1e4
"""c stays within this factor of where it began: what was never binding must be able to bind again."""


def unreached(budget: float | None, last: Mapping[str, float]) -> str | None:
    """A line for the user where a run ended above its budget with a coefficient that still rose as fast as it may.

    Args:
        budget: None for a run without one.
        last: the last line of the log.
    """
    kl, coef = last.get("kl", 0.0), last.get("kl_coef", 0.0)
    if budget is None or kl < 2.0 * budget:
        return None
    return (
        f"kl_budget {budget:g} was not reached: KL was {kl:.3g} nats in the last steps and kl_coef still rising, at "
        f"{coef:.3g}; such a run needs more steps, or a larger kl_coef to begin with"
    )


class KlBudget(TrainerCallback, ExportableState):
    """The coefficient of a run with a budget, updated after every optimizer step.

    Args:
        trainer: whose ranks share the steps.
        start: first coefficient.
        budget: nats.

    Raises:
        ConfigError: the loss of such a run would choose the best checkpoint.
    """

    def __init__(self, trainer: RunningTrainer, start: float, budget: float) -> None:
        require_steady(trainer.args.metric_for_best_model)
        self.trainer, self.start, self.budget = trainer, start, budget
        self.coef = self._tensor(start)
        """0-d, on the device: the coefficient of the current step."""
        self._sums = torch.stack([self._tensor(0.0)] * 2)

    def _tensor(self, value: float) -> torch.Tensor:
        return torch.full((), value, dtype=torch.float32, device=self.trainer.args.device)

    def add(self, output: Any) -> None:
        """Account for one micro-batch's `LabelAnnealingOutput`, whose KL is divided by the whole step's count."""
        self._sums += torch.stack([output.kl.detach().float(), output.num_kl.float()])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stored = state.stateful_callbacks.get(type(self).__name__)
        value = stored["attributes"]["coef"] if state.global_step and stored else self.start
        self.coef = self._tensor(value)
        self._sums.zero_()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sums = self._sums
        if args.world_size > 1:
            sums = self.trainer.accelerator.reduce(sums, reduction="mean")
        kl, num_kl = sums
        change = RATE * (kl / self.budget - 1.0).clamp(-1.0, 1.0)
        change = torch.where(num_kl > 0, change, torch.zeros_like(change))
        self.coef = (self.coef * change.exp()).clamp(self.start / SPAN, self.start * SPAN)
        self._sums = torch.zeros_like(self._sums)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "args": {"start": self.start, "budget": self.budget},
            "attributes": {"coef": self.coef.item()},
        }
