"""Liger's kernels for everything but the loss: norms, rotary positions, MLPs.

Liger would also replace the model's forward by one that computes its own loss from the output head's weight. That
part is always off here: our loss takes the head's place inside the forward that the model has.
"""

import inspect
import os
from collections.abc import Mapping
from typing import Any

from formats.errors import ConfigError

LOSS_KERNELS = ("cross_entropy", "fused_linear_cross_entropy")


def liger_config(given: Mapping[str, bool] | None, model_type: str, device_type: str) -> dict[str, bool]:
    """`liger_kernel_config` for a model, the loss kernels off and every other name checked.

    Args:
        given: as typed; null takes Liger's own choice for everything but the loss.
        model_type: of the model's config.json.
        device_type: `cuda`, `cpu`, ...

    Raises:
        ConfigError: Liger is not installed, does not know the model or a kernel, or has no GPU to run on.
    """
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as appliers
    except ImportError as error:
        raise ConfigError(
            f"training.use_liger_kernel needs liger-kernel, got {error}; pip install liger-kernel, or remove it"
        ) from None
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            "training.use_liger_kernel needs a GPU for its Triton kernels, got the CPU; remove it"
        )
    if model_type not in appliers:
        raise ConfigError(
            f"training.use_liger_kernel: Liger has no kernels for {model_type} models; remove it"
        )
    known = set(inspect.signature(appliers[model_type]).parameters) - {"model"}
    config = {name: False for name in LOSS_KERNELS if name in known}
    for name, value in (given or {}).items():
        if name not in known:
            takes = ", ".join(sorted(known - set(LOSS_KERNELS)))
            raise ConfigError(
                f"training.liger_kernel_config: Liger has {takes} for {model_type} models; got {name}"
            )
        if name in LOSS_KERNELS and value:
            raise ConfigError(
                f"training.liger_kernel_config.{name} must be false, got true: the loss is fused already"
            )
        config[name] = bool(value)
    return config


def settle_liger(args: Any, model: Any) -> None:
    """Put the checked configuration into TrainingArguments, where the Trainer reads it.

    Raises:
        ConfigError: as `liger_config`.
    """
    if args.use_liger_kernel:
        model_type = str(getattr(model.config, "model_type", ""))
        args.liger_kernel_config = liger_config(args.liger_kernel_config, model_type, args.device.type)
