"""A saved model that is another one than was trained is not published."""

import json
from pathlib import Path

import pytest
import torch
from runs import settings
from saved_bases import FEW, edit_config, edit_weights

from formats.errors import AnnealError
from trainer import train
from trainer.result import saving


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
