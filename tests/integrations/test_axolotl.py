"""Axolotl's own training, from its YAML, with our plugin computes what `anneal train` computes on the same batches.

Axolotl pins packages of its own, so this runs in an environment of its own: `make integrations`.
"""

import json
import os
from pathlib import Path

import pytest

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
if os.environ.get("ANNEAL_INTEGRATIONS") != "axolotl":
    pytest.importorskip("axolotl")

import yaml
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.train import train as axolotl_train
from beside_train import (
    STEPS,
    assert_close,
    losses_of,
    set_adapters,
    set_adapters_of_train,
    set_packs_of_train,
)
from caches import write_cache
from runs import settings
from safetensors.torch import load_file
from transformers import AutoTokenizer

from cache_builder.corpus.corpus import CorpusConfig, open_corpus
from cache_builder.rows.tokenise import tokenise
from formats.errors import AnnealError, ConfigError
from integrations.axolotl import REFUSED, AnnealArgs, AnnealPlugin
from integrations.settings import SETTINGS
from trainer import train
from trainer.config import TrainConfig

ROWS = 24
SAME = {
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "train_sampling_strategy": "sequential",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Conversations of uneven length."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    with open(path, "w") as file:
        for number in range(ROWS):
            said = ("sum " * (1 + number % 7) + str(number), f"is {number + 1}" + " so" * (number % 5))
            turns = [{"role": r, "content": c} for r, c in zip(("user", "assistant"), said, strict=True)]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory, corpus, tiny_llama_dir) -> Path:
    """The corpus as `anneal cache build` reads it."""
    rows = tokenise(
        open_corpus(CorpusConfig(source=str(corpus))), AutoTokenizer.from_pretrained(tiny_llama_dir)
    )
    return write_cache(
        tmp_path_factory.mktemp("cache") / "cache", tiny_llama_dir, rows=list(rows), min_prob=1e-3
    )


def configuration(folder: Path, corpus: Path, model: Path, **changed):
    """Axolotl's configuration, read by it from a file."""
    written = {
        "plugins": ["integrations.axolotl.AnnealPlugin"],
        "base_model": str(model),
        "datasets": [{"path": str(corpus), "type": "chat_template"}],
        "chat_template": "tokenizer_default",
        "special_tokens": {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"},
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
        "output_dir": str(folder / "out"),
        "sequence_len": 64,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "curriculum_sampling": True,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "optimizer": "adamw_torch",
        "warmup_steps": 0,
        "bf16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "val_set_size": 0,
    }
    folder.mkdir(exist_ok=True)
    (folder / "axolotl.yaml").write_text(yaml.safe_dump(written | changed))
    return load_cfg(str(folder / "axolotl.yaml"))


def theirs(cfg):
    """(model, trainer, losses) of a run of Axolotl."""
    model, _, trainer = axolotl_train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    return model, trainer, [entry["loss"] for entry in trainer.state.log_history if "kl" in entry]


def ours(cache: Path, model: Path, out: Path, *overrides: str) -> list[float]:
    given = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1} | SAME
    words = [f"training.{name}={value}" for name, value in given.items()]
    report = train(settings(cache, model, out, *words, *overrides))
    return losses_of(report)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_full_fine_tuning_is_that_of_anneal_train(accumulation, tmp_path, corpus, cache, tiny_llama_dir):
    sizes = {"micro_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    cfg = configuration(
        tmp_path / "theirs", corpus, tiny_llama_dir, anneal_cache=str(cache), anneal_kl_coef=0.5, **sizes
    )
    model, trainer, found = theirs(cfg)
    assert trainer.step0.kl < 1e-4
    expected = ours(
        cache,
        tiny_llama_dir,
        tmp_path / "ours",
        "kl_coef=0.5",
        f"training.per_device_train_batch_size={4 // accumulation}",
        f"training.gradient_accumulation_steps={accumulation}",
    )
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    assert_close(expected, found, weights, dict(model.named_parameters()))


