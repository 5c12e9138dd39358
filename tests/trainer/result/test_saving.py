"""A result is the initial model's directory with other numbers in it: names, dtypes, sizes, files, bytes."""

import json
import shutil
from pathlib import Path

import pytest
import resume_worker
import torch
from caches import write_cache
from processes import run_ranks
from runs import settings
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model, widen

from formats.errors import AnnealError, ConfigError
from formats.identity.tensor_hash import read_header
from trainer import evaluate, train
from trainer.result import saving

FEW = ["training.max_steps=2", "training.learning_rate=5e-3"]
INVALID = {"do_sample": False, "temperature": 0.7, "eos_token_id": 2, "pad_token_id": 0}
"""What transformers loads with a warning and refuses to save."""


def edit_config(path: Path, **changes) -> Path:
    config = json.loads((path / "config.json").read_text())
    config = {key: value for key, value in (config | changes).items() if value is not None}
    (path / "config.json").write_text(json.dumps(config, indent=1))
    return path


def edit_weights(path: Path, change) -> Path:
    content = change(load_file(path / "model.safetensors"))
    save_file(content, path / "model.safetensors", metadata={"format": "pt"})
    return path


def tied_bf16(path: Path, tokenizer: Path) -> Path:
    return save_tiny_model(path, "llama", tokenizer, dtype="bfloat16", tie_word_embeddings=True)


def sharded(path: Path, tokenizer: Path) -> Path:
    from transformers import AutoModelForCausalLM

    whole = tied_bf16(path / "whole", tokenizer)
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(path / "parts", max_shard_size="200KB")
    for file in whole.glob("*token*"):
        shutil.copy(file, path / "parts")
    return path / "parts"


def fp16(path: Path, tokenizer: Path) -> Path:
    save_tiny_model(path, "llama", tokenizer, dtype="float16")
    return edit_config(path, dtype=None, torch_dtype="float16")


def mixed(path: Path, tokenizer: Path) -> Path:
    """Norms in float32, the rest in bfloat16; and config.json does not say."""
    save_tiny_model(path, "qwen3", tokenizer, dtype="bfloat16")
    edit_weights(path, lambda found: {n: t.float() if t.ndim == 1 else t for n, t in found.items()})
    return edit_config(path, dtype=None, use_cache=False)


def stored_twice(path: Path, tokenizer: Path) -> Path:
    """Tied, and written by a saver that writes both."""
    tied_bf16(path, tokenizer)
    name = "model.embed_tokens.weight"
    return edit_weights(path, lambda found: found | {"lm_head.weight": found[name].clone()})


