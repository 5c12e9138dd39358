"""Every example of docs/adapters.md runs as it is printed, and trains what the page says it trains."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adapters.md"


def example(heading: str) -> str:
    """The one Python block under a heading."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    return code


@pytest.fixture(scope="module")
def names(tmp_path_factory, tiny_llama_dir):
    from caches import write_cache

    folder = tmp_path_factory.mktemp("adapters")
    cache = write_cache(folder / "cache", tiny_llama_dir, num_rows=8)
    return {"MODEL": str(tiny_llama_dir), "CACHE": str(cache), "OUT": str(folder / "out")}


def logged(text: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf"{name} (-?[\d.]+)", text)]


@pytest.mark.parametrize("heading", ["Plain PyTorch", "accelerate"])
def test_loop_starts_at_its_own_teacher_and_learns(heading, names, capsys):
    """KL 0 before the first step: model, cache, rows and shift fit together. Then a fast step moves it."""
    torch.manual_seed(0)
    namespace = dict(names)
    exec(compile(example(heading).replace("lr=1e-5", "lr=1e-3"), heading, "exec"), namespace)
    kl = logged(capsys.readouterr().out, "KL")
    assert len(kl) == 2 and abs(kl[0]) < 1e-5 < kl[1]


def test_accelerate_divides_by_the_whole_step(names, capsys, monkeypatch):
    """Two batches of two rows, accumulated, give the gradient of one batch of four, and print its means."""
    found = []

    def gradients(optimizer, *args, **kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        found.append(torch.cat([p.grad.flatten().clone() for p in parameters]))

    monkeypatch.setattr(torch.optim.AdamW, "step", gradients)
    code = example("accelerate").replace("shuffle=True", "shuffle=False")
    for changed in (code, code.replace("batch_size=2", "batch_size=4").replace("range(2)", "range(1)")):
        exec(compile(changed, "accelerate", "exec"), dict(names))
    printed = capsys.readouterr().out
    for name in ("CE", "KL"):
        values = logged(printed, name)
        assert values[:2] == pytest.approx(values[2:], rel=1e-4, abs=2e-6)
    assert len(found) == 4
    for accumulated, at_once in zip(found[:2], found[2:], strict=True):
        assert at_once.norm() > 0
        torch.testing.assert_close(accumulated, at_once, rtol=1e-4, atol=1e-6 * float(at_once.abs().max()))
