"""A result is the initial model's directory with other numbers in it: names, dtypes, sizes, files, bytes."""

import json
import shutil

import pytest
import resume_worker
import torch
from caches import write_cache
from processes import run_ranks
from runs import settings
from safetensors.torch import load_file
from saved_bases import BASES, FEW, INVALID, headers, require_same_layout

from trainer import train


@pytest.mark.parametrize("name", list(BASES))
def test_the_result_has_the_layout_of_the_initial_model(base, tmp_path, name):
    from transformers import AutoModelForCausalLM

    model_dir, cache = base(name)
    out = tmp_path / "run"
    train(settings(cache, model_dir, out, *FEW))
    require_same_layout(out, model_dir)
    initial, trained = (AutoModelForCausalLM.from_pretrained(path) for path in (model_dir, out))
    assert trained.dtype == initial.dtype
    before, after = initial.state_dict(), trained.state_dict()
    assert before.keys() == after.keys()
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(moved) > len(before) / 2
    record = json.loads((out / "anneal.json").read_text())
    assert 0 <= record["saved"]["kl_unrounded"] <= record["saved"]["allowed"] < 2e-4


def test_files_that_a_server_needs_come_along(base, tmp_path):
    model_dir, cache = base("with_more")
    out = tmp_path / "run"
    train(settings(cache, model_dir, out, *FEW, "training.save_strategy=steps", "training.save_steps=1"))
    for name in ("modeling_own.py", "LICENSE", "additional_chat_templates/tools.jinja", "tokenizer.json"):
        assert (out / name).read_bytes() == (model_dir / name).read_bytes()
    assert not (out / "consolidated.safetensors.old").exists()
    assert "another card" not in (out / "README.md").read_text()
    kept = load_file(out / "model.safetensors")["model.layers.7.mtp.weight"]
    assert torch.equal(kept, torch.ones(3, 2, dtype=torch.int32))


def test_a_second_stage_starts_from_the_result(base, tmp_path):
    """Full fine-tuning, then merged adapters on top: still the first model's layout."""
    from trainer import MergeConfig, merge

    model_dir, cache = base("tied_bf16")
    first, second = tmp_path / "first", tmp_path / "second"
    train(settings(cache, model_dir, first, *FEW))
    next_cache = write_cache(tmp_path / "cache", first, num_rows=8)
    report = train(settings(next_cache, first, second, *FEW, "lora.r=4", "training.learning_rate=0.05"))
    assert report.step0["kl"] < 1e-6
    require_same_layout(second, model_dir)
    changed = load_file(second / "model.safetensors")
    before = load_file(first / "model.safetensors")
    assert not all(torch.equal(changed[name], before[name]) for name in changed)
    merged = merge(
        MergeConfig(tuned=[str(second)], initial=str(first), out=str(tmp_path / "m"), method="wise-ft")
    )
    require_same_layout(merged.out, model_dir)


def test_sharded_training_writes_the_same_layout(base, tmp_path):
    """FSDP2 on two processes: tied weights are gathered and written once; the proof is made on one of them."""
    for name, words in {
        "tied_bf16": [],
        "sharded": [],
        "fp16": ["lora.r=4", "training.learning_rate=0.05"],
    }.items():
        model_dir, cache = base(name)
        out = tmp_path / name
        quick = ["training.max_steps=2", "training.save_strategy=no", "training.fsdp=true", *words]
        ranks = run_ranks(
            tmp_path / f"{name}-logs", 2, resume_worker.run, str(model_dir), str(cache), str(out), quick
        )
        require_same_layout(out, model_dir)
        told = [rank.text("stderr").count("saved model: right. ") for rank in ranks]
        assert told == [1, 0]


@pytest.mark.parametrize(("name", "dtype"), [("sharded", "float32"), ("fp16", "bfloat16")])
def test_another_dtype_is_asked_for(base, tmp_path, name, dtype):
    """Weights, config.json and the index agree on it."""
    from transformers import AutoModelForCausalLM

    model_dir, cache = base(name)
    train(settings(cache, model_dir, tmp_path / "run", *FEW, f"save_dtype={dtype}"))
    found, initial = headers(tmp_path / "run"), headers(model_dir)
    assert {file: list(table) for file, table in found.items()} == {f: list(t) for f, t in initial.items()}
    assert {entry["dtype"] for table in found.values() for entry in table.values()} == {
        {"float32": "F32", "bfloat16": "BF16"}[dtype]
    }
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert [config[key] for key in ("dtype", "torch_dtype") if key in config] == [dtype]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").dtype == getattr(torch, dtype)
    if name == "sharded":
        index = json.loads((tmp_path / "run" / "model.safetensors.index.json").read_text())
        initial_index = json.loads((model_dir / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == initial_index["weight_map"]
        assert index["metadata"]["total_size"] == 2 * initial_index["metadata"]["total_size"]


def test_weights_in_pickles_become_safetensors_once_each(base, tmp_path):
    model_dir = shutil.copytree(base("tied_bf16")[0], tmp_path / "model")
    content = load_file(model_dir / "model.safetensors")
    torch.save(
        content | {"lm_head.weight": content["model.embed_tokens.weight"]}, model_dir / "pytorch_model.bin"
    )
    (model_dir / "model.safetensors").unlink()
    cache = write_cache(tmp_path / "cache", model_dir, num_rows=8)
    train(settings(cache, model_dir, tmp_path / "run", *FEW))
    found = headers(tmp_path / "run")["model.safetensors"]
    assert found.keys() == content.keys() and {entry["dtype"] for entry in found.values()} == {"BF16"}
    assert not list((tmp_path / "run").glob("*.bin"))


def test_generation_settings_that_transformers_refuses_to_save(base, tmp_path):
    """With checkpoints on the way, each of which saves a generation config."""
    model_dir = shutil.copytree(base("tied_bf16")[0], tmp_path / "model")
    (model_dir / "generation_config.json").write_text(json.dumps(INVALID))
    out = tmp_path / "run"
    steps = ["training.save_strategy=steps", "training.save_steps=1", "keep_checkpoints=true"]
    train(settings(base("tied_bf16")[1], model_dir, out, *FEW, *steps))
    assert json.loads((out / "generation_config.json").read_text()) == INVALID
    assert (out / "checkpoint-2" / "complete.json").is_file()
