"""TRL's SFTTrainer with our loss computes what `anneal train` computes on the same batches, and refuses what it cannot.

`make integrations` runs this file where TRL must be there; elsewhere it is run if it is.
"""

import os
from pathlib import Path

import pytest

if os.environ.get("ANNEAL_INTEGRATIONS") != "1":
    pytest.importorskip("trl")

from datasets import Dataset
from integrations.trl import AnnealSFTConfig, AnnealSFTTrainer
from runs import settings
from safetensors.torch import load_file
from transformers import AutoTokenizer

from formats.cache import TeacherCache
from trainer import train

STEPS = 20
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


def data_set(cache: Path) -> Dataset:
    """The rows of a cache as TRL prepares them."""
    opened = TeacherCache(cache)
    rows = [opened.tokens(row) for row in range(len(opened))]
    return Dataset.from_list(
        [
            {
                "input_ids": r.input_ids.tolist(),
                "labels": [t if m else -100 for t, m in zip(r.input_ids.tolist(), r.loss_mask, strict=True)],
            }
            for r in rows
        ]
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
    return [entry["loss"] for entry in report.log_history if "ce" in entry and "loss" in entry]


def theirs(trainer: AnnealSFTTrainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "kl" in entry]


def assert_same(left: list[float], right: list[float], model, out: Path) -> None:
    assert len(left) == len(right) == STEPS
    assert left[0] != pytest.approx(left[-1], rel=0.05), "nothing was learnt"
    assert left == pytest.approx(right, rel=1e-5)
    weights = load_file(out / "model.safetensors")
    found = dict(model.named_parameters())
    assert weights.keys() == found.keys()
    for name, tensor in weights.items():
        difference = (found[name].detach() - tensor).norm() / tensor.norm()
        assert difference <= 1e-5, (name, float(difference))


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir):
    return AutoTokenizer.from_pretrained(tiny_llama_dir)


@pytest.mark.parametrize(
    ("mine", "overrides"),
    [
        ({"kl_coef": 0.7, "temperature": 1.3}, ["kl_coef=0.7", "temperature=1.3"]),
        (
            {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "kl_gate": "unsure"},
            [
                "training.gradient_accumulation_steps=3",
                "training.per_device_train_batch_size=2",
                "kl_gate=unsure",
            ],
        ),
        (
            {"ce_weight": "stm:0.001", "kl_budget": None, "label_smoothing": 0.1},
            ["ce_weight=stm:0.001", "label_smoothing=0.1"],
        ),
    ],
    ids=["plain", "accumulation", "objective"],
)
def test_full_fine_tuning_is_that_of_anneal_train(
    mine, overrides, tmp_path, tiny_llama_dir, pruned_cache, tokenizer
):
    expected = ours(pruned_cache, tiny_llama_dir, tmp_path / "ours", *overrides)
    trainer = trainer_of(
        str(tiny_llama_dir),
        tmp_path / "theirs",
        data_set(pruned_cache),
        tokenizer,
        cache_dir=str(pruned_cache),
        **mine,
    )
    found = theirs(trainer)
    assert trainer.step0.kl < 1e-4
    assert_same(expected, found, trainer.model, tmp_path / "ours")
