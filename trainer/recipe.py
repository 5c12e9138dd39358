"""The recipe for someone who types nothing but a cache, a model and a directory; and its TrainingArguments.

It is the paper's (cosine, 5 % warm-up, small rate, no weight decay) at a batch size that fits a usual
machine; `examples/paper.yaml` is the paper's own. Everything can be overridden under `training:`, names
unchanged; `trainer.preflight.arguments` says what becomes of each.
"""

import dataclasses
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formats.errors import ConfigError, one_line
from trainer.config import TrainConfig
from trainer.config_file import refuse_unknown
from trainer.preflight import best_model, combinations
from trainer.preflight.arguments import ARGUMENTS, FORMER, PASSED, refuse_argument, takes_null
from trainer.preflight.combinations import word

if TYPE_CHECKING:
    import torch
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


def on_gpu(training: Mapping[str, Any]) -> bool:
    """Whether a run of these arguments is on a GPU."""
    import torch

    return torch.cuda.is_available() and not training.get("use_cpu")


def device_defaults(training: Mapping[str, Any], *, lora: bool) -> dict[str, Any]:
    """What depends on this machine, and on what was typed for it. Adapters are for models that fill a GPU: there,
    activations are computed again in the backward pass.
    """
    import torch

    if on_gpu(training):
        bf16 = torch.cuda.is_bf16_supported() and not training.get("fp16")
        again = {"gradient_checkpointing": True} if lora else {}
        return {"bf16": bf16, "dataloader_num_workers": 2, **again}
    return {"use_cpu": True, "dataloader_num_workers": 0}


def weights_dtype(config: TrainConfig, resolved: Mapping[str, Any], stored: Collection["torch.dtype"]) -> str:
    """The dtype of the weights while training, `auto` resolved.

    Args:
        resolved: from `resolve_training`.
        stored: floating dtypes of the initial model's weights.
    """
    import torch

    if config.dtype != "auto":
        return config.dtype
    halves = config.lora is not None and bool(resolved.get("bf16")) and on_gpu(resolved)
    return "bfloat16" if halves and set(stored) == {torch.bfloat16} else "float32"


def check_names(training: Mapping[str, Any]) -> None:
    """Refuse names and values of `training` that TrainingArguments or this trainer does not have.

    Raises:
        ConfigError: names the first one and what to write instead.
    """
    import transformers

    installed = {entry.name for entry in dataclasses.fields(transformers.TrainingArguments) if entry.init}
    for name, advice in FORMER.items():
        if name in training and name not in installed:
            raise ConfigError(f"training.{name} is not a setting here: {advice}")
    refuse_unknown(training, installed, "training.")
    for name, value in training.items():
        if name not in ARGUMENTS:
            raise ConfigError(
                f"training.{name} is new in transformers {transformers.__version__} and not known here; remove it"
            )
        if value is not None:
            refuse_argument(name, value)


def resolve_training(config: TrainConfig) -> dict[str, Any]:
    """`config.training` over the defaults, every name, value and combination checked.

    Raises:
        ConfigError: a name or value that cannot be honoured, or one that would have no effect beside the others.
    """
    check_names(config.training)
    combinations.check_objective(config)
    given = {k: v for k, v in config.training.items() if v is not None or takes_null(k)}
    resolved = {**DEFAULTS, **device_defaults(given, lora=config.lora is not None), **given}
    if word(resolved["eval_strategy"]) != "no" and not config.eval_caches:
        raise ConfigError(
            "training.eval_strategy needs eval_caches, got none; add `eval_caches: {name: CACHE}`"
        )
    best_model.settle(given, resolved, config.eval_caches)
    combinations.refuse_idle(given, resolved, has_evaluation=bool(config.eval_caches))
    combinations.check_processes(resolved)
    combinations.check_order(config, resolved)
    combinations.check_attention(config, on_gpu=on_gpu(resolved))
    combinations.check_fake_quantize(config, resolved)
    combinations.check_arithmetic(
        resolved, dtype=config.dtype, full_fine_tuning=config.lora is None, on_gpu=on_gpu(resolved)
    )
    combinations.check_compile(resolved, on_gpu=on_gpu(resolved))
    combinations.check_reporters(resolved["report_to"])
    return _without_idle_defaults(given, resolved)


def _without_idle_defaults(given: Mapping[str, Any], resolved: dict[str, Any]) -> dict[str, Any]:
    """Without the defaults that do not apply beside what was typed, so that these settings can be given again."""
    if word(resolved["lr_scheduler_type"]) in combinations.NO_WARMUP:
        resolved["warmup_steps"] = 0
    for name, strategy in (("save_steps", "save_strategy"), ("logging_steps", "logging_strategy")):
        if name not in given and word(resolved.get(strategy, "steps")) != "steps":
            resolved.pop(name)
    return {name: getattr(value, "value", value) for name, value in resolved.items()}


def training_arguments(resolved: Mapping[str, Any], out: Path) -> "TrainingArguments":
    """TrainingArguments from resolved settings.

    Raises:
        ConfigError: transformers refuses a value.
    """
    from transformers import TrainingArguments

    arguments = {name: value for name, value in resolved.items() if ARGUMENTS[name].handling == PASSED}
    arguments.setdefault("disable_tqdm", not sys.stderr.isatty())
    settled: dict[str, Any] = {
        "output_dir": str(out),
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
    }
    try:
        return TrainingArguments(**settled, **arguments)
    except (ValueError, TypeError, ImportError, OSError, RuntimeError, KeyError) as error:
        raise ConfigError(f"training: {one_line(error)}") from None