def with_more(path: Path, tokenizer: Path) -> Path:
    """What servers and people need beside the weights, a tensor that transformers does not load, settings
    that it does not save, and files that are not to be carried on."""
    tied_bf16(path, tokenizer)
    edit_weights(
        path, lambda found: found | {"model.layers.7.mtp.weight": torch.ones(3, 2, dtype=torch.int32)}
    )
    edit_config(path, auto_map={"AutoModelForCausalLM": "modeling_own.Own"}, temperature=0.3)
    (path / "modeling_own.py").write_text("raise RuntimeError('never run')\n")
    (path / "LICENSE").write_text("use it well")
    (path / "preprocessor_config.json").write_text("{}")
    (path / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tools.jinja").write_text("{{ messages[0]['content'] }}")
    (path / "generation_config.json").write_text(json.dumps(INVALID))
    (path / "README.md").write_text("another card")
    (path / "consolidated.safetensors.old").write_bytes(b"weights in another format")
    return path


def experts(path: Path, tokenizer: Path) -> Path:
    """A mixture of experts, whose matrices lie apart on the disk and together in memory."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=1003, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, pad_token_id=0, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    widen(model, 0)
    model.to(torch.bfloat16).save_pretrained(path)
    for file in tokenizer.iterdir():
        shutil.copy(file, path)
    return path


BASES = {f.__name__: f for f in (tied_bf16, sharded, fp16, mixed, stored_twice, with_more, experts)}


@pytest.fixture(scope="module")
def base(tiny_tokenizer_dir, tmp_path_factory):
    """Name -> (model directory, a cache of it), made when first asked for."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = BASES[name](folder / "model", tiny_tokenizer_dir)
            made[name] = model, write_cache(folder / "cache", model, num_rows=12, min_prob=1e-3, max_k=64)
        return made[name]

    return get


def headers(path: Path) -> dict[str, dict]:
    """File -> tensor -> dtype, shape, place."""
    return {file.name: read_header(file)[0] for file in sorted(path.glob("*.safetensors"))}


def require_same_layout(result: Path, initial: Path) -> None:
    assert headers(result) == headers(initial)
    for file in initial.glob("*.safetensors"):
        assert (result / file.name).stat().st_size == file.stat().st_size
    for file in initial.glob("*.json"):
        assert (result / file.name).read_bytes() == file.read_bytes(), file.name


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


# --- refused before the first step ------------------------------------------------------------------


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


# --- the proof of the saved model -------------------------------------------------------------------


@pytest.fixture
def spoil(monkeypatch):
    """Change the directory between saving and the proof, as a wrong writer would."""
    from trainer import run

    save = run.save_result

    def arrange(change) -> None:
        def saved(trainer, target, *args):
            written = save(trainer, target, *args)
            if change is not None:
                change(target)
            return written

        monkeypatch.setattr(run, "save_result", saved)

    return arrange


def halve(target: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    edit_weights(target, lambda found: found | {name: found[name] * 0.5})


def exchange(target: Path) -> None:
    """Two matrices of one shape under each other's names."""
    one, two = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    edit_weights(target, lambda found: found | {one: found[two], two: found[one]})


def other_positions(target: Path) -> None:
    edit_config(target, rope_parameters={"rope_theta": 20000.0, "rope_type": "default"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (halve, "must be the trained ones in bfloat16, got others for model.layers.1.mlp.down_proj.weight"),
        (exchange, "got others for model.layers.0.mlp.up_proj.weight"),
        (other_positions, "must compute what the trained one does, got KL(trained || saved) = "),
    ],
)
def test_a_saved_model_that_is_another_one_is_not_published(base, tmp_path, spoil, change, message):
    model_dir, cache = base("tied_bf16")
    out = tmp_path / "run"
    steps = ["training.save_strategy=steps", "training.save_steps=1"]
    config = settings(cache, model_dir, out, *FEW, *steps)
    spoil(change)
    with pytest.raises(AnnealError) as error:
        train(config)
    told = str(error.value)
    assert "\n" not in told and message in told and str(out / "unpublished") in told
    assert (out / "unpublished" / "model.safetensors").is_file() and not (out / "config.json").exists()
    assert json.loads((out / "anneal.json").read_text())["status"] == "running"
    spoil(None)
    report = train(config)
    assert report.resumed_from == 2 and (out / "config.json").is_file()
    assert not (out / "unpublished").exists() and not list(out.glob(".*"))


def test_without_the_proof_anything_is_published(base, tmp_path, spoil):
    model_dir, cache = base("tied_bf16")
    spoil(halve)
    train(settings(cache, model_dir, tmp_path / "run", *FEW, "verify_saved=false"))
    record = json.loads((tmp_path / "run" / "anneal.json").read_text())
    assert record["status"] == "complete" and "saved" not in record


def test_a_saved_model_that_does_not_load_is_not_published(base, tmp_path, spoil):
    model_dir, cache = base("fp16")
    spoil(lambda target: edit_weights(target, lambda f: f | {"model.norm.weight": torch.ones(3)}))
    with pytest.raises(AnnealError, match=r"saved model must load.*unpublished"):
        train(settings(cache, model_dir, tmp_path / "run", *FEW))
    assert not (tmp_path / "run" / "config.json").exists()


def test_adapters_merged_wrongly_are_not_published(base, tmp_path, monkeypatch):
    """Every weight is what the merge says; only the live model knows that the merge is wrong."""
    merge_adapters = saving.merge_adapters

    def merged_twice(model_dir, adapter):
        model = merge_adapters(model_dir, adapter)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.02)
        return model

    monkeypatch.setattr(saving, "merge_adapters", merged_twice)
    model_dir, cache = base("fp16")
    with pytest.raises(AnnealError, match="must compute what the trained one does"):
        train(settings(cache, model_dir, tmp_path / "run", *FEW, "lora.r=4"))


def test_updates_that_rounding_swallows_are_told_and_published(base, tmp_path, capsys):
    """Four steps in one direction, each below half a unit in the last place of bfloat16: the saved model has lost
    most of them. That costs more than noise may, and is no mistake of the saver."""
    model_dir, cache = base("tied_bf16")
    few = ["training.max_steps=4", "training.learning_rate=2e-4", "training.lr_scheduler_type=constant"]
    train(settings(cache, model_dir, tmp_path / "run", *few))
    saved = json.loads((tmp_path / "run" / "anneal.json").read_text())["saved"]
    assert saved["kl_unrounded"] < 1e-6 and saved["kl"] > 3 * saved["allowed"]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("saved model: ")]
    assert len(told) == 1 and "rounded to the dtype that it is saved in, which costs KL" in told[0]
    assert f"without rounding {saved['kl_unrounded']:.2e}, up to {saved['allowed']:.2e} is noise" in told[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("arithmetic", [torch.float32, torch.bfloat16])
def test_the_proof_lets_noise_pass_and_little_more(tiny_llama_dir, tmp_path, dtype, arithmetic):
    """A live model that computes in bfloat16 passes; with one matrix of 15 changed by a few percent it does not,
    and neither does a file in which one weight is the next number."""
    from transformers import AutoModelForCausalLM

    from trainer.result.verify_saved import LivePredictions, check_saved, logprobs_of

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(6, 1003, (length,), generator=generator).tolist() for length in (128, 100, 28)]
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def live(factor: float) -> LivePredictions:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(factor)
        with torch.autocast("cpu", arithmetic, enabled=arithmetic != torch.float32):
            logprobs = [logprobs_of(model, row, torch.device("cpu")) for row in rows]
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.div_(factor)
        return LivePredictions(rows, logprobs, arithmetic)

    path = tmp_path / "saved"
    AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=dtype).save_pretrained(path)
    good = check_saved(live(1.0), path, trained, [dtype])
    good.require_passed()
    assert good.num_tokens == 253 and 0 <= good.kl_unrounded < good.allowed / 5
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in trained.items())
    with pytest.raises(AnnealError, match="must compute what the trained one does"):
        check_saved(
            live(1.02 if arithmetic == torch.float32 else 1.15), path, trained, [dtype]
        ).require_passed()

    def next_number(found):
        norm = found["model.norm.weight"].clone()
        norm.view(torch.int32 if dtype == torch.float32 else torch.int16)[5] += 1
        return found | {"model.norm.weight": norm}

    edit_weights(path, next_number)
    with pytest.raises(AnnealError, match=r"got others for model.norm.weight"):
        check_saved(live(1.0), path, trained, [dtype])


