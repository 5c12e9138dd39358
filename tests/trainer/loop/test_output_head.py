"""The head inside the model: every architecture gives the same loss and gradients as its own logits do.

For each tiny model the reference takes `model(...).logits`, whatever the architecture does to them, and a
dense softmax; ours never sees those logits. An architecture that does something unknown must be refused, by
name.
"""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from formats.errors import ConfigError
from trainer.data.collator import LabelAnnealingCollator, split_batch
from trainer.loading import unwrapped
from trainer.loop.output_head import HeadRequest, OutputHead

V = 97
COMMON: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma2": {
        "head_dim": 8,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
        "sliding_window": 8,
    },
    "gemma3_text": {
        "head_dim": 8,
        "final_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 8,
        "sliding_window": 8,
    },
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.5, "sliding_window": 8},
    "granite": {"logits_scaling": 6.0},
    "phi": {},  # its head has a bias
    "olmo2": {},
    "stablelm": {},
    "gpt_neox": {"num_key_value_heads": None},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def tiny(name: str, **overrides: Any) -> Any:
    torch.manual_seed(1)
    config = AutoConfig.for_model(name, **{**COMMON, **ARCHITECTURES.get(name, {}), **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    if name == "mixtral":
        model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms as well, or a forgotten one would not show
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def random_batch(num_rows: int = 3, seed: int = 0) -> dict[str, Any]:
    """Rows of uneven length with random labels and full-vocabulary random teachers."""
    generator = np.random.default_rng(seed)
    items = []
    for _ in range(num_rows):
        length = int(generator.integers(5, 14))
        ids = generator.integers(3, V, length).astype(np.int32)
        labels = np.where(generator.random(length) < 0.6, ids, -100).astype(np.int32)
        positions = np.flatnonzero(generator.random(length - 1) < 0.7).astype(np.int32)
        logprobs = generator.normal(size=(len(positions), V))
        logprobs -= np.log(np.exp(logprobs).sum(1, keepdims=True))
        items.append(
            {
                "input_ids": ids,
                "labels": labels,
                "temperature": 1.0,
                "teacher_positions": positions,
                "teacher_counts": np.full(len(positions), V, np.int32),
                "teacher_token_ids": np.tile(np.arange(V, dtype=np.int32), len(positions)),
                "teacher_logprobs": logprobs.ravel().astype(np.float32),
                "teacher_log_tail": np.full(len(positions), -np.inf, np.float32),
            }
        )
    return LabelAnnealingCollator()(items)


def dense_loss(logits: torch.Tensor, labels_N: torch.Tensor, teacher: Any, kl_coef: float) -> torch.Tensor:
    """From logits, with nothing shared with the code under test."""
    student = logits.reshape(-1, logits.shape[-1]).log_softmax(-1)
    ce = torch.nn.functional.nll_loss(student, labels_N, ignore_index=-100)
    p = teacher.logprobs.double().reshape(len(teacher), -1)
    kl = (p.exp() * (p - student[teacher.rows])).sum(-1).mean()
    return ce + kl_coef * kl


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_equal_those_of_the_models_own_logits(name):
    model = tiny(name)
    inputs, labels_N, teacher = split_batch(random_batch())
    reference = dense_loss(model(**inputs).logits, labels_N, teacher, 0.7)
    reference.backward()
    expected = gradients(model)

    head = OutputHead.of(model).install()
    assert head.verify(model, {"input_ids": inputs["input_ids"][:, :4]}) < 1e-4
    with head.requested(HeadRequest(labels_N, teacher, kl_coef=0.7)) as request:
        loss = model(**inputs)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    found = gradients(model)
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6 * scale)
    assert request.output is not None and int(request.output.num_kl) == len(teacher)
    head.remove()
    assert "forward" not in vars(head.module)
    assert model(**inputs).logits.shape[-1] == V


def test_without_a_request_the_model_is_as_before():
    model = tiny("llama")
    ids = torch.arange(3, 11)[None]
    before = model(input_ids=ids).logits
    OutputHead.of(model).install()
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 10)


