"""Weights rounded to few bits: while training as when they are served, and what distillation brings back."""

import json

import pytest
import torch
from caches import write_cache
from runs import same_weights, settings

from formats.errors import ConfigError
from trainer.evaluation.evaluate import add_to_card, evaluate
from trainer.quantization import WeightQuantization, as_stored
from trainer.run import train


def load(model_dir, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)


def by_hand(weight: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """Round to nearest, ties to even, on 2^bits steps; a group's largest magnitude is half of them.

    The quotient as the product that torchao computes: the largest entry lies on a tie.
    """
    groups = weight.float().reshape(weight.shape[0], -1, size)
    scale = groups.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    codes = torch.clamp(torch.round(groups * (1 / scale)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes * scale).reshape(weight.shape)


@pytest.mark.parametrize(("text", "bits", "size"), [("int4:32", 4, 32), ("int8:64", 8, 64)])
def test_training_and_serving_round_alike(tiny_llama_dir, text, bits, size):
    """Both equal the rounding written out here, and leave embeddings and output head alone."""
    ids = torch.arange(40)[None]
    quantization = WeightQuantization.parse("fake_quantize", text)
    plain, prepared, applied = (load(tiny_llama_dir) for _ in range(3))
    quantization.prepare(prepared)
    quantization.apply(applied)
    assert list(prepared.state_dict()) == list(plain.state_dict())
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            expected = by_hand(module.weight.data, bits, size)
            assert torch.allclose(applied.get_submodule(name).weight, expected, rtol=0, atol=1e-6)
            module.weight.data = expected
    assert torch.equal(plain.lm_head.weight, applied.lm_head.weight)
    outputs = [model(input_ids=ids).logits for model in (plain, prepared, applied)]
    assert torch.allclose(outputs[0], outputs[1], atol=2e-5) and torch.equal(outputs[1], outputs[2])
    with as_stored(prepared):
        assert torch.equal(prepared(input_ids=ids).logits, load(tiny_llama_dir)(input_ids=ids).logits)
    assert torch.equal(prepared(input_ids=ids).logits, outputs[1])


def test_the_gradient_passes_through_where_nothing_is_cut(tiny_llama_dir):
    """Straight-through: the gradient of the rounded weight, but for entries that the largest code cuts."""
    ids = torch.arange(40)[None]
    prepared, applied = load(tiny_llama_dir), load(tiny_llama_dir)
    quantization = WeightQuantization("int4", 32)
    quantization.prepare(prepared)
    quantization.apply(applied)
    for parameter in applied.parameters():
        parameter.requires_grad_()
    for model in (prepared, applied):
        model(input_ids=ids, labels=ids).loss.backward()
    name = "model.layers.0.mlp.up_proj"
    mine, expected = (model.get_submodule(name).weight.grad for model in (prepared, applied))
    weight = load(tiny_llama_dir).get_submodule(name).weight
    step = weight.reshape(weight.shape[0], -1, 32).abs().amax(-1, keepdim=True) / 7.5
    cut = (torch.round(weight.reshape(weight.shape[0], -1, 32) * (1 / step)) > 7).reshape(weight.shape)
    assert 0 < cut.float().mean() < 0.05
    assert torch.allclose(mine, torch.where(cut, 0.0, expected), rtol=1e-4, atol=1e-9)


@pytest.fixture(scope="module")
def cache(tiny_llama_dir, tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("all") / "cache", tiny_llama_dir, num_rows=24, positions="all")


def test_distillation_brings_a_quantised_model_back(tiny_llama_dir, cache, tmp_path):
    """KL of the quantised model to its original falls, the result has the original's form, and is measured the same
    from the disk."""
    overrides = ("loss=kl", "fake_quantize=int4:32", "training.max_steps=12", "training.learning_rate=3e-4")
    report = train(settings(cache, tiny_llama_dir, tmp_path / "o", *overrides, f"eval_caches={{a: {cache}}}"))
    before = evaluate(tiny_llama_dir, {"a": cache}, quantize="int4:32")["a"]["kl"]
    after = evaluate(tmp_path / "o", {"a": cache}, quantize="int4:32")["a"]["kl"]
    assert report.step0["kl"] > 1e-4 and before > 1e-4
    assert after < 0.6 * before
    assert report.evaluation["a"]["kl"] == pytest.approx(after, rel=1e-4)
    assert (tmp_path / "o" / "config.json").read_bytes() == (tiny_llama_dir / "config.json").read_bytes()
    record = json.loads((tmp_path / "o" / "anneal.json").read_text())
    assert record["saved"]["kl_unrounded"] < 1e-6
    assert "fake_quantize: int4:32" in (tmp_path / "o" / "anneal.yaml").read_text()
    assert not same_weights(tmp_path / "o", tiny_llama_dir)
    # What was measured under rounding is no property of the weights that are stored.
    card = (tmp_path / "o" / "README.md").read_text()
    assert "| fake_quantize | int4:32; the weights here are those before rounding, KL and CE in this" in card
    assert "measured" not in record and "model-index" not in card
    add_to_card(tmp_path / "o", {"a": cache}, evaluate(tmp_path / "o", {"a": cache}))
    (text,) = json.loads((tmp_path / "o" / "anneal.json").read_text())["measured"]["texts"]
    assert text["kl"] != pytest.approx(after, rel=1e-2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["fake_quantize=int3:32"],
            "fake_quantize must be one of none, int4:GROUP SIZE, int8:GROUP SIZE, got",
        ),
        (["fake_quantize=int4"], "fake_quantize int4 needs group size, got none"),
        (["fake_quantize=int4:1.5"], "needs a whole number of inputs, got 1.5"),
        (
            ["fake_quantize=int4:32", "lora.r=4"],
            "fake_quantize trains the weights that are quantised, got lora",
        ),
        (
            ["fake_quantize=int4:100"],
            "needs a group size that divides the inputs of every linear layer, got 100",
        ),
    ],
)
def test_what_cannot_be_is_refused(tiny_llama_dir, cache, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        train(settings(cache, tiny_llama_dir, tmp_path / "o", *overrides))
    assert not (tmp_path / "o").exists()


def test_without_torchao_one_line_says_what_to_install(tiny_llama_dir, cache, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"need torchao, got none installed; pip install 'label-annealing\[quantize\]'"
    ):
        evaluate(tiny_llama_dir, {"a": cache}, quantize="int4:32")


def test_eval_measures_the_rounded_model(tiny_llama_dir, cache):
    plain, rounded = (
        evaluate(tiny_llama_dir, {"a": cache}, quantize=q)["a"]["kl"] for q in ("none", "int4:32")
    )
    assert plain < 1e-6 < 1e-4 < rounded


def test_the_factors_of_adapters_are_not_rounded(cache, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"^what --quantize rounds must be a whole model, got adapters alone"
    ):
        evaluate(tmp_path, {"a": cache}, quantize="int4:4")
