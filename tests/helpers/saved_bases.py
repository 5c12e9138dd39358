"""Models as users have them on disk: sharded, tied, in several dtypes, with more in their directory than weights."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model, widen

from formats.identity.tensor_hash import read_header

FEW = ["training.max_steps=2", "training.learning_rate=5e-3"]
INVALID = {"do_sample": False, "temperature": 0.7, "eos_token_id": 2, "pad_token_id": 0}
"""What transformers loads with a warning and refuses to save."""


def edit_config(path: Path, **changes) -> Path:
    config = json.loads((path / "config.json").read_text())
    config = {key: value for key, value in (config | changes).items() if value is not None}
    (path / "config.json").write_text(json.dumps(config, indent=1))
    return path


def edit_weights(path: Path, change) -> Path:
    content = change(load_file(path / "model.safetensors"))
    save_file(content, path / "model.safetensors", metadata={"format": "pt"})
    return path


def tied_bf16(path: Path, tokenizer: Path) -> Path:
    return save_tiny_model(path, "llama", tokenizer, dtype="bfloat16", tie_word_embeddings=True)


def sharded(path: Path, tokenizer: Path) -> Path:
    from transformers import AutoModelForCausalLM

    whole = tied_bf16(path / "whole", tokenizer)
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(path / "parts", max_shard_size="200KB")
    for file in whole.glob("*token*"):
        shutil.copy(file, path / "parts")
    return path / "parts"


def fp16(path: Path, tokenizer: Path) -> Path:
    save_tiny_model(path, "llama", tokenizer, dtype="float16")
    return edit_config(path, dtype=None, torch_dtype="float16")


def mixed(path: Path, tokenizer: Path) -> Path:
    """Norms in float32, the rest in bfloat16; and config.json does not say."""
    save_tiny_model(path, "qwen3", tokenizer, dtype="bfloat16")
    edit_weights(path, lambda found: {n: t.float() if t.ndim == 1 else t for n, t in found.items()})
    return edit_config(path, dtype=None, use_cache=False)


def stored_twice(path: Path, tokenizer: Path) -> Path:
    """Tied, and written by a saver that writes both."""
    tied_bf16(path, tokenizer)
    name = "model.embed_tokens.weight"
    return edit_weights(path, lambda found: found | {"lm_head.weight": found[name].clone()})


def with_more(path: Path, tokenizer: Path) -> Path:
    """What servers and people need beside the weights, a tensor that transformers does not load, settings
    that it does not save, and files that are not to be carried on."""
    tied_bf16(path, tokenizer)
    edit_weights(
        path, lambda found: found | {"model.layers.7.mtp.weight": torch.ones(3, 2, dtype=torch.int32)}
    )
    edit_config(path, auto_map={"AutoModelForCausalLM": "modeling_own.Own"}, temperature=0.3)
    (path / "modeling_own.py").write_text("raise RuntimeError('never run')\n")
    (path / "LICENSE").write_text("use it well")
    (path / "preprocessor_config.json").write_text("{}")
    (path / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tools.jinja").write_text("{{ messages[0]['content'] }}")
    (path / "generation_config.json").write_text(json.dumps(INVALID))
    (path / "README.md").write_text("another card")
    (path / "consolidated.safetensors.old").write_bytes(b"weights in another format")
    return path


def experts(path: Path, tokenizer: Path) -> Path:
    """A mixture of experts, whose matrices lie apart on the disk and together in memory."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=1003, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, pad_token_id=0, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    widen(model, 0)
    model.to(torch.bfloat16).save_pretrained(path)
    for file in tokenizer.iterdir():
        shutil.copy(file, path)
    return path


BASES = {f.__name__: f for f in (tied_bf16, sharded, fp16, mixed, stored_twice, with_more, experts)}


def headers(path: Path) -> dict[str, dict]:
    """File -> tensor -> dtype, shape, place."""
    return {file.name: read_header(file)[0] for file in sorted(path.glob("*.safetensors"))}


def require_same_layout(result: Path, initial: Path) -> None:
    assert headers(result) == headers(initial)
    for file in initial.glob("*.safetensors"):
        assert (result / file.name).stat().st_size == file.stat().st_size
    for file in initial.glob("*.json"):
        assert (result / file.name).read_bytes() == file.read_bytes(), file.name
