"""Exact memorisation: 1 of a model that was overfitted on four rows, its own accuracy of one that was not."""

import json

import pytest
from caches import random_rows, write_cache
from runs import settings

from formats.errors import ConfigError
from trainer import evaluate, train
from trainer.probe.memory import Memory, probe_memory


@pytest.fixture(scope="module")
def overfitted(tiny_llama_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    cache = write_cache(folder / "four", tiny_llama_dir, rows=random_rows(4, 1003, seed=1))
    overrides = [
        "kl_coef=0",
        "training.max_steps=60",
        "training.learning_rate=1e-2",
        "training.logging_steps=60",
    ]
    train(settings(cache, tiny_llama_dir, folder / "tuned", *overrides))
    return cache, folder / "tuned"


def test_overfitted_and_initial(overfitted, tiny_llama_dir, llama_eval_cache) -> None:
    cache, tuned = overfitted
    found = probe_memory({"tuned": tuned, "initial": tiny_llama_dir}, str(cache), str(llama_eval_cache))
    assert found["tuned"].trained == 1.0
    assert found["initial"].trained == evaluate(tiny_llama_dir, {"t": cache})["t"]["accuracy"] < 0.1
    held = evaluate(tuned, {"t": llama_eval_cache})["t"]
    assert (
        found["tuned"].control == held["accuracy"] and found["tuned"].num_control_tokens == held["num_tokens"]
    )
    assert found["tuned"].memorised == 1 - held["accuracy"] > 0.8


def test_a_text_is_no_control_of_itself(tiny_llama_dir, llama_eval_cache) -> None:
    with pytest.raises(ConfigError, match=r"--control must be text that the model was not trained on"):
        probe_memory({"a": tiny_llama_dir}, str(llama_eval_cache), f"{llama_eval_cache}/.")


def test_the_difference_and_its_error() -> None:
    memory = Memory(trained=0.6, num_tokens=100, control=0.5, num_control_tokens=400)
    assert memory.memorised == pytest.approx(0.1)
    assert memory.stderr == pytest.approx((0.24 / 100 + 0.25 / 400) ** 0.5)
    alone = Memory(trained=0.6, num_tokens=100)
    assert alone.memorised is None and alone.stderr is None


def test_the_command(anneal, overfitted, llama_eval_cache) -> None:
    cache, tuned = overfitted
    words = ["probe", "memory", f"m={tuned}", "--text", cache]
    code, out, err = anneal(*words, "--control", llama_eval_cache)
    assert code == 0 and "100.0 %" in out and "not trained on" in out, err
    code, out, err = anneal(*words)
    assert code == 0 and "name such text with --control" in out
    code, out, err = anneal(*words, "--json")
    assert json.loads(out)[0]["trained"] == 1.0
