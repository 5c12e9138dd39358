"""The examples of docs/training.md for people with their own loop: run as they are printed."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from trainer import evaluate

DOC = Path(__file__).parents[2] / "docs" / "training.md"
EXAMPLES = {
    match[0].strip(): match[1]
    for match in re.findall(
        r"\n\n([^\n`]*(?:`[^`]*`)?[^\n]*):\n\n```python\n(.*?)```", DOC.read_text(), re.DOTALL
    )
}


def names_starting(text: str) -> list[str]:
    return [title for title in EXAMPLES if title.lstrip("`").startswith(text)]


@pytest.mark.parametrize("title", ["A plain PyTorch loop", "accelerate"])
def test_the_example_trains(title, tiny_llama_dir, pruned_cache, tmp_path):
    (found,) = names_starting(title)
    code = EXAMPLES[found]
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    torch.manual_seed(0)
    scope = {"MODEL": str(tiny_llama_dir), "CACHE": str(pruned_cache), "CPU": True}
    exec(compile(code.replace("lr=1e-5", "lr=1e-3"), str(DOC), "exec"), scope)
    initial = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    trained = scope["model"]
    assert not torch.equal(trained.lm_head.weight, initial.lm_head.weight)
    trained.save_pretrained(tmp_path / "model")
    for path in tiny_llama_dir.glob("tokenizer*"):
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    before = evaluate(tiny_llama_dir, {"c": pruned_cache})["c"]
    after = evaluate(tmp_path / "model", {"c": pruned_cache})["c"]
    assert after["ce"] < before["ce"] and 0 < after["kl"] < 1


def test_every_documented_setting_exists_and_every_setting_is_documented():
    from dataclasses import fields

    from trainer.config import TrainConfig

    table = DOC.read_text().split("## Settings")[1].split("Defaults under")[0]
    documented = set(
        re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    )
    assert documented == {entry.name for entry in fields(TrainConfig)} - {"cache", "model", "out", "revision"}
