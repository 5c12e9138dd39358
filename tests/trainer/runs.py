"""Training runs for tests: quick settings, runs in a process of their own, copies of models."""

import json
import shutil
from pathlib import Path

import resume_worker
import torch
from processes import Started, start

from trainer import load_config

QUICK = [
    "training.per_device_train_batch_size=8",
    "training.gradient_accumulation_steps=1",
    "training.max_steps=2",
    "training.learning_rate=1e-3",
    "training.logging_steps=1",
    "training.warmup_steps=0",
    "training.save_strategy=no",
    "step0_rows=4",
]


def settings(cache, model, out, *overrides: str):
    return load_config(
        flags={"cache": str(cache), "model": str(model), "out": str(out)}, overrides=[*QUICK, *overrides]
    )


def trainer_of(cache, model, out, *overrides: str):
    """The Trainer of a run that is not started."""
    from trainer.inputs import load_student, open_inputs, rows_of
    from trainer.recipe import resolve_training, training_arguments
    from trainer.run import make_trainer, retention_methods

    config = settings(cache, model, out, *overrides)
    resolved = resolve_training(config)
    inputs = open_inputs(config)
    rows, student = rows_of(config, inputs), load_student(config, inputs, resolved)
    methods = retention_methods(config, inputs, rows, student, 0)
    args = training_arguments(resolved, out)
    return make_trainer(config, student, args, inputs.tokenizer, rows, methods)


def begin(model_dir: Path, cache: Path, out: Path, *overrides: str, **environment: str) -> Started:
    """Start a run; its output goes beside the run's directory."""
    arguments = (str(model_dir), str(cache), str(out), list(overrides))
    return start(out.with_name(f"{out.name}-output"), resume_worker.run, *arguments, **environment)


def finish(*arguments, **environment) -> tuple[list[dict], Started]:
    """Run to the end; (step entries of the log, the process)."""
    started = begin(*arguments, **environment)
    assert started.wait() == 0, started.text("stderr")[-3000:]
    history = json.loads(started.text("stdout").splitlines()[-1])["log_history"]
    return [entry for entry in history if "ce" in entry], started


def same_weights(left: Path, right: Path) -> bool:
    import numpy as np
    from safetensors.numpy import load_file

    a, b = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def copy_model(source: Path, target: Path, change=None, **save) -> Path:
    """The model in `source` with its tensors changed by `change(name, tensor)`; one file or several."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    if change is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(change(name, parameter))
    model.save_pretrained(target, **save)
    for path in source.glob("*token*"):
        shutil.copy(path, target / path.name)
    return target


def noise(seed: int, size: float = 0.02):
    generator = torch.Generator().manual_seed(seed)
    return lambda name, tensor: tensor + size * torch.randn(tensor.shape, generator=generator)