def test_sample_packing_is_that_of_anneal_train(tmp_path, corpus, cache, tiny_llama_dir, monkeypatch):
    """With the packs of Axolotl's sampler."""
    cfg = configuration(
        tmp_path / "theirs",
        corpus,
        tiny_llama_dir,
        anneal_cache=str(cache),
        sample_packing=True,
        micro_batch_size=2,
        sample_packing_sequentially=True,
        pad_to_sequence_len=False,
    )
    model, trainer, found = theirs(cfg)
    batches = list(trainer._get_train_sampler())
    packs = [[int(row) for row in pack] for batch in batches for pack in batch]
    assert {len(batch) for batch in batches} == {2} and max(map(len, packs)) > 1
    set_packs_of_train(monkeypatch, packs, ROWS)
    words = ("packing=true", "pack_length=64", "training.per_device_train_batch_size=2")
    expected = ours(cache, tiny_llama_dir, tmp_path / "ours", *words)
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    assert_close(expected, found, weights, dict(model.named_parameters()))


def test_lora_is_that_of_anneal_train(tmp_path, corpus, cache, tiny_llama_dir, monkeypatch):
    from peft import get_peft_model_state_dict

    set_adapters_of_train(monkeypatch)
    monkeypatch.setattr(AnnealPlugin, "post_lora_load", lambda self, cfg, model: set_adapters(model))
    lora = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, "lora_dropout": 0.0}
    lora |= {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o")}  # Triton
    cfg = configuration(tmp_path / "theirs", corpus, tiny_llama_dir, anneal_cache=str(cache), **lora)
    model, _, found = theirs(cfg)
    expected = ours(cache, tiny_llama_dir, tmp_path / "ours", "lora.r=4", "lora.alpha=8")
    weights = load_file(tmp_path / "ours" / "adapter" / "adapter_model.safetensors")
    assert_close(expected, found, weights, get_peft_model_state_dict(model))


def test_without_a_cache_the_plugin_does_nothing(tmp_path, corpus, tiny_llama_dir):
    cfg = configuration(tmp_path, corpus, tiny_llama_dir)
    assert AnnealPlugin().get_trainer_cls(cfg) is None
    for name, value in (("anneal_kl_coef", 4.0), ("anneal_eval_cache", "held"), ("anneal_tail_draws", False)):
        with pytest.raises(ConfigError, match=f"{name} needs anneal_cache, got {value!r} without it"):
            AnnealPlugin().get_trainer_cls(type(cfg)({**cfg, name: value}))
    same = type(cfg)({**cfg, "anneal_kl_coef": TrainConfig.kl_coef, "anneal_on_missing": "refuse"})
    assert AnnealPlugin().get_trainer_cls(same) is None


def test_settings_are_those_of_anneal_train():
    fields = AnnealArgs.model_fields
    assert {f"anneal_{name}" for name in SETTINGS} < set(fields)


def test_what_is_refused(tmp_path, corpus, cache, tiny_llama_dir):
    """By name, before the model is loaded."""
    cfg = configuration(tmp_path, corpus, tiny_llama_dir, anneal_cache=str(cache))
    plugin = AnnealPlugin()
    assert plugin.get_trainer_cls(cfg) is not None
    for name in REFUSED:
        with pytest.raises(ConfigError, match=f"{name} is not available beside anneal_cache"):
            plugin.get_trainer_cls(type(cfg)({**cfg, name: True}))
    for changed, message in (
        ({"anneal_kl_coef": -1.0}, "kl_coef must be at least 0"),
        ({"anneal_on_missing": "ignore"}, "on_missing must be one of"),
        ({"context_parallel_size": 2}, "context_parallel_size must be 1"),
        ({"anneal_cache": str(tmp_path / "nowhere")}, "nowhere"),
    ):
        with pytest.raises(AnnealError, match=message):
            plugin.get_trainer_cls(type(cfg)({**cfg, **changed}))


def test_rows_that_the_cache_lacks(tmp_path, corpus, cache, tiny_llama_dir):
    cfg = configuration(
        tmp_path,
        corpus,
        tiny_llama_dir,
        anneal_cache=str(cache),
        train_on_inputs=True,
        datasets=[{"path": str(corpus), "type": "chat_template", "roles_to_train": ["user", "assistant"]}],
    )
    with pytest.raises(ConfigError, match=r"got 24 of 24 that .* its tokens with loss on others"):
        theirs(cfg)
