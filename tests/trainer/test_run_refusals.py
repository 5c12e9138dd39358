"""What `train` refuses before its first step."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from caches import identity_of, random_rows, topk_of, write_cache
from runs import settings

from formats.errors import AnnealError, ConfigError, FormatError, IdentityMismatchError, IncompleteCacheError
from formats.writer import CacheWriter
from trainer import plan_training, train
from trainer.loading import load_model


def refused(config, error: type[AnnealError], *words: str, begin=train) -> None:
    with pytest.raises(error) as found:
        begin(config)
    message = str(found.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert not Path(config.out).exists() or not list(Path(config.out).glob("*.safetensors"))


def test_another_model_is_refused_by_identity(pruned_cache, tiny_qwen3_dir, tiny_llama_dir, tmp_path):
    refused(
        settings(pruned_cache, tiny_qwen3_dir, tmp_path / "run"),
        IdentityMismatchError, "model weights", "model configuration",
    )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_another_chat_template_is_refused(pruned_cache, tiny_llama_dir, tmp_path):
    other = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    refused(settings(pruned_cache, other, tmp_path / "run"), IdentityMismatchError, "chat template")


def test_a_teacher_that_only_claims_to_be_this_model_is_refused_by_numbers(
    tiny_llama_dir, tiny_qwen3_dir, tmp_path
):
    """Right identity, wrong logprobs: only the measured KL can tell."""
    cache = write_cache(tmp_path / "c", tiny_qwen3_dir, num_rows=8, identity=identity_of(tiny_llama_dir))
    config = settings(cache, tiny_llama_dir, tmp_path / "run")
    refused(
        config, IdentityMismatchError, "before the first update must be at most 0.02 nats", "Likely causes"
    )
    allowed = dataclasses.replace(config, allow_different_student=True, out=str(tmp_path / "distilled"))
    report = train(allowed)
    assert report.step0["kl"] > 1 and report.step0["different_student"]


def test_rows_shifted_by_one_are_refused_by_numbers(tiny_llama_dir, tmp_path):
    """A builder that is off by one position: every count fits, every number is wrong."""
    from caches import model_logprobs
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    with CacheWriter(tmp_path / "c", identity=identity_of(tiny_llama_dir), vocab_size=1003) as writer:
        for row in random_rows(6, 1003):
            shifted = model_logprobs(model, row.input_ids)[row.positions() + 1]
            writer.append(row, topk_of(shifted, max_k=128, label_ids=row.label_ids()))
    refused(settings(tmp_path / "c", tiny_llama_dir, tmp_path / "run"), IdentityMismatchError, "shifted rows")


def test_attention_across_packed_rows_is_refused_by_numbers(
    tiny_llama_dir, pruned_cache, tmp_path, monkeypatch
):
    """Without the restarting positions rows see each other: the check runs on packed batches and notices."""
    from trainer.data import collator

    monkeypatch.setattr(collator, "MODEL_COLUMNS", ("input_ids", "attention_mask"))
    config = settings(pruned_cache, tiny_llama_dir, tmp_path / "run", "packing=true")
    refused(config, IdentityMismatchError, "before the first update", "cannot pack")


def test_another_vocabulary_is_refused(tiny_llama_dir, tmp_path):
    with CacheWriter(tmp_path / "c", identity=identity_of(tiny_llama_dir), vocab_size=500) as writer:
        for row in random_rows(4, 500):
            count = len(row.positions())
            flat = np.full((count, 500), np.log(1 / 500))
            writer.append(row, topk_of(flat, max_k=4, label_ids=row.label_ids()))
    refused(
        settings(tmp_path / "c", tiny_llama_dir, tmp_path / "run"),
        IdentityMismatchError, "500 tokens", "1003",
    )  # fmt: skip


def test_missing_and_unfinished_caches_are_refused(tiny_llama_dir, pruned_cache, tmp_path):
    refused(settings(tmp_path / "nowhere", tiny_llama_dir, tmp_path / "run"), FormatError, "nowhere")
    unfinished = shutil.copytree(pruned_cache, tmp_path / "unfinished")
    (unfinished / "manifest.json").unlink()
    refused(settings(unfinished, tiny_llama_dir, tmp_path / "run"), IncompleteCacheError)
    missing_eval = settings(pruned_cache, tiny_llama_dir, tmp_path / "run", "eval_caches.a=/nowhere")
    refused(missing_eval, FormatError, "/nowhere")
    assert not (tmp_path / "run").exists()


def test_a_cache_without_teacher_positions_is_refused(tiny_llama_dir, tmp_path):
    from formats.disk.token_row import TokenRow

    rows = [TokenRow(row.input_ids, np.zeros(len(row), bool)) for row in random_rows(4, 1003)]
    cache = write_cache(tmp_path / "c", tiny_llama_dir, rows=rows)
    refused(
        settings(cache, tiny_llama_dir, tmp_path / "run"), ConfigError, "teacher positions", "without any"
    )


def test_models_that_are_none_are_refused(pruned_cache, tiny_llama_dir, tmp_path):
    refused(settings(pruned_cache, tmp_path / "nowhere", tmp_path / "run"), ConfigError, "--model must be")
    refused(
        settings(pruned_cache, tiny_llama_dir, tmp_path / "run", "revision=step9"),
        ConfigError, "got step9 of the directory", "(--model); remove it",
    )  # fmt: skip
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_llama_dir / name, bare)
    refused(settings(pruned_cache, bare, tmp_path / "run"), ConfigError, "must hold its tokenizer")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        ("abc", "attn_implementation must be an attention kernel that works here, got 'abc': "),
        ("flex_attention", "flex_attention needs a GPU to train, got a run on the CPU"),
    ],
)
def test_an_attention_kernel_that_is_none_here_is_refused_by_name(
    kernel, reason, pruned_cache, tiny_llama_dir, tmp_path
):
    words = (f"attn_implementation={kernel}", "training.use_cpu=true")
    refused(settings(pruned_cache, tiny_llama_dir, tmp_path / "run", *words), ConfigError, reason)
    broken = shutil.copytree(tiny_llama_dir, tmp_path / "broken")
    (broken / "config.json").write_text('{"model_type": "nothing-known"}')
    with pytest.raises(ConfigError, match="--model must be a causal language model"):
        load_model(broken, dtype="float32", attn_implementation="sdpa")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("begin", [train, plan_training])
def test_unusable_output_directories_are_refused(begin, pruned_cache, tiny_llama_dir, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    to_other = settings(pruned_cache, tiny_llama_dir, other)
    refused(to_other, ConfigError, "thesis.tex", "choose another", begin=begin)
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]
    file = tmp_path / "file"
    file.write_text("")
    for place in (file, file / "below"):
        refused(settings(pruned_cache, tiny_llama_dir, place), ConfigError, "--out must be", begin=begin)


def test_a_dry_run_knows_the_run_that_is_there(pruned_cache, tiny_llama_dir, tmp_path):
    out = tmp_path / "run"
    saved = ("training.save_strategy=steps", "training.save_steps=1", "keep_checkpoints=true")
    asked = settings(pruned_cache, tiny_llama_dir, out, *saved)
    train(asked)
    refused_dry = partial(refused, begin=plan_training)
    with pytest.raises(ConfigError, match=r"holds a finished run"):
        plan_training(asked)
    record = json.loads((out / "anneal.json").read_text())
    (out / "anneal.json").write_text(json.dumps({**record, "status": "running"}))
    for name in ("model.safetensors", "config.json"):
        (out / name).unlink()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert plan_training(asked).num_steps == 2
    slower = settings(pruned_cache, tiny_llama_dir, out, *saved, "training.learning_rate=1e-4")
    refused_dry(slower, ConfigError, "training.learning_rate")
    another = write_cache(tmp_path / "another", tiny_llama_dir, num_rows=3, seed=5)
    refused_dry(settings(another, tiny_llama_dir, out, *saved), ConfigError, str(another.name))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_run_without_anything_to_train_on_is_refused(tiny_llama_dir, tmp_path):
    """kl_coef 0 and no token that carries loss: every gradient would be 0."""
    from formats.disk.token_row import TokenRow

    rows = [TokenRow(row.input_ids, np.zeros(len(row), bool)) for row in random_rows(4, 1003)]
    cache = write_cache(tmp_path / "c", tiny_llama_dir, rows=rows, positions="all")
    for more in ((), ("ce_weight=stm",)):
        refused(
            settings(cache, tiny_llama_dir, tmp_path / "run", "kl_coef=0", *more),
            ConfigError,
            "needs tokens that carry loss",
        )
    assert not (tmp_path / "run").exists()
    assert train(settings(cache, tiny_llama_dir, tmp_path / "kl")).num_steps == 2
