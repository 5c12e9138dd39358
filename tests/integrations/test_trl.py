"""TRL's SFTTrainer with our loss computes what `anneal train` computes on the same batches, and refuses what it cannot.

`make integrations` runs this file and fails without TRL; another run takes it if TRL is there.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

if os.environ.get("ANNEAL_INTEGRATIONS") != "trl":
    pytest.importorskip("trl")

import trl_worker
from beside_train import (
    STEPS,
    assert_close,
    losses_of,
    set_adapters,
    set_adapters_of_train,
    set_packs_of_train,
)
from datasets import Dataset
from processes import run_ranks
from runs import settings
from safetensors.torch import load_file
from transformers import AutoTokenizer

from formats.cache import TeacherCache
from formats.disk.token_row import content_key
from formats.errors import ConfigError
from integrations.joined_rows import mask_of, segments
from integrations.trl import AnnealSFTConfig, AnnealSFTTrainer
from trainer import train

SAME = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "train_sampling_strategy": "sequential",
    "seed": 5,
}


def data_set(cache: Path, *, tokens: int | None = None) -> Dataset:
    """The rows of a cache as TRL prepares them, cut to so many tokens."""
    opened = TeacherCache(cache)
    rows = [opened.tokens(row) for row in range(len(opened))]
    labels = [np.where(row.loss_mask, row.input_ids, -100) for row in rows]
    return Dataset.from_dict(
        {
            "input_ids": [row.input_ids[:tokens].tolist() for row in rows],
            "labels": [ids[:tokens].tolist() for ids in labels],
        }
    )


def config_of(out: Path, **changed) -> AnnealSFTConfig:
    given = (
        SAME
        | {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
        | changed
    )
    return AnnealSFTConfig(output_dir=str(out), disable_tqdm=True, **given)


def trainer_of(model, out: Path, rows: Dataset, tokenizer, **changed) -> AnnealSFTTrainer:
    extra = {name: changed.pop(name) for name in ("peft_config", "eval_dataset") if name in changed}
    return AnnealSFTTrainer(
        model, config_of(out, **changed), train_dataset=rows, processing_class=tokenizer, **extra
    )


def ours(cache: Path, model: Path, out: Path, *overrides: str) -> list[float]:
    """`anneal train`; the loss of every step. The weights are in `out`."""
    given = [f"training.{name}={value}" for name, value in SAME.items()]
    report = train(settings(cache, model, out, "training.gradient_accumulation_steps=1", *given, *overrides))
    return losses_of(report)


def theirs(trainer: AnnealSFTTrainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "kl" in entry]


def assert_same(left: list[float], right: list[float], found: dict, out: Path) -> None:
    """As `assert_close`, with the weights that `anneal train` saved."""
    assert_close(left, right, load_file(out / "model.safetensors"), found)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir):
    return AutoTokenizer.from_pretrained(tiny_llama_dir)


ACCUMULATED = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}
CASES = {
    "plain": {"kl_coef": 0.7, "temperature": 1.3},
    "accumulation": {**ACCUMULATED, "kl_gate": "unsure", "kl_budget": None},
    "objective": {"ce_weight": "stm:0.001", "label_smoothing": 0.1, "kl_direction": "reverse"},
    "budget": {"kl_budget": 0.01},
}


def as_overrides(settings_of_a_case: dict) -> list[str]:
    """The same for `anneal train`."""
    return [
        f"{'training.' if name in ('per_device_train_batch_size', *ACCUMULATED) else ''}{name}={value}"
        for name, value in settings_of_a_case.items()
        if value is not None
    ]


@pytest.mark.parametrize("case", CASES)
def test_full_fine_tuning_is_that_of_anneal_train(case, tmp_path, tiny_llama_dir, pruned_cache, tokenizer):
    expected = ours(pruned_cache, tiny_llama_dir, tmp_path / "ours", *as_overrides(CASES[case]))
    rows, settings_of_case = data_set(pruned_cache), CASES[case] | {"cache_dir": str(pruned_cache)}
    trainer = trainer_of(str(tiny_llama_dir), tmp_path / "theirs", rows, tokenizer, **settings_of_case)
    found = theirs(trainer)
    assert trainer.step0.kl < 1e-4
    assert_same(expected, found, dict(trainer.model.named_parameters()), tmp_path / "ours")


def test_a_model_that_is_split_over_several_gpus_is_refused(
    tmp_path, tiny_llama_dir, pruned_cache, tokenizer
):
    """As TRL splits one that it loads by name; copies on each (`nn.DataParallel`) TRL refuses itself."""
    from transformers import AutoModelForCausalLM

    split = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    split.hf_device_map = {"model": "cpu", "lm_head": "cpu:0"}
    with pytest.raises(ConfigError, match=r"parts on cpu, cpu:0 \(device_map\); start with torchrun"):
        trainer_of(split, tmp_path, data_set(pruned_cache), tokenizer, cache_dir=str(pruned_cache))


def test_lora_is_that_of_anneal_train(tmp_path, tiny_llama_dir, pruned_cache, tokenizer, monkeypatch):
    from peft import LoraConfig, get_peft_model_state_dict

    set_adapters_of_train(monkeypatch)
    expected = ours(pruned_cache, tiny_llama_dir, tmp_path / "ours", "lora.r=4", "lora.alpha=8")
    mine = trainer_of(
        str(tiny_llama_dir),
        tmp_path / "theirs",
        data_set(pruned_cache),
        tokenizer,
        cache_dir=str(pruned_cache),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear"),
    )
    set_adapters(mine.model)
    found = theirs(mine)
    assert mine.step0.kl < 1e-4
    weights = load_file(tmp_path / "ours" / "adapter" / "adapter_model.safetensors")
    assert_close(expected, found, weights, get_peft_model_state_dict(mine.model))


@pytest.mark.parametrize("attention", ["sdpa", "flattened"])
def test_packing_is_that_of_anneal_train(
    attention, tmp_path, tiny_llama_dir, pruned_cache, tokenizer, monkeypatch
):
    """The same packs: TRL's, which may share a sequence with others when a batch is flattened."""
    import integrations.trl

    if attention == "flattened":  # as with flash attention, which this machine lacks
        plain = integrations.trl.AnnealSFTTrainer.anneal_with

        def flattened(self, *args, **kwargs):
            plain(self, *args, **kwargs | {"flatten": True})

        monkeypatch.setattr(integrations.trl.AnnealSFTTrainer, "anneal_with", flattened)
    packed = {"packing": True, "max_length": 64, "per_device_train_batch_size": 2}
    mine = trainer_of(
        str(tiny_llama_dir),
        tmp_path / "theirs",
        data_set(pruned_cache),
        tokenizer,
        cache_dir=str(pruned_cache),
        **packed,
    )
    index = mine.train_rows.dataset
    packs = [
        [index.index_of(content_key(ids, mask_of(ids, labels))) for ids, labels in segments(example)]
        for example in mine.train_dataset
    ]
    assert sorted(row for pack in packs for row in pack) == list(range(24)) and max(map(len, packs)) > 1
    set_packs_of_train(monkeypatch, packs, 24)
    expected = ours(
        pruned_cache,
        tiny_llama_dir,
        tmp_path / "ours",
        "packing=true",
        "pack_length=64",
        "training.per_device_train_batch_size=2",
    )
    found = theirs(mine)
    assert mine.step0.kl < 1e-4
    assert_same(expected, found, dict(mine.model.named_parameters()), tmp_path / "ours")


