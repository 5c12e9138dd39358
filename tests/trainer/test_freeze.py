"""`freeze`: which parameters stay, that they stay bit for bit, that the others have the gradients they should have, and
what is refused."""

import json
from pathlib import Path

import pytest
import resume_worker
import torch
from caches import write_cache
from dense_retention import distinct_parameters, row_nll
from processes import run_ranks
from runs import settings
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from formats.cache import TeacherCache
from formats.errors import ConfigError
from trainer import train
from trainer.config import TrainConfig
from trainer.data.collator import LabelAnnealingCollator
from trainer.data.dataset import CachedDataset
from trainer.evaluation.recorded_method import method_of
from trainer.loop.output_head import OutputHead
from trainer.preflight.frozen import freeze

HEAD_ONLY = [r"^model\."]
CASES = {
    "head only": HEAD_ONLY,
    "no head": ["lm_head"],
    "no embedding": ["embed_tokens"],
    "layers": [r"layers\.0\.", "norm"],
}


def stored(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def frozen_model(path: Path, patterns: list[str], dtype: torch.dtype = torch.float64):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    freeze(model, patterns, {dtype}, {})
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", list(CASES))
def test_the_others_have_the_gradients_of_a_dense_loop(tiny_llama_dir, llama_cache, case, checkpointing):
    """In float64, through our loss, against autograd over full logits; frozen parameters have none."""
    cache = TeacherCache(llama_cache)
    model = frozen_model(tiny_llama_dir, CASES[case])
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    batch = LabelAnnealingCollator(0)([CachedDataset(cache, loss="ce")[row] for row in range(4)])
    OutputHead.of(model).install().loss(model, batch, num_ce=1.0).loss.backward()

    dense = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float64)
    torch.stack([row_nll(dense, cache[row])[0] for row in range(4)]).sum().backward()
    wanted, found = distinct_parameters(dense), distinct_parameters(model)
    trained = [name for name, parameter in found.items() if parameter.requires_grad]
    assert 0 < len(trained) < len(found)
    for name, parameter in found.items():
        if name in trained:
            torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-9, atol=1e-12)
            assert float(wanted[name].grad.abs().max()) > 1e-6
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_tensors_come_back_bit_for_bit(tiny_llama_dir, pruned_cache, tmp_path, dtype, capsys):
    """With weight decay and label annealing, stored in float32 or bfloat16; all others move. Record, card and note."""
    base = tiny_llama_dir
    if dtype == "bfloat16":
        base = tmp_path / "base"
        AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.bfloat16).save_pretrained(base)
        for path in tiny_llama_dir.glob("*token*"):
            (base / path.name).write_bytes(path.read_bytes())
        pruned_cache = write_cache(tmp_path / "cache", base, num_rows=16)
    out = tmp_path / "run"
    words = [
        "freeze=[embed_tokens, 'layers\\.0\\.mlp']",
        "training.weight_decay=0.1",
        "training.learning_rate=5e-2",
    ]
    train(settings(pruned_cache, base, out, *words))
    initial, found = stored(base), stored(out)
    kept = [name for name in initial if "embed_tokens" in name or "layers.0.mlp" in name]
    assert len(kept) == 4
    for name, tensor in initial.items():
        assert found[name].dtype == tensor.dtype == getattr(torch, dtype)
        assert torch.equal(found[name], tensor) == (name in kept), name
    record = json.loads((out / "anneal.json").read_text())["frozen"]
    weights = sum(initial[name].numel() for name in kept)
    assert record["num_tensors"] == 4 and record["num_weights"] == weights
    assert record["of_weights"] == sum(tensor.numel() for tensor in initial.values())
    assert record["patterns"] == ["embed_tokens", r"layers\.0\.mlp"]
    assert "freeze: 4 tensors, " in capsys.readouterr().err
    assert "`embed_tokens`" in (out / "README.md").read_text()
    method = method_of(out)
    assert method is not None and r"freeze embed_tokens,layers\.0\.mlp" in method.text()


