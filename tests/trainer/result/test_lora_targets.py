"""What `lora.target_modules` may say: every name counts or is refused, in one line."""

import pytest

from formats.errors import ConfigError
from trainer.config import LoraSettings
from trainer.loading import load_model
from trainer.result.lora import attach_adapters


def adapted(model_dir, targets, **more) -> set[str]:
    """The last parts of the names of the modules that got an adapter."""
    model = load_model(model_dir, dtype="float32")
    model = attach_adapters(model, LoraSettings(r=2, target_modules=targets, **more))
    return {
        name.removesuffix(".lora_A").rsplit(".", 1)[-1]
        for name, _ in model.named_modules()
        if name.endswith(".lora_A")
    }


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        ("q_proj", {"q_proj"}),
        ("self_attn.q_proj", {"q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (r".*\.(up|down)_proj", {"up_proj", "down_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_endings_lists_and_regular_expressions(targets, found, tiny_llama_dir):
    assert adapted(tiny_llama_dir, targets) == found


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["q_proj", "qproj"], ["got 'qproj', in which none ends", "q_proj, k_proj"]),
        (["q_proj", "all-linear"], ["got 'all-linear'"]),
        ("(", ["got '('", "missing ), unterminated subpattern"]),
        ("*", ["got '*'", "nothing to repeat"]),
        ("qproj", ["lora.target_modules: Target modules qproj not found"]),
    ],
)
def test_names_of_nothing_are_refused(targets, words, tiny_llama_dir):
    with pytest.raises(ConfigError) as refused:
        adapted(tiny_llama_dir, targets)
    assert "\n" not in str(refused.value) and all(word in str(refused.value) for word in words)


@pytest.mark.parametrize("rank", [10**18, 2**63 - 1])
def test_a_rank_beyond_every_memory_is_one_line(rank, tiny_llama_dir):
    model = load_model(tiny_llama_dir, dtype="float32")
    with pytest.raises(ConfigError, match=rf"^lora.r {rank} is more than this machine holds: [^\n]*$"):
        attach_adapters(model, LoraSettings(r=rank))
