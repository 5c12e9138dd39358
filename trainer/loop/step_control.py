"""What happens around the optimizer steps of a run: epochs, signals, and the last line of the log."""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from trainer.running import RunningTrainer


class StepControl(TrainerCallback):
    """Keeps the sampler's epoch in step, and turns a signal into a checkpoint and a clean end."""

    def __init__(self, trainer: RunningTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        batches = self.trainer.epoch_batches
        if batches is not None:
            updates = -(-len(batches) // args.gradient_accumulation_steps)
            batches.set_epoch(state.global_step // max(updates, 1))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Time spent before the first step (loading, compiling, the check) is no training time.
        self.trainer.restart_log_window()
        self.trainer.find_best_again()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stop = self.trainer.stop_request.requested
        if args.world_size > 1:  # a signal may reach the ranks at different steps
            flag = torch.tensor(int(stop), device=args.device)
            stop = bool(self.trainer.accelerator.reduce(flag, reduction="sum"))
        if stop:
            control.should_training_stop = control.should_save = True
        if stop or state.global_step >= state.max_steps:
            control.should_log = True  # a run always ends with a line of its own


def callback_states(callbacks: Iterable[Any]) -> dict[str, Any]:
    """What stateful callbacks want saved: class name -> state, or states where there are several of it."""
    states: dict[str, list[Any]] = {}
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            states.setdefault(type(callback).__name__, []).append(callback.state())
    return {name: found[0] if len(found) == 1 else found for name, found in states.items()}
