"""The recipe for someone who types nothing but a cache, a model and a directory; and its TrainingArguments.

It is the paper's (cosine, 5 % warm-up, small rate, no weight decay) at a batch size that fits a usual
machine; `examples/paper.yaml` is the paper's own. Everything can be overridden under `training:`, names
unchanged.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formats.errors import ConfigError
from trainer.config import TrainConfig
from trainer.config_file import refuse_unknown

if TYPE_CHECKING:
    from transformers import TrainingArguments

DEFAULTS: Mapping[str, Any] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # below 1: a share of all steps
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "logging_first_step": True,
    "logging_nan_inf_filter": False,  # a NaN must be seen
    "save_strategy": "steps",
    "save_steps": 0.2,  # below 1: a share of all steps
    "save_total_limit": 2,
    "eval_strategy": "no",
    "report_to": "none",
    "seed": 0,
}

RESERVED: Mapping[str, str] = {
    "output_dir": "use --out",
    "remove_unused_columns": "it would drop the teacher's columns",
    "resume_from_checkpoint": "run the same command again: an interrupted run continues by itself",
    "label_smoothing_factor": "label smoothing is not part of label annealing",
    "label_names": "the batch's columns are fixed",
    "use_liger_kernel": "the loss is fused already",
    "deepspeed": "use FSDP: training.fsdp: true",
    "enable_jit_checkpoint": "SIGTERM saves and stops without it",
    "auto_find_batch_size": "it would change the batch that the loss is averaged over; choose a size",
}
"""Arguments that this trainer settles itself, and what to do instead."""

RUNTIME_ARGUMENTS = (
    "logging_",
    "report_to",
    "dataloader_",
    "disable_tqdm",
    "save_",
    "eval_",
    "run_name",
    "ddp_",
)
"""Beginnings of names that may change between an interrupted run and its continuation."""


def device_defaults() -> dict[str, Any]:
    """What depends on this machine."""
    import torch

    if torch.cuda.is_available():
        return {"bf16": torch.cuda.is_bf16_supported(), "dataloader_num_workers": 2}
    return {"use_cpu": True, "dataloader_num_workers": 0}


def resolve_training(config: TrainConfig) -> dict[str, Any]:
    """`config.training` over the defaults, every name checked.

    Raises:
        ConfigError: a name that TrainingArguments does not have, or one that this trainer settles itself.
    """
    from transformers import TrainingArguments

    known = {entry.name for entry in dataclasses.fields(TrainingArguments) if entry.init}
    refuse_unknown(config.training, known, "training.")
    for name, advice in RESERVED.items():
        if config.training.get(name):
            raise ConfigError(f"training.{name} is not available here: {advice}")
    given = dict(config.training)
    if given.get("train_sampling_strategy") not in (None, "random", "sequential"):
        raise ConfigError(
            "training.train_sampling_strategy must be random or sequential, "
            f"got {given['train_sampling_strategy']!r}; use group_by_length: true for length-grouped batches"
        )
    resolved = {**DEFAULTS, **device_defaults(), **given}
    if str(resolved["eval_strategy"]) not in ("no", "IntervalStrategy.NO") and not config.eval_caches:
        raise ConfigError(
            "training.eval_strategy needs eval_caches, got none; add `eval_caches: {name: CACHE}`"
        )
    return resolved


def training_arguments(resolved: Mapping[str, Any], out: Path) -> "TrainingArguments":
    """TrainingArguments from resolved settings.

    Raises:
        ConfigError: transformers refuses a value.
    """
    from transformers import TrainingArguments

    arguments = dict(resolved)
    arguments.setdefault("disable_tqdm", not sys.stderr.isatty())
    try:
        return TrainingArguments(output_dir=str(out), remove_unused_columns=False, **arguments)
    except (ValueError, TypeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"training: {reason}") from None
