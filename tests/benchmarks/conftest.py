"""The model of the tests of gradients."""

import pytest
import torch


@pytest.fixture(scope="module")
def teacher(request):
    """Wide random weights: few or many tokens are kept, and the tail carries mass."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=request.module.VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).float().eval()
