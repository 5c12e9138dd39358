"""The committed model: loads in transformers, is small, has a chat template, and knows its source domain."""

import functools
import math
from pathlib import Path
from typing import Any

import torch
from stdlib_text import documents
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY_BASE = EXAMPLES / "tiny-base"


@functools.cache
def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(TINY_BASE, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(TINY_BASE)


def perplexity(domain: str, split: str, num_windows: int = 24, length: int = 256) -> float:
    model, tokenizer = load()
    tokens: list[int] = []
    for row in documents(domain, split):
        tokens += [*tokenizer(row.text, verbose=False)["input_ids"], tokenizer.eos_token_id]
        if len(tokens) >= num_windows * length:
            break
    windows = torch.tensor(tokens[: num_windows * length]).reshape(num_windows, length)
    with torch.no_grad():
        logits = model(input_ids=windows).logits[:, :-1]
    return math.exp(cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item())


def test_the_folder_is_at_most_ten_megabytes_of_bf16_safetensors() -> None:
    assert sum(path.stat().st_size for path in TINY_BASE.iterdir()) <= 10_000_000
    model = AutoModelForCausalLM.from_pretrained(TINY_BASE, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.config.model_type == "llama" and model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_the_tokenizer_round_trips_and_adds_nothing() -> None:
    model, tokenizer = load()
    assert len(tokenizer) == model.config.vocab_size
    for text in (
        "def f(x):\n        return x  # ok\n",
        "naïve Ünïcode 東京 🙂\t\r\n  end ",
        "<a> 1234567 == 0x1F",
    ):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert max(tokenizer.all_special_ids) < model.config.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_the_chat_template_marks_assistant_turns() -> None:
    _, tokenizer = load()
    messages = [
        {"role": "user", "content": "What is a list?"},
        {"role": "assistant", "content": "A mutable sequence."},
        {"role": "user", "content": "And a tuple?"},
        {"role": "assistant", "content": "An immutable one."},
    ]
    encoded: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [t for t, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == "A mutable sequence.<|im_end|>An immutable one.<|im_end|>"
    prompt: Any = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nWhat is a list?<|im_end|>\n<|im_start|>assistant\n"
    rendered: Any = tokenizer.apply_chat_template(messages[:2], tokenize=False)
    assert rendered.startswith(prompt)


def test_the_model_knows_its_source_domain_well() -> None:
    """Measured 27.5 and 25.6 on Python 3.11; the bounds leave room for other versions' text."""
    assert perplexity("prose", "source-heldout") < 34
    assert perplexity("code", "target-heldout") < 34
