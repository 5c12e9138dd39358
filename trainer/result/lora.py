"""Low-rank adapters through `peft`: attach before training, merge afterwards."""

from pathlib import Path
from typing import Any

from formats.errors import ConfigError
from formats.install import how_to_install
from trainer.config import LoraSettings

ADAPTER_DIRECTORY = "adapter"


def attach_adapters(model: Any, settings: LoraSettings) -> Any:
    """`model` with fresh adapters, whose product is zero: it still computes what it did.

    Raises:
        ConfigError: peft is missing, or no module matches.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ConfigError(f"lora needs peft, which is not installed; {how_to_install('lora')}") from None
    targets = settings.target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {str(error).splitlines()[0]}") from None


def merge_adapters(model_dir: Path, adapter_dir: Path) -> Any:
    """The initial model in float32 with the saved adapter folded into its weights."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter_dir)).merge_and_unload()
