"""Tiny random models and a small tokenizer, saved to a directory as a user would have them.

Weights are drawn wider than usual: with the common initialisation of 0.02 every next-token distribution is
nearly uniform and no test of a head, a tail or an attention pattern could fail.  Here a prediction depends on
its whole context, the likeliest token has a probability of roughly 0.05 to 0.9, and the tail is long.
"""

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOCAB_SIZE = 1003  # not a multiple of 64: an engine that pads its vocabulary must not let the padding show
MAX_LENGTH = 1024
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'system' %}{{ '<|system|>' + message['content'] }}"
    "{% else %}{{ '<|user|>' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def stdlib_sources(num_modules: int = 12) -> Iterator[str]:
    """Source text of a few standard-library modules: the one corpus that every machine has."""
    import argparse
    import ast
    import collections
    import dataclasses
    import difflib
    import functools
    import inspect as inspect_module
    import logging
    import pathlib
    import tarfile
    import textwrap
    import typing

    modules = [argparse, ast, collections, dataclasses, difflib, functools, inspect_module, logging]
    modules += [pathlib, tarfile, textwrap, typing]
    for module in modules[:num_modules]:
        yield inspect.getsource(module)


def write_corpus(path: Path) -> Path:
    """Ten records of 160 characters of source text."""
    text = next(iter(stdlib_sources(1)))
    with open(path, "w") as file:
        for start in range(0, 1600, 160):
            file.write(json.dumps({"text": text[start : start + 160]}) + "\n")
    return path


def save_tokenizer(directory: Path) -> Path:
    """Train a byte-level BPE tokenizer of exactly `VOCAB_SIZE` entries and save it with its chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stdlib_sources(), trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=MAX_LENGTH,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    return directory


def tiny_config(architecture: str, **overrides: Any) -> Any:
    """About half a million parameters: two layers of width 128, grouped-query attention."""
    from transformers import Gemma2Config, LlamaConfig, Qwen3Config

    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": MAX_LENGTH,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    special: dict[str, tuple[Any, dict[str, Any]]] = {
        "llama": (LlamaConfig, {"tie_word_embeddings": False}),
        "qwen3": (Qwen3Config, {"tie_word_embeddings": False}),
        # Gemma 2: tied embeddings, softcaps on attention and final logits, alternating sliding windows.
        "gemma2": (
            Gemma2Config,
            {
                "query_pre_attn_scalar": 32,
                "sliding_window": 64,
                "final_logit_softcapping": 8.0,
                "attn_logit_softcapping": 4.0,
            },
        ),
    }
    config_class, extra = special[architecture]
    return config_class(**{**common, **extra, **overrides})


def widen(model: Any, seed: int, spread: float = 3.0) -> None:
    """Redraw the weights: attention looks somewhere, logits have a standard deviation near `spread`."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                continue
            width = parameter.shape[-1]
            is_head = "lm_head" in name or ("embed_tokens" in name and model.config.tie_word_embeddings)
            scale = spread if is_head else 1.0 if "embed_tokens" in name else 1.5
            deviation = scale / width**0.5 if "embed_tokens" not in name or is_head else 1.0
            parameter.normal_(0.0, deviation, generator=generator)


def save_tiny_model(
    directory: Path,
    architecture: str,
    tokenizer_dir: Path | None = None,
    *,
    seed: int = 0,
    dtype: str = "float32",
    **overrides: Any,
) -> Path:
    """Save a tiny random `llama`, `qwen3` or `gemma2`, with the tokenizer beside it when given."""
    import shutil

    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(architecture, **overrides)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    widen(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    if tokenizer_dir is not None:
        for source in sorted(Path(tokenizer_dir).iterdir()):
            shutil.copy(source, directory / source.name)
    assert json.loads((directory / "config.json").read_text())["vocab_size"] == config.vocab_size
    return directory