def test_padding_free_is_plain(tmp_path, tiny_llama_dir, pruned_cache, tokenizer):
    """Rows of a batch in one sequence: the same losses as beside each other."""
    rows = data_set(pruned_cache)
    common = {"cache_dir": str(pruned_cache), "max_length": None, "max_steps": 3}
    found = [
        theirs(
            trainer_of(
                str(tiny_llama_dir), tmp_path / str(flag), rows, tokenizer, padding_free=flag, **common
            )
        )
        for flag in (False, True)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_two_processes_are_one(tmp_path, tiny_llama_dir, pruned_cache, tokenizer):
    """DDP: two ranks of two rows take the steps of one process that accumulates them."""
    common = {"per_device_train_batch_size": 2}
    arguments = (str(tiny_llama_dir), str(pruned_cache), str(tmp_path / "ranks"), common)
    run_ranks(tmp_path / "logs", 2, trl_worker.run, *arguments)
    alone = trainer_of(
        str(tiny_llama_dir),
        tmp_path / "alone",
        data_set(pruned_cache),
        tokenizer,
        cache_dir=str(pruned_cache),
        gradient_accumulation_steps=2,
        **common,
    )
    expected = theirs(alone)
    found = json.loads((tmp_path / "ranks" / "losses.json").read_text())
    weights = load_file(tmp_path / "ranks" / "weights.safetensors")
    assert_close(expected, found, dict(alone.model.named_parameters()), weights)