def test_head_first_then_everything(tiny_llama_dir, pruned_cache, tmp_path):
    """LP-FT: the first run moves the output head alone, the second starts from it and moves the rest, too. Penalties
    hold what is trained."""
    first, second = tmp_path / "head", tmp_path / "all"
    report = train(
        settings(pruned_cache, tiny_llama_dir, first, "freeze='^model\\.'", "kl_coef=0", "l2.coef=0.5")
    )
    assert report.log_history[1]["l2"] > 0
    moved = [
        name
        for name, tensor in stored(first).items()
        if not torch.equal(tensor, stored(tiny_llama_dir)[name])
    ]
    assert moved == ["lm_head.weight"]
    train(settings(pruned_cache, first, second, "kl_coef=0"))
    assert all(not torch.equal(tensor, stored(first)[name]) for name, tensor in stored(second).items())


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_leave_frozen_tensors_as_they_are(tiny_llama_dir, pruned_cache, tmp_path, fsdp):
    words = ["freeze=[embed_tokens, 'layers\\.0\\.']", *(["training.fsdp=true"] if fsdp else [])]
    out = tmp_path / "run"
    run_ranks(
        tmp_path / "logs", 2, resume_worker.run, str(tiny_llama_dir), str(pruned_cache), str(out), words
    )
    initial, found = stored(tiny_llama_dir), stored(out)
    for name, tensor in initial.items():
        assert torch.equal(found[name], tensor) == ("embed_tokens" in name or "layers.0." in name), name


def test_a_tied_weight_is_frozen_by_any_of_its_names(tiny_gemma2_dir, tmp_path):
    for pattern in ("lm_head", "embed_tokens"):
        model = frozen_model(tiny_gemma2_dir, [pattern], torch.float32)
        assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
            "model.embed_tokens.weight"
        ]
        assert not model.lm_head.weight.requires_grad
    with pytest.raises(
        ConfigError, match=r"match all \(model.embed_tokens.weight and lm_head.weight are one tied"
    ):
        frozen_model(tiny_gemma2_dir, HEAD_ONLY, torch.float32)
    cache = write_cache(tmp_path / "cache", tiny_gemma2_dir, num_rows=16)
    train(settings(cache, tiny_gemma2_dir, tmp_path / "run", "freeze=lm_head"))
    initial, found = stored(tiny_gemma2_dir), stored(tmp_path / "run")
    assert initial.keys() == found.keys() and "lm_head.weight" not in found
    same = {name for name in initial if torch.equal(initial[name], found[name])}
    assert same == {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["freeze=['embed_tokens', 'layerz']"],
            "freeze must match names of parameters, got 'layerz', which matches none",
        ),
        (["freeze='.'"], "freeze must leave something to train, got ['.'], which match all"),
        (["freeze='layers.(0'"], "freeze must hold regular expressions, got 'layers.(0'"),
        (["freeze=3"], "freeze must be a text or a list of texts, got 3"),
        (["freeze=lm_head", "lora.r=2"], "freeze needs full fine-tuning, got lora"),
        (
            ["freeze=lm_head", "dtype=bfloat16"],
            "got dtype: bfloat16 for weights in float32; use dtype: float32",
        ),
        (
            [
                "freeze=embed_tokens",
                "training.gradient_checkpointing=true",
                "training.gradient_checkpointing_kwargs={use_reentrant: true}",
            ],
            "freeze needs gradient checkpointing that is not reentrant",
        ),
    ],
)
def test_what_cannot_be_frozen_is_refused_in_one_line(tiny_llama_dir, pruned_cache, tmp_path, words, message):
    with pytest.raises(ConfigError) as error:
        train(settings(pruned_cache, tiny_llama_dir, tmp_path / "run", *words))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_setting_is_a_list_or_one_text_or_nothing():
    options = {"cache": "c", "model": "m", "out": "o"}
    assert TrainConfig(**options).freeze == TrainConfig(**options, freeze=None).freeze == ()
    assert TrainConfig(**options, freeze="a").freeze == TrainConfig(**options, freeze=["a"]).freeze == ("a",)
    assert TrainConfig(**options, freeze=["a"]).to_dict()["freeze"] == ["a"]