@pytest.mark.parametrize(
    ("kl", "kl_unrounded", "passes"),
    [
        (0.02, 0.001, True),  # rounding costs something, and nothing else is wrong
        (9e-4, 0.0746, True),  # the live model rounds its weights in every step: the rounded ones are its own
        (0.02, 0.02, False),
        (float("nan"), float("nan"), False),
    ],
)
def test_the_saved_model_is_the_trained_one_with_or_without_its_rounding(kl, kl_unrounded, passes):
    from trainer.result.verify_saved import SavedCheck

    found = SavedCheck(kl=kl, kl_unrounded=kl_unrounded, allowed=0.007, ce=(3.944, 3.949), num_tokens=251)
    if passes:
        found.require_passed()
        assert found.line().startswith("saved model: right. Loaded again, it ")
        assert ("rounded to the dtype that it is saved in" in found.line()) == (kl > found.allowed)
    else:
        with pytest.raises(AnnealError, match="must compute what the trained one does"):
            found.require_passed()


def test_infinite_weights_are_not_published(base, tmp_path):
    """A float16 result of weights beyond its range."""
    from transformers import AutoModelForCausalLM

    from trainer.result.saving import ResultLayout

    model_dir, _ = base("tied_bf16")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    layout = ResultLayout.of(model, model_dir, "float16")
    with torch.no_grad():
        model.model.norm.weight[3] = 1e6
    with pytest.raises(
        AnnealError, match=r"must be finite, got infinity or NaN in model.norm.weight as torch.float16"
    ):
        layout.write(model, model.state_dict(), tmp_path)


def test_adapters_start_from_the_seed_and_nothing_else(tiny_llama_dir):
    from transformers import AutoModelForCausalLM

    from trainer.config import LoraSettings
    from trainer.result.lora import attach_adapters

    def started(seed: int) -> torch.Tensor:
        torch.rand(seed + 1)  # what the process did before must not matter
        model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
        adapted = attach_adapters(model, LoraSettings(r=4), seed)
        return torch.cat([p.flatten() for name, p in adapted.named_parameters() if "lora_A" in name]).detach()

    before = torch.random.get_rng_state()
    assert torch.equal(started(3), started(3)) and not torch.equal(started(3), started(4))
    torch.random.set_rng_state(before)
    attach_adapters(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), LoraSettings(r=4), 5)
    assert torch.equal(torch.random.get_rng_state(), before)
