"""`anneal merge`: values against hand computations, layouts on the disk, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from caches import identity_of
from runs import copy_model, noise, settings
from safetensors.torch import load_file, save_file

from formats.errors import AnnealError, ConfigError, IdentityMismatchError
from trainer import MergeConfig, evaluate, merge, train
from trainer.merging.methods import ties_of
from trainer.merging.settings import setting_text


def tensors(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def ties_by_hand(vectors: list[np.ndarray], density: float) -> np.ndarray:
    """Trim, elect, disjoint mean, entry by entry in plain Python."""
    trimmed = []
    for vector in vectors:
        flat = vector.reshape(-1)
        keep = np.argsort(-np.abs(flat), kind="stable")[: int(density * flat.size)]
        kept = np.zeros_like(flat)
        kept[keep] = flat[keep]
        trimmed.append(kept)
    merged = []
    for entries in zip(*trimmed, strict=True):
        sign = 1 if sum(entries) >= 0 else -1
        agreeing = [value for value in entries if value * sign > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return np.asarray(merged).reshape(vectors[0].shape)


def test_ties_of_three_small_vectors():
    """Half of four entries are kept. Entry 0: only the first keeps 3. Entry 1: -2 and -4 against 5: the sum
    is -1, so minus, mean -3. Entry 2: nobody keeps it. Entry 3: 1.5 and 2.5 agree, mean 2."""
    vectors = [
        torch.tensor([3.0, -2.0, 0.1, 0.2]),
        torch.tensor([0.1, -4.0, 0.2, 1.5]),
        torch.tensor([0.3, 5.0, -0.4, 2.5]),
    ]
    assert ties_of(vectors, 0.5).tolist() == [3.0, -3.0, 0.0, 2.0]
    hand = ties_by_hand([v.numpy() for v in vectors], 0.5)
    assert hand.tolist() == [3.0, -3.0, 0.0, 2.0]
    assert ties_of(vectors, 1.0).tolist() == pytest.approx(
        ties_by_hand([v.numpy() for v in vectors], 1.0).tolist()
    )


CASES = {
    "wise-ft": ({"alpha": 0.3}, lambda t0, ts: 0.7 * t0 + 0.3 * ts[0]),
    "task-arithmetic": ({"scale": 0.4}, lambda t0, ts: t0 + 0.4 * sum(t - t0 for t in ts)),
    "ties": (
        {"scale": 0.8, "density": 0.25, "trim": "tensor"},
        lambda t0, ts: t0 + 0.8 * ties_by_hand([t - t0 for t in ts], 0.25),
    ),
}


@pytest.mark.parametrize("method", list(CASES))
def test_every_tensor_equals_the_hand_computation(models, tmp_path, method):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    strengths, by_hand = CASES[method]
    tuned = [models["a"]] if method == "wise-ft" else [models["a"], models["b"]]
    report = merge(
        MergeConfig(
            tuned=[str(path) for path in tuned],
            initial=str(models["initial"]),
            out=str(tmp_path / "deep" / "out"),
            method=method,
            **strengths,
        )
    )
    assert report.seconds > 0
    line = dataclasses.replace(report, seconds=61.6).line()
    number = "1 model" if len(tuned) == 1 else f"{len(tuned)} models"
    assert line == f"merged {number}, {report.num_tensors} tensors in 62 s; model in {report.out}"
    initial, found = tensors(models["initial"]), tensors(report.out)
    assert found.keys() == initial.keys() and report.num_tensors == len(initial)
    for name, tensor in initial.items():
        wanted = by_hand(tensor.numpy(), [tensors(path)[name].numpy() for path in tuned])
        np.testing.assert_allclose(found[name].numpy(), wanted, rtol=1e-5, atol=1e-6)
    model = AutoModelForCausalLM.from_pretrained(report.out)
    assert torch.equal(model.state_dict()["model.norm.weight"], found["model.norm.weight"])
    assert AutoTokenizer.from_pretrained(report.out)("def f(x):")["input_ids"]
    record = json.loads((report.out / "anneal.json").read_text())
    teacher = identity_of(models["initial"])["teacher"]
    assert {key: record["identity"]["teacher"][key] for key in teacher} == teacher
    assert record["merge"]["method"] == method and record["merge"].items() >= strengths.items()
    card = (report.out / "README.md").read_text()
    assert str(models["a"]) in card and all(
        f"| {name} | {setting_text(value)} |" in card for name, value in strengths.items()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def merged(models: dict, out: Path, *tuned: Path, initial: Path | None = None, **options):
    options = {"method": "task-arithmetic"} | options
    words = [str(path) for path in tuned or (models["a"],)]
    return merge(MergeConfig(tuned=words, initial=str(initial or models["initial"]), out=str(out), **options))


def test_ends_of_the_scale(models, tmp_path):
    """alpha 0 and scale 0 give the initial model bit for bit, alpha 1 the tuned one."""
    for name, options in (("w", {"method": "wise-ft", "alpha": 0.0}), ("s", {"scale": 0.0})):
        merged(models, tmp_path / name, **options)
        assert (tmp_path / name / "model.safetensors").read_bytes() == (
            models["initial"] / "model.safetensors"
        ).read_bytes()
    merged(models, tmp_path / "one", method="wise-ft", alpha=1.0)
    mine, tuned = tensors(tmp_path / "one"), tensors(models["a"])
    assert all(torch.equal(mine[name], tuned[name]) for name in mine)


def test_shards_and_dtypes_are_those_of_the_initial_model(models, tmp_path):
    """A sharded bfloat16 model and a whole float32 one: computed in float32, rounded once."""
    from transformers import AutoModelForCausalLM

    half = AutoModelForCausalLM.from_pretrained(models["initial"], dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half", max_shard_size="200KB")
    for path in models["initial"].glob("*token*"):
        shutil.copy(path, tmp_path / "half" / path.name)
    names = sorted(path.name for path in (tmp_path / "half").glob("model*"))
    assert len(names) > 2
    report = merged(models, tmp_path / "out", initial=tmp_path / "half", scale=0.3)
    assert sorted(path.name for path in report.out.glob("model*")) == names
    initial, tuned, found = tensors(tmp_path / "half"), tensors(models["a"]), tensors(report.out)
    for name, tensor in found.items():
        wanted = initial[name].float() + 0.3 * (tuned[name] - initial[name].float())
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, wanted.to(torch.bfloat16))
    assert AutoModelForCausalLM.from_pretrained(report.out).dtype == torch.bfloat16
    # The other way round: the tuned model is the sharded one.
    back = merged(models, tmp_path / "back", tmp_path / "half", scale=1.0)
    assert [path.name for path in back.out.glob("model*")] == ["model.safetensors"]


def test_tied_weights_may_be_stored_once_or_twice(tiny_gemma2_dir, tmp_path):
    once, tuned = tiny_gemma2_dir, copy_model(tiny_gemma2_dir, tmp_path / "tuned", noise(3))
    assert "lm_head.weight" not in tensors(once)

    def twice(source: Path, target: Path) -> Path:
        shutil.copytree(source, target)
        content = load_file(source / "model.safetensors")
        content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()
        save_file(content, target / "model.safetensors", metadata={"format": "pt"})
        return target

    both = {"once": once, "twice": twice(once, tmp_path / "initial-twice")}
    tuned_both = {"once": tuned, "twice": twice(tuned, tmp_path / "tuned-twice")}
    results = {}
    for a, initial in both.items():
        for b, path in tuned_both.items():
            report = merged({}, tmp_path / f"{a}-{b}", path, initial=initial, scale=0.5)
            results[a, b] = tensors(report.out)
    assert "lm_head.weight" not in results["once", "twice"] and "lm_head.weight" in results["twice", "once"]
    for found in results.values():
        for name, tensor in results["once", "once"].items():
            assert torch.equal(found[name], tensor)
        if "lm_head.weight" in found:
            assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


def test_a_trained_model_merges_and_is_evaluated_like_one(
    tiny_llama_dir, tiny_qwen3_dir, pruned_cache, llama_eval_cache, tmp_path
):
    """The record of the initial model is checked on the way in, and kept on the way out."""
    from caches import write_cache

    train(settings(pruned_cache, tiny_llama_dir, tmp_path / "tuned", "kl_coef=0"))
    models = {"initial": tiny_llama_dir, "a": tmp_path / "tuned"}
    report = merged(models, tmp_path / "out", method="wise-ft")
    kls = [
        evaluate(path, {"held-out": str(llama_eval_cache)})["held-out"]["kl"]
        for path in (tiny_llama_dir, report.out, tmp_path / "tuned")
    ]
    assert kls[0] < 1e-6 < kls[1] < kls[2]
    other = copy_model(tiny_llama_dir, tmp_path / "other", noise(9))
    with pytest.raises(IdentityMismatchError, match="was trained from other weights"):
        merged(models, tmp_path / "no", initial=other)
    assert not (tmp_path / "no").exists()
    unrelated = write_cache(tmp_path / "unrelated", other, num_rows=2)
    with pytest.raises(IdentityMismatchError, match="needs a cache of the initial model"):
        evaluate(report.out, {"x": str(unrelated)})


def rename_tensor(path: Path, old: str, new: str | None = None, tensor: torch.Tensor | None = None) -> Path:
    """Rename, replace (new = old) or drop (new = None) one tensor of a model's file."""
    content = load_file(path / "model.safetensors")
    taken = content.pop(old)
    if new is not None:
        content[new] = taken if tensor is None else tensor
    save_file(content, path / "model.safetensors", metadata={"format": "pt"})
    return path


