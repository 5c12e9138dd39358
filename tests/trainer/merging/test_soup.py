"""Soups: uniform, weighted, and greedy by the loss on held-out text, against a plain loop of the recipe."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from caches import write_cache
from recorded_progress import RecordedProgress
from runs import copy_model, noise, same_weights
from safetensors.torch import load_file, save_file

from formats.cache import TeacherCache
from formats.errors import ConfigError
from trainer import MergeConfig, merge
from trainer.evaluation.recorded_method import method_of
from trainer.result.lineage import ancestors_of


@pytest.fixture(scope="module")
def models(tiny_llama_dir, tmp_path_factory) -> dict[str, Path]:
    """The initial model and four others: two that moved in opposite directions, one elsewhere, and one so far away that
    no average with it can be better."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"a": (1, 0.3), "b": (1, -0.35), "c": (3, 0.2), "far": (4, 3.0)}
    return {"initial": tiny_llama_dir} | {
        name: copy_model(tiny_llama_dir, folder / name, noise(seed, size))
        for name, (seed, size) in sizes.items()
    }


@pytest.fixture(scope="module")
def held_out(tiny_llama_dir, tmp_path_factory) -> Path:
    return write_cache(tmp_path_factory.mktemp("held-out") / "c", tiny_llama_dir, num_rows=12)


def config(models: dict, out: Path, names: str, **options) -> MergeConfig:
    return MergeConfig(
        tuned=[str(models[name]) for name in names.split()],
        initial=str(models["initial"]),
        out=str(out),
        method="soup",
        **options,
    )


