"""What a GPU changes where nothing was typed: pure functions, asked on any machine."""

import pytest
import torch

from trainer import recipe
from trainer.config_file import config_from_dict
from trainer.notes import lora_note
from trainer.recipe import device_defaults, weights_dtype

BASE = {"cache": "c", "model": "m", "out": "o"}
BF16, FP32 = {torch.bfloat16}, {torch.float32}


@pytest.fixture(params=(True, False), ids=("gpu", "cpu"))
def gpu(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: request.param)
    return request.param


@pytest.mark.parametrize("lora", (True, False))
def test_adapters_on_a_gpu_compute_activations_twice(lora, gpu):
    found = device_defaults({}, lora=lora)
    assert found.get("gradient_checkpointing", False) == (gpu and lora)
    assert "gradient_checkpointing" not in device_defaults({"use_cpu": True}, lora=lora)


@pytest.mark.parametrize(
    ("settings", "training", "stored", "on_gpu"),
    [
        ({"lora": {}}, {"bf16": True}, BF16, "bfloat16"),
        ({"lora": {}}, {"bf16": True}, FP32, "float32"),  # as stored: it would lose bits
        ({"lora": {}}, {"bf16": True}, BF16 | FP32, "float32"),
        ({"lora": {}}, {"bf16": False}, BF16, "float32"),  # computes in fp32: so it was asked
        ({"lora": {}}, {"fp16": True}, BF16, "float32"),
        ({}, {"bf16": True}, BF16, "float32"),
        ({"lora": {}, "dtype": "float32"}, {"bf16": True}, BF16, "float32"),
        ({"dtype": "bfloat16"}, {"bf16": True}, BF16, "bfloat16"),
    ],
)
def test_frozen_weights_stay_as_they_are_stored(settings, training, stored, on_gpu, gpu):
    config = config_from_dict({**BASE, **settings})
    expected = on_gpu if gpu or config.dtype != "auto" else "float32"
    assert weights_dtype(config, training, stored) == expected


def test_a_line_says_so_and_how_to_have_it_otherwise(monkeypatch):
    config = config_from_dict({**BASE, "lora": {}})
    line = lora_note(config, {"gradient_checkpointing": True}, "bfloat16")
    assert line == (
        "lora: the frozen weights stay in bfloat16, as they are stored (dtype: float32 is otherwise), and activations "
        "are computed twice (training.gradient_checkpointing: false is otherwise)"
    )
    asked = config_from_dict({**BASE, "lora": {}, "training": {"gradient_checkpointing": True}})
    assert lora_note(asked, {"gradient_checkpointing": True}, "float32") is None
    assert lora_note(config_from_dict(BASE), {}, "float32") is None


def test_processes_touch_no_gpu_before_they_have_their_own(
    tmp_path, tiny_llama_dir, llama_cache, monkeypatch
):
    """`cuda` without a number is the first one: all processes of a machine would try the kernels there."""
    from runs import settings

    from trainer.loss import chunks
    from trainer.run import prepare

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)
    tried = []
    monkeypatch.setattr(chunks, "why_no_triton", lambda device, compute: tried.append(device))
    prepare(settings(llama_cache, tiny_llama_dir, tmp_path / "run"))
    assert tried == []


def test_an_evaluated_model_gives_its_memory_back(tiny_llama_dir, llama_eval_cache, monkeypatch):
    """What is freed on a GPU stays with the process, and the next run of a sweep is another one."""
    import weakref

    from trainer.evaluation import evaluate as module

    models, left = [], []

    def loaded(*args, **options):
        model = load_model(*args, **options)
        models.append(weakref.ref(model))
        return model

    load_model = module.load_model
    monkeypatch.setattr(module, "load_model", loaded)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: left.append([model() for model in models]))
    module.evaluate(tiny_llama_dir, {"held-out": llama_eval_cache}, device="cpu", per_row=True)
    assert left == [[None]]


def test_adapters_train_on_weights_in_bfloat16(tmp_path, tiny_llama_dir, monkeypatch):
    """As on a GPU, forced: bfloat16 weights, float32 adapters, activations computed twice; and the check of the saved
    model holds.
    """
    from caches import write_cache
    from runs import copy_model, settings

    from trainer import train

    model = copy_model(tiny_llama_dir, tmp_path / "bf16", lambda name, weight: weight.bfloat16())
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    cache = write_cache(tmp_path / "cache", model, num_rows=8)
    found = []
    original = recipe.weights_dtype

    def on_a_gpu(config, resolved, stored):
        monkeypatch.setattr(recipe, "on_gpu", lambda training: True)
        found.append(original(config, resolved, stored))
        return found[-1]

    monkeypatch.setattr("trainer.inputs.weights_dtype", on_a_gpu)
    overrides = ("lora.r=2", "training.bf16=true", "training.gradient_checkpointing=true")
    report = train(settings(cache, model, tmp_path / "run", *overrides))
    assert found == ["bfloat16"] and report.step0["kl"] < 1e-3
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(report.out).parameters()} == BF16
