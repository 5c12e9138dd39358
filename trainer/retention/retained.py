"""All retention methods of one run, as the Trainer calls them."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from formats.errors import ConfigError
from trainer.preflight.combinations import word
from trainer.retention.anchor import Anchor
from trainer.retention.method import RetentionMethod
from trainer.running import RunningTrainer

FUSED_OPTIMISERS = ("lomo", "layerwise")
"""Parts of names of optimisers that update during the backward pass, before a penalty could add to it."""


class Retained(TrainerCallback):
    """Holds theta0 and runs the methods; without methods it does nothing and holds nothing.

    Args:
        trainer: whose `pause` leaves preparation out of the throughput.
        model: not wrapped, with its initial weights.
        methods: in the order in which they act.

    Raises:
        ConfigError: the model or the optimiser does not fit the methods.
    """

    def __init__(self, trainer: RunningTrainer, model: nn.Module, methods: Sequence[RetentionMethod]) -> None:
        self.trainer, self.methods = trainer, list(methods)
        self.anchor = Anchor(model) if self.methods else None
        self._ready = False
        self._sums: dict[str, torch.Tensor] = {}
        self._num_steps = 0

    def check_optimiser(self, args: Any) -> None:
        """Refuse an optimiser whose gradients a penalty cannot reach.

        Raises:
            ConfigError: it updates during the backward pass.
        """
        optim = word(args.optim)
        if self.methods and any(part in optim for part in FUSED_OPTIMISERS):
            raise ConfigError(
                f"{self.methods[0].name} needs an optimiser that updates after the backward pass, got "
                f"{optim}; use training.optim: adamw_torch"
            )

    def add_gradients(self, scale: float) -> torch.Tensor | float:
        """Let every method add its gradient, behind the last backward pass of a step.

        Args:
            scale: that of the loss scaler (fp16), else 1; the gradients carry it until they are clipped.

        Returns:
            A number whose mean over the ranks is the sum of the penalties.
        """
        total: torch.Tensor | float = 0.0
        self._num_steps += 1
        for method in self.methods:
            assert self.anchor is not None
            value = method.add_gradients(self.anchor, scale)
            if value is not None:
                self._sums[method.name] = self._sums.get(method.name, 0.0) + value
                total = total + value
        return total

    def drain(self, mean_over_ranks: Any) -> dict[str, float]:
        """Method -> mean penalty since the last log line, which is forgotten then. Collective."""
        steps, self._num_steps = max(self._num_steps, 1), 0
        sums, self._sums = self._sums, {}
        return {name: float(mean_over_ranks(value)) / steps for name, value in sums.items()}

    # --- callbacks --------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ready = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not when training begins: the check of the model (step0.py) comes first and may refuse it.
        if self._ready or self.anchor is None:
            return
        begin = time.perf_counter()
        model = self.trainer.evaluation_model()
        self.anchor.place(model)
        for method in self.methods:
            method.prepare(self.trainer, self.anchor)
        self._ready = True
        self.trainer.pause(time.perf_counter() - begin)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for method in self.methods:
            assert self.anchor is not None
            method.after_step(self.anchor, state.global_step, state.max_steps)
