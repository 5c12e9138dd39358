"""Whatever can fail when a model is saved, tried before the first step: everything but the weights.

A run of days must not end in a traceback of its last minute. So checkpoint and result are written to a
temporary directory without weights, what was written is read back, and the disk is asked for its space.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from formats.errors import ConfigError, one_line
from formats.identity.fingerprint import TokenizerFingerprint
from trainer.loading import load_tokenizer
from trainer.preflight.disk import require_space
from trainer.result.saving import ResultLayout, copy_companions, write_config


def dry_save(
    model: Any,
    tokenizer: Any,
    model_dir: Path,
    out: Path,
    layout: ResultLayout | None,
) -> int:
    """Save a run's checkpoint and result in all but their weights, and remove them.

    A generation config that transformers refuses to write (`do_sample: false` beside a temperature) is
    forgotten by `model`, which never generates here: checkpoints then hold the default one, and the result
    the initial model's file, byte for byte.

    Args:
        model: with adapters or without, not wrapped.
        tokenizer: of the initial model.
        model_dir: the initial model.
        out: the run's directory, which need not exist yet.
        layout: of the result's weights; None when the adapter alone is saved.

    Returns:
        The bytes of the result's weights.

    Raises:
        ConfigError: what cannot be saved, and why.
    """
    with tempfile.TemporaryDirectory(prefix="anneal-dry-save-") as folder:
        checkpoint, result = Path(folder) / "checkpoint", Path(folder) / "result"
        result.mkdir()
        _require_generation_config(model, checkpoint)
        adapters = hasattr(model, "peft_config")
        try:
            # Adapters are small and are written with their weights.
            model.save_pretrained(checkpoint, **({} if adapters else {"state_dict": {}}))
            tokenizer.save_pretrained(checkpoint)
        except Exception as error:  # whatever a configuration, a tokenizer or peft may think of
            raise ConfigError(
                f"--model must be a model that can be saved again, got {model_dir}: {one_line(error)}"
            ) from None
        adapter_bytes = sum(file.stat().st_size for file in checkpoint.glob("adapter_model*"))
        try:
            copy_companions(model_dir, result)
            if layout is not None:
                write_config(model_dir, result, layout.dtype)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"--model must be a model whose files can be copied, got {model_dir}: {one_line(error)}"
            ) from None
        _require_same_tokenizer(tokenizer, result, model_dir)
    result_bytes = adapter_bytes + (layout.num_bytes if layout is not None else 0)
    require_space(out, result_bytes, "the weights of the result", "free some, or choose another directory")
    return result_bytes


def _require_generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if getattr(model, "generation_config", None) is None:
        return
    try:
        model.generation_config.save_pretrained(folder)
    except Exception:  # it names no class of its own
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner.generation_config = GenerationConfig()


def _require_same_tokenizer(tokenizer: Any, result: Path, model_dir: Path) -> None:
    """The files that are copied must be all that the tokenizer is made of."""
    if not (result / "config.json").is_file():  # some tokenizers are found by the model's type
        shutil.copyfile(model_dir / "config.json", result / "config.json")
    wanted, found = (
        vars(TokenizerFingerprint.of(tokenizer)),
        vars(TokenizerFingerprint.of(load_tokenizer(result))),
    )
    for part, value in wanted.items():
        if found[part] != value:
            raise ConfigError(
                f"the result must read text as the initial model does, got another {part.replace('_', ' ')} "
                f"from the tokenizer files of {model_dir}; save the tokenizer again with save_pretrained"
            )
