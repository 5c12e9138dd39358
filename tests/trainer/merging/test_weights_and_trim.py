"""Weights per model, TIES over a whole model, and WiSE-FT beyond the tuned model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from recorded_progress import RecordedProgress
from runs import copy_model, noise, same_weights
from safetensors.torch import load_file, save_file

from formats.progress import Progress
from trainer import MergeConfig, merge
from trainer.evaluation.recorded_method import method_of
from trainer.merging.trim import WholeModelTrim
from trainer.merging.weights import open_safetensors, tied_names


def merged(models: dict, out: Path, method: str, *, progress: Progress | None = None, **options) -> Path:
    tuned = options.pop("tuned", None) or [models["a"], models["b"]]
    config = MergeConfig(
        tuned=[str(path) for path in tuned],
        initial=str(models["initial"]),
        out=str(out),
        method=method,
        **options,
    )
    return merge(config, progress).out


def stored(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


# --- weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("task-arithmetic", {}),
        ("ties", {"density": 1.0}),
        ("ties", {"density": 1.0, "trim": "tensor"}),
    ],
)
def test_weights_at_their_ends(models, tmp_path, method, options):
    """[1, 0] is the first model, [0, 0] the initial one, and halves are scale 0.5, bit for bit."""
    first = merged(models, tmp_path / "first", method, weights=[1, 0], **options)
    assert same_weights(first, models["a"]) and not same_weights(first, models["b"])
    assert same_weights(merged(models, tmp_path / "second", method, weights=[0, 1], **options), models["b"])
    nothing = merged(models, tmp_path / "nothing", method, weights=[0, 0], **options)
    assert same_weights(nothing, models["initial"])
    halves = merged(models, tmp_path / "halves", method, weights=[0.5, 0.5], **options)
    scaled = merged(models, tmp_path / "scaled", method, scale=0.5, **options)
    assert (halves / "model.safetensors").read_bytes() == (scaled / "model.safetensors").read_bytes()


@pytest.mark.parametrize("trim", ["model", "tensor"])
def test_halves_are_a_scale_of_a_half_where_ties_trims(models, tmp_path, trim):
    options = {"density": 0.3, "trim": trim}
    halves = merged(models, tmp_path / "halves", "ties", weights=[0.5, 0.5], **options)
    scaled = merged(models, tmp_path / "scaled", "ties", scale=0.5, **options)
    assert (halves / "model.safetensors").read_bytes() == (scaled / "model.safetensors").read_bytes()
    alone = merged(models, tmp_path / "alone", "ties", weights=[1, 0], **options)
    one = merged(models, tmp_path / "one", "ties", tuned=[models["a"]], **options)
    assert same_weights(alone, one)  # a model of weight 0 has no say in signs or means


def test_weights_equal_the_hand_computation_and_are_recorded(models, tmp_path):
    out = merged(models, tmp_path / "out", "task-arithmetic", weights=[0.75, -0.25], scale=2.0)
    initial, a, b, found = (stored(path) for path in (models["initial"], models["a"], models["b"], out))
    for name, theta0 in initial.items():
        wide, one, two = theta0.double(), a[name].double(), b[name].double()
        wanted = wide + 2 * (0.75 * (one - wide) - 0.25 * (two - wide))
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-6, atol=1e-6)
    record = json.loads((out / "anneal.json").read_text())["merge"]
    assert record["weights"] == [0.75, -0.25] and record["scale"] == 2
    method = method_of(out)
    assert method is not None and method.text() == "task arithmetic weights 0.75,-0.25 scale 2"
    assert method.strengths == {"scale": 2.0}
    assert "| weights | 0.75,-0.25 |" in (out / "README.md").read_text()


# --- trim ---------------------------------------------------------------------------------------------------


def whole_trim_by_hand(vectors: dict[str, np.ndarray], density: float) -> dict[str, np.ndarray]:
    """The largest entries of all tensors laid end to end; entries of one magnitude in the order in which they come."""
    flat = np.concatenate([vector.reshape(-1) for vector in vectors.values()])
    keep = np.zeros(flat.size, dtype=bool)
    keep[np.argsort(-np.abs(flat), kind="stable")[: round(density * flat.size)]] = True
    found, start = {}, 0
    for name, vector in vectors.items():
        found[name] = keep[start : start + vector.size].reshape(vector.shape)
        start += vector.size
    return found


def folder_of(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def trim_of(initial: Path, tuned: list[Path], density: float) -> tuple[WholeModelTrim, list[dict]]:
    """The trim, and the masks that it gives per model, asked for as a merge asks."""
    weights, others = open_safetensors(initial), [open_safetensors(path) for path in tuned]
    names = [tied_names(weights, other) for other in others]
    trim = WholeModelTrim(weights, others, names, density, Progress())
    masks: list[dict] = [{} for _ in tuned]
    for name in weights.tensors:
        vectors = [
            other[known[name]].float() - weights[name].float()
            for other, known in zip(others, names, strict=True)
        ]
        for found, mask in zip(masks, trim.kept(name, vectors), strict=True):
            found[name] = mask.numpy()
    return trim, masks


def test_a_whole_model_and_its_tensors_are_trimmed_differently(tmp_path):
    """Half of the eight entries stay. In the tensors one by one that is 4 and -3 of the first, 0.2 and 0.1 of the
    second; in the model as a whole all four of the first."""
    initial = folder_of(tmp_path / "initial", {"x": torch.zeros(2, 2), "y": torch.zeros(4)})
    moved = {"x": torch.tensor([[4.0, -3.0], [2.0, 1.0]]), "y": torch.tensor([0.2, 0.1, 0.0, -0.05])}
    tuned = folder_of(tmp_path / "tuned", moved)
    trim, (masks,) = trim_of(initial, [tuned], 0.5)
    assert trim.num_kept == 4
    assert masks["x"].tolist() == [[True, True], [True, True]] and not masks["y"].any()
    _, (quarter,) = trim_of(initial, [tuned], 0.25)
    assert quarter["x"].tolist() == [[True, True], [False, False]] and not quarter["y"].any()


@pytest.mark.parametrize("density", [1e-9, 0.01, 0.2, 0.333, 0.75, 0.999])
def test_the_count_is_right_to_one_entry_and_the_entries_are_the_largest(models, tmp_path, density):
    tuned = [models["a"], models["b"]]
    trim, masks = trim_of(models["initial"], tuned, density)
    initial = stored(models["initial"])
    total = sum(tensor.numel() for tensor in initial.values())
    assert trim.num_kept == max(1, round(density * total))
    for path, found in zip(tuned, masks, strict=True):
        assert sum(int(mask.sum()) for mask in found.values()) == trim.num_kept
        moved = stored(path)
        vectors = {name: (moved[name] - initial[name]).numpy() for name in open_safetensors(path).tensors}
        if trim.num_kept > 1:
            wanted = whole_trim_by_hand(vectors, density)
            assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_entries_of_one_magnitude_stay_until_the_count_is_reached(tmp_path):
    """Every entry moved by the same amount, except two that moved more and three that did not move."""
    initial = {"x": torch.zeros(5, 4), "y": torch.zeros(3, 5)}
    moved = {"x": torch.full((5, 4), -0.5), "y": torch.full((3, 5), 0.5)}
    moved["y"][2, 3:], moved["x"][0, :3] = 7.0, 0.0
    first = folder_of(tmp_path / "initial", initial)
    second = folder_of(tmp_path / "tuned", moved)
    for count in (1, 2, 3, 19, 20, 32, 33, 35):
        trim, (masks,) = trim_of(first, [second], count / 35)
        assert trim.num_kept == count == sum(int(mask.sum()) for mask in masks.values())
        wanted = whole_trim_by_hand({name: tensor.numpy() for name, tensor in moved.items()}, count / 35)
        assert all(np.array_equal(masks[name], wanted[name]) for name in wanted)


def test_ties_of_a_whole_model_equals_the_hand_computation(models, tmp_path):
    """Trim, elect and disjoint mean, entry by entry, of unequally weighted models."""
    out = merged(models, tmp_path / "out", "ties", density=0.25, scale=0.8, weights=[1.0, 0.5])
    initial = {name: tensor.numpy() for name, tensor in stored(models["initial"]).items()}
    order, trimmed = open_safetensors(models["initial"]).tensors, []
    for path, weight in ((models["a"], 1.0), (models["b"], 0.5)):
        moved = stored(path)
        vectors = {name: moved[name].numpy() - initial[name] for name in order}
        masks = whole_trim_by_hand(vectors, 0.25)
        trimmed.append({name: weight * np.where(masks[name], vectors[name], 0) for name in order})
    found = stored(out)
    for name in order:
        stack = np.stack([vectors[name] for vectors in trimmed])
        sign = np.where(stack.sum(0) >= 0, 1, -1)
        agree = np.sign(stack) == sign
        mean = (stack * agree).sum(0) / np.maximum(agree.sum(0), 1)
        np.testing.assert_allclose(found[name].numpy(), initial[name] + 0.8 * mean, rtol=1e-5, atol=1e-6)
    by_tensor = merged(
        models, tmp_path / "t", "ties", density=0.25, scale=0.8, weights=[1.0, 0.5], trim="tensor"
    )
    assert any(not torch.equal(found[name], tensor) for name, tensor in stored(by_tensor).items())
    record = json.loads((out / "anneal.json").read_text())["merge"]
    assert record["trim"] == "model"  # the paper's, and the default
    assert method_of(out).text() == "TIES weights 1,0.5 trim model scale 0.8 density 0.25"


def test_a_weight_stored_twice_counts_once(tiny_gemma2_dir, tmp_path):
    """Tied weights that a saver wrote under both names: the same entries stay, and both copies stay equal."""
    tuned = copy_model(tiny_gemma2_dir, tmp_path / "tuned", noise(3))
    folders = {"once": (tiny_gemma2_dir, tuned), "twice": (tmp_path / "i2", tmp_path / "t2")}
    for source, target in zip(*folders.values(), strict=True):
        shutil.copytree(source, target)
        content = load_file(source / "model.safetensors")
        content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()
        save_file(content, target / "model.safetensors", metadata={"format": "pt"})
    results = {
        name: stored(merged({"initial": initial}, tmp_path / name, "ties", density=0.1, tuned=[moved]))
        for name, (initial, moved) in folders.items()
    }
    for name, tensor in results["once"].items():
        assert torch.equal(results["twice"][name], tensor)
    head = results["twice"]["lm_head.weight"]
    assert torch.equal(head, results["twice"]["model.embed_tokens.weight"])


# --- alpha beyond 1 -----------------------------------------------------------------------------------------


def test_wise_ft_walks_past_the_tuned_model_and_says_so(models, tmp_path):
    progress = RecordedProgress()
    out = merged(models, tmp_path / "out", "wise-ft", tuned=[models["a"]], alpha=1.5, progress=progress)
    notes = [line for line in progress.notes if "beyond the tuned model" in line]
    assert len(notes) == 1 and "alpha 1.5" in notes[0] and "\n" not in notes[0]
    initial, tuned, found = (stored(path) for path in (models["initial"], models["a"], out))
    for name, theta0 in initial.items():
        wanted = 1.5 * tuned[name].double() - 0.5 * theta0.double()
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-6, atol=1e-6)
    silent = RecordedProgress()
    merged(models, tmp_path / "one", "wise-ft", tuned=[models["a"]], alpha=1.0, progress=silent)
    assert silent.notes == []