def stored(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def mean_of(paths: list[Path], weights: list[float] | None = None) -> dict[str, torch.Tensor]:
    weights = weights or [1.0] * len(paths)
    contents = [stored(path) for path in paths]
    return {
        name: sum(w * content[name].double() for w, content in zip(weights, contents, strict=True))
        / sum(weights)
        for name in contents[0]
    }


def loss_by_hand(weights: dict[str, torch.Tensor], config_dir: Path, cache: TeacherCache) -> float:
    """Cross-entropy per token from full float64 logits, a row at a time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config_dir), dtype=torch.float64)
    model.load_state_dict({name: tensor.double() for name, tensor in weights.items()}, strict=False)
    model.tie_weights()
    model.eval()
    total, count = 0.0, 0
    for row in range(len(cache)):
        item = cache[row]
        ids = torch.as_tensor(item.input_ids.astype("int64"))[None]
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        for place in range(1, ids.shape[1]):
            if item.loss_mask[place]:
                total -= float(logprobs[place - 1, ids[0, place]])
                count += 1
    return total / count


def test_a_uniform_soup_is_the_mean_and_a_scale_of_task_arithmetic(models, tmp_path):
    report = merge(config(models, tmp_path / "soup", "a b c"))
    found, wanted = stored(report.out), mean_of([models[name] for name in "abc"])
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name].float())  # rounded once
    arithmetic = MergeConfig(
        tuned=[str(models[name]) for name in "abc"], initial=str(models["initial"]), out=str(tmp_path / "ta"),
        method="task-arithmetic", scale=1 / 3,
    )  # fmt: skip
    for name, tensor in stored(merge(arithmetic).out).items():
        torch.testing.assert_close(tensor, found[name], rtol=1e-5, atol=1e-6)
    method = method_of(report.out)
    assert method is not None and (method.text(), method.strengths) == ("soup", {})


def test_a_weighted_soup_is_the_weighted_mean(models, tmp_path):
    report = merge(config(models, tmp_path / "soup", "a b", weights=[3, 1]))
    wanted = mean_of([models["a"], models["b"]], [3, 1])
    for name, tensor in stored(report.out).items():
        assert torch.equal(tensor, wanted[name].float())
    assert same_weights(merge(config(models, tmp_path / "one", "a b", weights=[0, 2])).out, models["b"])
    assert method_of(report.out).text() == "soup weights 3,1"


def test_the_initial_model_itself_may_go_in(models, tmp_path):
    report = merge(config(models, tmp_path / "soup", "initial a"))
    wanted = mean_of([models["initial"], models["a"]])
    assert all(torch.equal(tensor, wanted[name].float()) for name, tensor in stored(report.out).items())


def test_a_greedy_soup_follows_the_recipe(models, held_out, tmp_path):
    """The order, every loss and every decision of a loop in float64 over dense logits; the model that is far off stays
    out, and the result is the uniform soup of those that entered, bit for bit."""
    names = ["far", "c", "a", "b"]
    progress = RecordedProgress()
    report = merge(config(models, tmp_path / "soup", " ".join(names), by=str(held_out)), progress)
    cache = TeacherCache(held_out)
    alone = {name: loss_by_hand(mean_of([models[name]]), models["initial"], cache) for name in names}
    order = sorted(names, key=alone.__getitem__)
    entered, current, steps = [order[0]], alone[order[0]], [alone[order[0]]]
    for name in order[1:]:
        with_it = loss_by_hand(mean_of([models[n] for n in [*entered, name]]), models["initial"], cache)
        steps.append(with_it)
        if with_it <= current:
            entered, current = [*entered, name], with_it
    assert "far" not in entered and len(entered) > 1, "the case must decide both ways"
    assert [names[entry.model] for entry in report.tasted] == order
    assert [names[entry.model] for entry in report.tasted if entry.entered] == entered
    assert [entry.loss for entry in report.tasted] == pytest.approx([alone[n] for n in order], rel=1e-5)
    assert [entry.soup_loss for entry in report.tasted] == pytest.approx(steps, rel=1e-5)
    uniform = merge(config(models, tmp_path / "uniform", " ".join(n for n in names if n in entered)))
    assert same_weights(report.out, uniform.out)

    record = json.loads((report.out / "anneal.json").read_text())["merge"]
    assert [entry["entered"] for entry in record["tuned"]] == [name in entered for name in names]
    assert [entry["loss"] for entry in record["tuned"]] == pytest.approx([alone[n] for n in names], rel=1e-5)
    assert record["by"] == str(held_out)
    assert {entry.name for entry in ancestors_of(report.out)} == {models["initial"].name, *entered}
    assert method_of(report.out).text() == f"soup by {held_out.name}"
    assert report.line().startswith(f"merged {len(entered)} of 4 models")
    assert len(progress.notes) == 3 and sum("left out" in line for line in progress.notes) == 4 - len(entered)
    card = (report.out / "README.md").read_text()
    assert card.count("| added |") == len(entered) and "| left out |" in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["soup", "uniform"]
    assert not list(report.out.glob(".*"))


def test_a_model_that_changes_nothing_enters(models, held_out, tmp_path):
    """Not worse is enough: the same model twice."""
    report = merge(config(models, tmp_path / "soup", "a a", by=str(held_out)))
    assert [entry.entered for entry in report.tasted] == [True, True]
    assert same_weights(report.out, models["a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1, -1]}, "--weights of an average must not be negative, nor all 0, got 1,-1"),
        ({"weights": [0, 0]}, "must not be negative, nor all 0"),
        ({"weights": [1]}, "--weights must have one number per tuned model, got 1 for 2 models"),
        ({"weights": [1, 1], "by": "x"}, "got --weights beside --by"),
        ({"by": ""}, "--by must name a cache"),
        ({"scale": 0.5}, "soup has no --scale"),
        ({"by": "nowhere"}, "nowhere"),
    ],
)
def test_what_a_soup_cannot_take_is_refused_in_one_line(models, tmp_path, options, message):
    with pytest.raises(Exception) as error:
        merge(config(models, tmp_path / "soup", "a b", **options))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_model_is_refused_by_name(models, held_out, tmp_path):
    broken = copy_model(models["a"], tmp_path / "broken")
    content = load_file(broken / "model.safetensors")
    first = next(iter(content))
    content[first] = torch.full_like(content[first], float("nan"))
    save_file(content, broken / "model.safetensors", metadata={"format": "pt"})
    before = sorted(path.name for path in itertools.chain(tmp_path.iterdir()))
    with pytest.raises(ConfigError, match=r"models of a soup must have a finite loss, got nan for .*broken"):
        merge(config({**models, "x": broken}, tmp_path / "soup", "a x", by=str(held_out)))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