def broken(kind: str, models: dict, tiny_qwen3_dir: Path, tmp_path: Path) -> Path:
    """A tuned model that must be refused."""
    path = tmp_path / "tuned"
    shutil.copytree(models["a"], path)
    norm = "model.norm.weight"
    if kind == "missing":
        rename_tensor(path, norm)
    elif kind == "extra":
        content = load_file(path / "model.safetensors")
        save_file(
            content | {"model.extra": torch.ones(3)}, path / "model.safetensors", metadata={"format": "pt"}
        )
    elif kind == "shape":
        rename_tensor(path, norm, norm, torch.ones(7))
    elif kind == "nan":
        size = len(load_file(path / "model.safetensors")[norm])
        rename_tensor(path, norm, norm, torch.full((size,), float("nan")))
    elif kind == "other":
        return tiny_qwen3_dir
    elif kind == "adapters":
        (path / "config.json").unlink()
        (path / "adapter_config.json").write_text("{}")
    elif kind == "unfinished":
        (path / "config.json").unlink()
    elif kind == "quantised":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    elif kind == "list":
        (path / "config.json").write_text("[]")
    elif kind == "pickled":
        (path / "model.safetensors").rename(path / "pytorch_model.bin")
    elif kind == "torn":
        data = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(data[:-10])
    elif kind == "tokenizer":
        content = json.loads((path / "tokenizer.json").read_text())
        vocabulary = content["model"]["vocab"]
        first, second = list(vocabulary)[300:302]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        (path / "tokenizer.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "without model.norm.weight"),
        ("extra", "got model.extra in"),
        ("shape", "got [7] for model.norm.weight"),
        ("nan", "must be finite, got infinity or NaN in model.norm.weight"),
        ("other", "tuned models must have the"),
        ("adapters", "got adapters alone"),
        ("unfinished", "got no config.json"),
        ("quantised", "TUNED must have plain weights"),
        ("list", "config.json must be a JSON object, got "),
        ("pickled", "a merge reads safetensors"),
        ("torn", "cut short"),
        ("tokenizer", "got another vocabulary"),
    ],
)
def test_models_that_do_not_belong_are_refused_in_one_line(models, tiny_qwen3_dir, tmp_path, kind, message):
    tuned = broken(kind, models, tiny_qwen3_dir, tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(AnnealError) as error:
        merged(models, tmp_path / "new" / "out", tuned)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "broth"}, "--method must be one of wise-ft, task-arithmetic, ties, soup, fisher"),
        ({"method": "wise-ft", "alpha": 2.0}, "--alpha must lie in [0, 1.5], got 2"),
        ({"method": "wise-ft", "scale": 0.5}, "wise-ft has no --scale, got 0.5; it takes --alpha"),
        ({"method": "ties", "density": 0.0}, "--density must be above 0"),
        ({"method": "ties", "alpha": 0.5}, "ties has no --alpha"),
        ({"method": "wise-ft", "tuned": ["a", "b"]}, "wise-ft merges one tuned model, got 2"),
        ({"method": "ties", "tuned": []}, "a merge needs a tuned model"),
        ({"method": "ties", "tuned": ["nowhere/at/all"]}, "TUNED must be a model directory"),
    ],
)
def test_bad_settings_are_refused_in_one_line(models, tmp_path, options, message):
    with pytest.raises(ConfigError) as error:
        merge(
            MergeConfig(
                **{"tuned": [str(models["a"])], "initial": str(models["initial"]), "out": str(tmp_path / "o")}
                | options
            )
        )
    assert message in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_revision_of_a_directory_is_refused(models, tmp_path):
    given = {"initial": str(models["initial"]), "out": str(tmp_path / "out"), "method": "soup"}
    with pytest.raises(ConfigError, match=r"got v1 of the directory .* \(--initial\)"):
        merge(MergeConfig(tuned=[str(models["initial"])], revision="v1", **given))


