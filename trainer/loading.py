"""Loading models, tokenizers and caches: quietly, with one-line errors and with the identity check."""

import gc
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from formats.cache import TeacherCache
from formats.errors import ConfigError, IdentityMismatchError, one_line
from formats.identity.config_file import is_adapter, read_config
from formats.identity.teacher_identity import require_same_teacher, require_same_tokenizer
from trainer.multimodal import auto_class, base_of, require_text_model

QUANTISED_KEYS = ("quantization_config", "compression_config")
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError)
"""What transformers raises for files that are missing, broken, or of a kind that it does not know."""


def quiet_transformers() -> None:
    """Keep transformers' own bars and notices out of the run's log; errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def gives_back_memory() -> Iterator[None]:
    """Around a function: what it loads on a GPU is given back when it has returned. PyTorch would keep the room for
    this process, but the next run of a sweep, and the engine that builds the next cache of a chain, is another one.
    """
    try:
        yield
    finally:
        if torch.cuda.is_initialized():
            gc.collect()  # hooks tie a model to itself
            torch.cuda.empty_cache()


@contextmanager
def given_as(what: str) -> Iterator[None]:
    """Errors of a model that was not given as `--model` name the argument that it was given as."""
    try:
        yield
    except ConfigError as error:
        raise type(error)(str(error).replace("--model", what, 1)) from None


def load_model(model_dir: Path, *, dtype: str, attn_implementation: str | None = None) -> Any:
    """A causal language model on the CPU, or a multimodal one that holds it, whole.

    Raises:
        ConfigError: transformers cannot load it; the message gives the reason in one line.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        model = auto_class(model_dir).from_pretrained(model_dir, **options)
    except LOADING_ERRORS as error:
        if attn_implementation is not None:
            load_model(model_dir, dtype=dtype)  # a model that is at fault itself says so
            raise ConfigError(
                f"attn_implementation must be an attention kernel that works here, got {attn_implementation!r}: "
                f"{one_line(error)}"
            ) from None
        raise ConfigError(
            f"--model must be a causal language model, got {model_dir}: {one_line(error)}"
        ) from None
    require_text_model(model)
    return model


def context_of(model_dir: Path) -> int | None:
    """Tokens that a model was made for, where its configuration says so; no weights are loaded.

    Raises:
        ConfigError: no configuration that transformers knows.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(base_of(model_dir)).get_text_config()
    except LOADING_ERRORS as error:
        raise ConfigError(
            f"--model must be a causal language model, got {model_dir}: {one_line(error)}"
        ) from None
    return getattr(config, "max_position_embeddings", None)


def default_device(asked: str | None = None) -> str:
    """Where models are evaluated: the first GPU, else the CPU, if no device is asked for."""
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors there."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def unwrapped(model: Any) -> Any:
    """The transformers model inside DDP, `torch.compile` and peft wrappers."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def load_tokenizer(model_dir: Path) -> Any:
    """The tokenizer beside a model.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_dir)
    except LOADING_ERRORS as error:
        raise ConfigError(
            f"a model directory must hold its tokenizer, got none in {model_dir}: {one_line(error)}"
        ) from None


def require_whole_model(model_dir: Path, what: str) -> None:
    """Refuse adapters without the model that they belong to.

    Raises:
        ConfigError: the directory holds adapters alone.
    """
    if is_adapter(model_dir):
        raise ConfigError(
            f"{what} must be a whole model, got adapters alone in {model_dir}; train with lora.merge: true"
        )


def require_plain_weights(model_dir: Path, what: str) -> None:
    """Refuse quantised weights: no step moves them, no average lies between them, no adapter merges exactly.

    Raises:
        ConfigError: config.json says that the weights are quantised, or is no JSON object.
    """
    config = read_config(model_dir, what)
    parts = (config, config.get("text_config") or {})
    if any(part.get(key) for part in parts for key in QUANTISED_KEYS):
        raise ConfigError(
            f"{what} must have plain weights, got quantised ones in {model_dir}; train and merge before "
            "quantising"
        )


def open_cache(
    path: str,
    model_dir: Path,
    tokenizer: Any,
    *,
    check_identity: bool = True,
    teachers: Collection[str] = (),
    tokens_only: bool = False,
) -> TeacherCache:
    """Open a cache for training or evaluating a model whose initial weights are in `model_dir`.

    Args:
        check_identity: False opens a cache of whatever model.
        teachers: fingerprints of weights that may have built it besides the model's own.
        tokens_only: nobody reads the teacher's numbers, so tokenizer and template must agree and no more.

    Raises:
        FormatError: missing, unfinished or broken.
        IdentityMismatchError: built with another model, tokenizer or template.
    """
    cache = TeacherCache(path)
    if check_identity:
        try:
            if tokens_only:
                require_same_tokenizer(cache.identity, tokenizer)
            else:
                require_same_teacher(cache.identity, model_dir, tokenizer, teachers=teachers)
        except IdentityMismatchError as error:
            raise IdentityMismatchError(f"{path}: {error}") from None
    return cache
