"""Loading models, tokenizers and caches: quietly, with one-line errors and with the identity check."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from formats.cache import TeacherCache
from formats.errors import ConfigError, IdentityMismatchError
from formats.identity.teacher_identity import require_same_teacher


def quiet_transformers() -> None:
    """Keep transformers' own bars and notices out of the run's log; errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def given_as(what: str) -> Iterator[None]:
    """Errors of a model that was not given as `--model` name the argument that it was given as."""
    try:
        yield
    except ConfigError as error:
        raise type(error)(str(error).replace("--model", what, 1)) from None


def load_model(model_dir: Path, *, dtype: str, attn_implementation: str | None = None) -> Any:
    """A causal language model on the CPU.

    Raises:
        ConfigError: transformers cannot load it; the message gives the reason in one line.
    """
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        return AutoModelForCausalLM.from_pretrained(model_dir, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"--model must be a causal language model, got {model_dir}: {reason}") from None


def load_tokenizer(model_dir: Path) -> Any:
    """The tokenizer beside a model.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_dir)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"a model directory must hold its tokenizer, got none in {model_dir}: {reason}"
        ) from None


def stored_dtype(model_dir: Path) -> str:
    """The dtype in which a model is stored, from config.json; float32 when it does not say."""
    import json

    config: Mapping[str, Any] = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    nested = config.get("text_config") or {}
    for entry in (config, nested):
        name = entry.get("dtype") or entry.get("torch_dtype")
        if name:
            return str(name).removeprefix("torch.")
    return "float32"


def open_cache(path: str, model_dir: Path, tokenizer: Any, *, check_identity: bool = True) -> TeacherCache:
    """Open a cache for training or evaluating a model whose initial weights are in `model_dir`.

    Raises:
        FormatError: missing, unfinished or broken.
        IdentityMismatchError: built with another model, tokenizer or template.
    """
    cache = TeacherCache(path)
    if check_identity:
        try:
            require_same_teacher(cache.identity, model_dir, tokenizer)
        except IdentityMismatchError as error:
            raise IdentityMismatchError(f"{path}: {error}") from None
    return cache