def test_ties_without_peft_says_how_to_install_it(models, tmp_path, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "peft"] + ["peft"]:
        monkeypatch.setitem(sys.modules, name, None)  # what an import finds where it is not installed
    with pytest.raises(ConfigError, match=r"ties needs peft, .* pip install 'label-annealing\[lora\]'"):
        merged(models, tmp_path / "out", method="ties")
    assert list(tmp_path.iterdir()) == []
    merged(models, tmp_path / "out", method="task-arithmetic")


def test_an_output_directory_is_new_or_empty(models, tmp_path):
    full, empty = tmp_path / "full", tmp_path / "empty"
    for path in (full, empty):
        path.mkdir()
    (full / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(ConfigError, match=r"must be new or empty, got .*cat.jpg"):
        merged(models, full)
    assert (full / "cat.jpg").read_bytes() == b"meow"
    (tmp_path / ".empty.merge.staging").mkdir()  # of a merge that was killed
    (tmp_path / ".empty.merge.staging" / "model.safetensors").touch()
    merged(models, empty)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]
    assert (empty / "config.json").is_file()


def test_two_merges_into_one_directory_are_refused(tmp_path):
    """The second one leaves what the first one writes, which gets its place."""
    from trainer.merging.merge_models import staged

    out = tmp_path / "new" / "out"
    with staged(out) as first:
        (first / "model.safetensors").write_text("whole")
        with pytest.raises(ConfigError, match="in which another one is under way"), staged(out):
            pass
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("model.safetensors", "whole")]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
