"""What could not be saved is refused before the first step."""

import shutil
from pathlib import Path

import pytest
from caches import write_cache
from runs import settings
from saved_bases import FEW, edit_config, edit_weights, require_same_layout

from formats.errors import AnnealError, ConfigError
from trainer import evaluate, train
from trainer.result import saving


def refused(config, *words: str, error: type[AnnealError] = ConfigError) -> None:
    with pytest.raises(error) as found:
        train(config)
    message = str(found.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert not Path(config.out).exists()


def test_a_weight_that_is_not_stored(base, tmp_path):
    model_dir, cache = base("tied_bf16")
    broken = shutil.copytree(model_dir, tmp_path / "model")
    norm = "model.layers.1.input_layernorm.weight"
    edit_weights(broken, lambda found: {n: t for n, t in found.items() if n != norm})
    from caches import identity_of

    cache = write_cache(tmp_path / "cache", model_dir, num_rows=4, identity=identity_of(broken))
    refused(settings(cache, broken, tmp_path / "run"), "must store every weight", norm)


def test_quantised_weights(base, tmp_path):
    model_dir = shutil.copytree(base("tied_bf16")[0], tmp_path / "model")
    edit_config(model_dir, quantization_config={"quant_method": "fp8"})
    refused(settings(base("tied_bf16")[1], model_dir, tmp_path / "run"), "--model must have plain weights")


def test_a_config_that_is_no_object(base, tmp_path):
    model_dir = shutil.copytree(base("tied_bf16")[0], tmp_path / "model")
    (model_dir / "config.json").write_text("[]")
    refused(settings(base("tied_bf16")[1], model_dir, tmp_path / "run"), "must be a JSON object")


def test_tokenizer_files_that_would_not_come_along(base, tmp_path, monkeypatch):
    model_dir, cache = base("tied_bf16")
    patterns = [pattern for pattern in saving.COMPANIONS if pattern != "tokenizer*"]
    monkeypatch.setattr(saving, "COMPANIONS", patterns)
    refused(settings(cache, model_dir, tmp_path / "run"), "must hold its tokenizer")


def test_a_disk_without_room(base, tmp_path, monkeypatch):
    from trainer.result import dry_save

    model_dir, cache = base("tied_bf16")
    size = (model_dir / "model.safetensors").stat().st_size
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(dry_save.shutil, "disk_usage", lambda path: usage._replace(free=size // 2))
    refused(
        settings(cache, model_dir, tmp_path / "deep" / "run"), "room for the weights of the result", "free at"
    )
    assert not (tmp_path / "deep").exists()


def test_a_tokenizer_that_cannot_be_saved(base, tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerBase

    def fails(self, *args, **kwargs):
        raise TypeError("Object of type Lambda is not JSON serializable\nand more")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", fails)
    model_dir, cache = base("tied_bf16")
    refused(settings(cache, model_dir, tmp_path / "run"), "can be saved again", "not JSON serializable")


@pytest.mark.parametrize("targets", ["[embed_tokens]", "[q_proj, embed_tokens]", "[lm_head]"])
def test_adapters_on_a_tied_weight(base, tmp_path, targets):
    model_dir, cache = base("tied_bf16")
    lora = ["lora.r=4", f"lora.target_modules={targets}"]
    refused(settings(cache, model_dir, tmp_path / "run", *lora), "cannot be merged", "its weight is also")


def test_an_adapter_on_a_tied_embedding_may_be_saved_alone(base, tmp_path):
    model_dir, cache = base("tied_bf16")
    lora = ["lora.r=4", "lora.target_modules=[embed_tokens]", "lora.merge=false", f"eval_caches.a={cache}"]
    report = train(settings(cache, model_dir, tmp_path / "run", *FEW, *lora, "training.learning_rate=0.05"))
    found = evaluate(tmp_path / "run", {"a": cache})["a"]
    assert found["ce"] == pytest.approx(report.evaluation["a"]["ce"], rel=1e-5)
    assert found["kl"] > 1e-4


def test_adapters_on_an_untied_embedding_merge(base, tmp_path):
    model_dir, cache = base("fp16")
    lora = ["lora.r=4", "lora.target_modules=[embed_tokens, q_proj]", f"eval_caches.a={cache}"]
    report = train(settings(cache, model_dir, tmp_path / "run", *FEW, *lora, "training.learning_rate=0.05"))
    found = evaluate(tmp_path / "run", {"a": cache})["a"]
    assert found["ce"] == pytest.approx(report.evaluation["a"]["ce"], rel=1e-3)
    require_same_layout(tmp_path / "run", model_dir)
