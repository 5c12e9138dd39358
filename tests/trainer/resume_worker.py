"""A training run that kills its own process where it is told to.

KILL_AT=stage:step and HOLD=file come from the environment. With HOLD the process waits, when step 3 is done but
not yet looked at, until the file is there; it says so in file.held. Stages: `step` (after an optimizer step),
`weights`, `optimizer`, `marker`, `rename` (while the checkpoint of that step is saved), `publish` (while
the result takes its place).
"""

import json
import os
import signal
import time
from pathlib import Path

from trainer import checkpoint, load_config, train
from trainer.loop.label_annealing_trainer import LabelAnnealingTrainer
from trainer.loop.step_control import StepControl
from trainer.result import run_directory


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: object, name: str, condition) -> None:
    """Call `die` instead of the method when the condition holds."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if condition(*args, **kwargs):
            die()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def arrange(stage: str, step: int) -> None:
    """Plant the kill."""

    def now(trainer, *args, **kwargs):
        return trainer.state.global_step == step

    if stage == "step":
        original = StepControl.on_step_end

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                die()
            return original(self, args, state, control, **kwargs)

        StepControl.on_step_end = on_step_end
    elif stage == "weights":  # half a checkpoint: weights are written, the optimizer is not
        before(LabelAnnealingTrainer, "_save_optimizer_and_scheduler", now)
    elif stage == "optimizer":
        before(LabelAnnealingTrainer, "_save_rng_state", now)
    elif stage == "marker":
        before(checkpoint, "commit_checkpoint", lambda staging, final, at: at == step)
    elif stage == "rename":
        before(checkpoint.os, "rename", lambda source, target: str(target).endswith(f"checkpoint-{step}"))
    elif stage == "publish":  # the weights have their place, the rest has not
        before(run_directory.os, "replace", lambda source, target: Path(source).name == "tokenizer.json")


def hold(file: Path) -> None:
    """Wait for `file` behind step 3: whatever the test does meanwhile has happened at that step."""
    original = StepControl.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            file.with_suffix(".held").touch()
            while not file.exists():
                time.sleep(0.02)
        return original(self, args, state, control, **kwargs)

    StepControl.on_step_end = on_step_end


def settings(model: str, cache: str, out: str, overrides: list[str]):
    """9 steps of 8 rows, a checkpoint after every second."""
    quick = [
        *("training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=2", "step0_rows=4"),
        *("training.learning_rate=1e-3", "training.logging_steps=1", "training.save_steps=2"),
    ]
    return load_config(flags={"cache": cache, "model": model, "out": out}, overrides=[*quick, *overrides])


def run(model: str, cache: str, out: str, overrides: list[str]) -> None:
    """Train; the last line on stdout is the result as JSON."""
    if "KILL_AT" in os.environ:
        stage, step = os.environ["KILL_AT"].split(":")
        arrange(stage, int(step))
    if "HOLD" in os.environ:
        hold(Path(os.environ["HOLD"]))
    report = train(settings(model, cache, out, overrides))
    result = {"num_steps": report.num_steps, "interrupted_by": report.interrupted_by}
    print(json.dumps(result | {"log_history": report.log_history}))


def run_and_stop(step: int, model: str, cache: str, out: str, overrides: list[str]) -> None:
    """As `run`, with a SIGTERM to rank 1 alone after a step: all ranks must agree to stop."""
    original = StepControl.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, args, state, control, **kwargs)

    StepControl.on_step_end = on_step_end
    report = train(settings(model, cache, out, overrides))
    assert report.interrupted_by is not None
    print(f"stopped by SIGTERM after step {report.num_steps}")
