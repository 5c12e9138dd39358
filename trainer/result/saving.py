"""The trained model as a directory: in the dtype the initial model is stored in, adapters merged or alone."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import LoraSettings
from trainer.loop.output_head import unwrapped
from trainer.result.lora import ADAPTER_DIRECTORY, merge_adapters

if TYPE_CHECKING:
    from trainer.loop.label_annealing_trainer import LabelAnnealingTrainer

COMPANIONS = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model"),
    *("chat_template*", "generation_config.json"),
)


def save_result(
    trainer: "LabelAnnealingTrainer", target: Path, model_dir: Path, *, lora: LoraSettings | None, dtype: str
) -> None:
    """Write model and tokenizer to `target`. Collective: under FSDP every rank helps to gather the weights.

    Args:
        trainer: after training.
        target: an existing, empty directory.
        model_dir: the initial model, whose generation settings are kept and into which adapters are merged.
        lora: the adapters' settings, None for full fine-tuning.
        dtype: of the saved weights; adapters keep the dtype they were trained in.
    """
    import torch

    if lora is not None:
        adapter = target / ADAPTER_DIRECTORY if lora.merge else target
        trainer.save_model(str(adapter), _internal_call=True)
        if trainer.args.process_index == 0 and lora.merge:
            _save_full(merge_adapters(model_dir, adapter), None, target, dtype)
    else:
        model = unwrapped(trainer.model)
        sharded = trainer.is_fsdp_enabled
        state: dict[str, Any] = (
            trainer.accelerator.get_state_dict(trainer.model) if sharded else model.state_dict()
        )
        if trainer.args.process_index == 0:
            state = {name: _cast(tensor, getattr(torch, dtype)) for name, tensor in state.items()}
            _save_full(model, state, target, dtype)
    if trainer.args.process_index == 0:
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(target)
        copy_companions(model_dir, target)


def _cast(tensor: Any, dtype: Any) -> Any:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _save_full(model: Any, state: dict[str, Any] | None, target: Path, dtype: str) -> None:
    import torch

    if state is None:
        model = model.to(getattr(torch, dtype))
    # A leftover of training: the result shall generate with a cache of keys and values again.
    model.config.use_cache = True
    model.config.dtype = dtype
    model.save_pretrained(target, state_dict=state)


def copy_companions(model_dir: Path, target: Path) -> None:
    """Copy the tokenizer's and the generation settings' files that the initial model has and `target`
    lacks.
    """
    for pattern in COMPANIONS:
        for path in sorted(model_dir.glob(pattern)):
            if path.is_file() and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)
