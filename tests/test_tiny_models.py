"""The fixtures themselves: a test model that predicts the same everywhere would let every other test pass."""

import pytest
import torch
from tiny_models import VOCAB_SIZE
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("name", ["tiny_llama_dir", "tiny_qwen3_dir", "tiny_gemma2_dir"])
def test_predictions_are_neither_flat_nor_certain_and_depend_on_context(name, request):
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(name))
    ids = torch.randint(6, VOCAB_SIZE, (1, 64), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 0] = 7 if ids[0, 0] != 7 else 8
    with torch.no_grad():
        probs = model(ids).logits.float().softmax(-1)[0]
        changed = model(other).logits.float().softmax(-1)[0]
    top = probs.max(-1).values
    assert 0.02 < top.median() < 0.8, top.median()
    assert (probs[-1] - changed[-1]).abs().sum() > 1e-2


def test_tokenizer_round_trip_and_generation_markers(tiny_tokenizer):
    assert len(tiny_tokenizer) == VOCAB_SIZE
    text = "def f(x):\n    return x + 1  # caf\u00e9"
    assert tiny_tokenizer.decode(tiny_tokenizer(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]
    encoded = tiny_tokenizer.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tiny_tokenizer.decode(marked) == "there</s>"
