"""What a model's config.json tells before an engine starts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cache_builder.teachers.protocol import DTYPES
from formats.errors import ConfigError
from formats.identity.config_file import read_config


def checkpoint_dtype(model_config: Mapping[str, Any]) -> str:
    """The type the weights were saved in, from a parsed config.json; float32 when it does not say."""
    for part in (model_config, model_config.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            name = str(part.get(key) or "").removeprefix("torch.")
            if name in DTYPES[1:]:
                return name
    return "float32"


def attention_softcap(model_config: Mapping[str, Any]) -> float | None:
    """The bound on attention scores (Gemma 2), from a parsed config.json; None where the model has none."""
    for part in (model_config, model_config.get("text_config") or {}):
        if part.get("attn_logit_softcapping"):
            return float(part["attn_logit_softcapping"])
    return None


def read_model_config(model: str) -> dict[str, Any]:
    """The model's config.json, from a directory or the Hugging Face cache.

    Raises:
        ConfigError: there is none, or it is not valid.
    """
    directory = Path(model)
    if not directory.is_dir():
        from huggingface_hub import hf_hub_download

        try:
            directory = Path(hf_hub_download(model, "config.json")).parent
        except Exception as error:
            raise ConfigError(
                f"model must be a directory or an available Hugging Face name, got {model!r} "
                f"({type(error).__name__})"
            ) from error
    return read_config(directory)
