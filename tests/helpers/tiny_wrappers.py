"""Tiny random multimodal models: a text model beside an encoder of images, as most open weights come today."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_models import MAX_LENGTH, VOCAB_SIZE, widen

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_LENGTH,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _gemma3() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config={**TEXT, "sliding_window": 32}, vision_config=VISION, mm_tokens_per_image=4)
    )


def _mistral3() -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    vision = {"model_type": "pixtral", "head_dim": 16, **VISION}
    text = {"model_type": "mistral", **TEXT}
    return Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision, image_token_index=10)
    )


def _qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        **TEXT,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4},
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128}
    special = {
        "image_token_id": 10,
        "video_token_id": 11,
        "vision_start_token_id": 12,
        "vision_end_token_id": 13,
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)
    )


def _qwen3_5() -> Any:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = {
        **TEXT,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 128,
        "num_position_embeddings": 16,
    }
    special = {
        "image_token_id": 10,
        "video_token_id": 11,
        "vision_start_token_id": 12,
        "vision_end_token_id": 13,
    }
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision, **special))


def _llama4() -> Any:
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    text = {
        **TEXT,
        "intermediate_size_mlp": 256,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 128,
    }
    vision = {**VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    return Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision))


WRAPPERS: dict[str, Callable[[], Any]] = {
    "gemma3": _gemma3,
    "mistral3": _mistral3,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_5": _qwen3_5,
    "llama4": _llama4,
}


def save_tiny_wrapper(
    directory: Path, name: str, tokenizer_dir: Path | None = None, *, seed: int = 0
) -> Path:
    """Save one of `WRAPPERS`, with the tokenizer beside it when given."""
    import shutil

    import torch

    torch.manual_seed(seed)
    model = WRAPPERS[name]()
    widen(model, seed)
    model.save_pretrained(directory)
    for source in sorted(tokenizer_dir.iterdir()) if tokenizer_dir is not None else ():
        shutil.copy(source, directory / source.name)
    return directory