def test_unknown_post_processing_is_refused_by_name():
    """A factor that no configuration names: only the comparison of numbers can notice."""
    model = tiny("llama")
    original = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        output["logits"] = output["logits"] * 1.3
        return output

    model.forward = scaled
    head = OutputHead.of(model).install()
    with pytest.raises(ConfigError, match="LlamaForCausalLM changes its logits"):
        head.verify(model, {"input_ids": torch.arange(3, 9)[None]})


@pytest.mark.parametrize(
    ("change", "attribute", "value"),
    [
        ("granite", "logits_scaling", 1.0),
        ("gemma2", "final_logit_softcapping", None),
        ("cohere", "logit_scale", 1.0),
    ],
)
def test_ignoring_a_scale_or_cap_would_be_noticed(change, attribute, value):
    """The check has teeth: a head that forgets what the configuration says is refused."""
    model = tiny(change)
    head = OutputHead.of(model).install()
    if attribute == "final_logit_softcapping":
        head.softcap = value
    else:
        head.scale = value
    with pytest.raises(ConfigError, match="changes its logits"):
        head.verify(model, {"input_ids": torch.arange(3, 9)[None]})


def test_models_without_a_usable_head_are_refused_by_name():
    from transformers import AutoModel

    config = AutoConfig.for_model("llama", **COMMON)
    with pytest.raises(ConfigError, match="LlamaModel"):
        OutputHead.of(AutoModel.from_config(config))
    routed = tiny("mixtral", output_router_logits=True)
    with pytest.raises(ConfigError, match=r"load-balancing loss of MixtralForCausalLM"):
        OutputHead.of(routed)


def test_adapters_on_the_body_work_and_on_the_head_are_refused():
    from peft import LoraConfig, get_peft_model

    inputs, labels_N, teacher = split_batch(random_batch())
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    dense_loss(model(**inputs).logits, labels_N, teacher, 1.0).backward()
    expected = gradients(model)
    head = OutputHead.of(model).install()
    assert head.model is unwrapped(model)
    with head.requested(HeadRequest(labels_N, teacher)):
        model(**inputs)["loss"].backward()
    found = gradients(model)
    assert found.keys() == expected.keys() and all("lora" in key for key in found)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-8)

    on_head = get_peft_model(tiny("llama"), LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="output head are not supported"):
        OutputHead.of(on_head)


def test_a_fully_trained_head_beside_adapters():
    """peft's modules_to_save keeps a trainable copy of the head, and the loss must use that one."""
    from peft import LoraConfig, get_peft_model

    inputs, labels_N, teacher = split_batch(random_batch())
    settings = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny("llama"), settings)
    dense_loss(model(**inputs).logits, labels_N, teacher, 1.0).backward()
    expected = gradients(model)
    head = OutputHead.of(model).install()
    with head.requested(HeadRequest(labels_N, teacher)):
        model(**inputs)["loss"].backward()
    found = gradients(model)
    key = next(name for name in expected if "lm_head" in name)
    torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-9)


def test_gradient_checkpointing_and_autocast_give_the_same_loss():
    inputs, labels_N, teacher = split_batch(random_batch())
    model = tiny("llama").float().train()
    head = OutputHead.of(model).install()

    def step() -> tuple[float, dict[str, torch.Tensor]]:
        with head.requested(HeadRequest(labels_N, teacher)):
            loss = model(**inputs)["loss"]
        loss.backward()
        return loss.item(), gradients(model)

    plain, expected = step()
    model.gradient_checkpointing_enable()
    again, found = step()
    assert again == pytest.approx(plain, rel=1e-6)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6)
    model.gradient_checkpointing_disable()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, _ = step()
    assert mixed == pytest.approx(plain, rel=2e-2)
