"""W&B, TensorBoard, trackio and their kin: held open until the result is measured, and told what the log has not.

transformers names what it passes on: `train/NAME` for the log of training, `eval/CACHE_NAME` for evaluations. Its
reporters end with the last step, before the result is measured; here they end behind that.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from trainer.running import RunningTrainer

KL_TO_INITIAL = "kl_to_initial"


class HeldOpen:
    """A reporter as the Trainer sees it: told every event as it happens, except that the training is over."""

    def __init__(self, reporter: TrainerCallback) -> None:
        self.reporter = reporter
        self._end: Callable[[], Any] = lambda: None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Kept for `close`."""
        self._end = lambda: self.reporter.on_train_end(args, state, control, **kwargs)

    def __getattr__(self, event: str) -> Any:
        return getattr(self.reporter, event)

    def close(self) -> None:
        """Say now that the training is over, if it is."""
        self._end()


class Reporters(TrainerCallback):
    """The reporters of one run.

    Before the first step, at every checkpoint and at every evaluation they are told how far the model is from the
    initial one on the text that it learns, as `kl_to_initial`. Without reporters nothing is measured.

    Args:
        trainer: not yet started.
        report_to: `TrainingArguments.report_to`, whose callbacks in `trainer` are taken over.
        kl_to_initial: nats, or None where it cannot be known; collective.
    """

    def __init__(
        self, trainer: RunningTrainer, report_to: Any, kl_to_initial: Callable[[], float | None]
    ) -> None:
        self.trainer, self._kl_to_initial = trainer, kl_to_initial
        callbacks = trainer.callback_handler.callbacks
        classes = set(get_reporting_integration_callbacks(report_to))
        self.held: list[HeldOpen] = []
        for place, callback in enumerate(callbacks):
            if type(callback) in classes:
                self.held.append(HeldOpen(callback))
                callbacks[place] = self.held[-1]
        self._measured_at: int | None = None

    def tell(self, figures: Mapping[str, float | int | None]) -> None:
        """Report figures at the current step; None is left out."""
        known = {name: value for name, value in figures.items() if value is not None}
        trainer = self.trainer
        for reporter in self.held if known else ():
            reporter.on_log(
                trainer.args, trainer.state, trainer.control, logs=dict(known), model=trainer.model
            )

    def close(self) -> None:
        """Say that the training is over."""
        for reporter in self.held:
            reporter.close()

    # --- callbacks --------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._measure(state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(state, control)

    def _measure(self, state: Any, control: Any) -> None:
        """Once per step, and not where the run ends: a signal leaves no time, and the result is measured anyway.
        All processes have agreed on the end (`StepControl`), so all of them measure or none does.
        """
        if not self.held or self._measured_at == state.global_step or control.should_training_stop:
            return
        self._measured_at = state.global_step
        begin, device = time.perf_counter(), self.trainer.args.device
        # A run with reporters has the random masks of one without.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self.tell({KL_TO_INITIAL: self._kl_to_initial()})
        self.trainer.pause(time.perf_counter() - begin)
