"""docs/export.md: its commands and examples run as printed, print what it shows, and train what the trainer trains."""

import re
import sys
from pathlib import Path

import pytest
import torch

import cli
from cache_builder import export_topk

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "export.md"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def blocks(heading: str | None) -> list[tuple[str, str]]:
    """The code blocks of the page's first part, or of one under a heading: (language, text)."""
    parts = re.split(r"\n## (.*)\n", PAGE.read_text(encoding="utf-8"))
    text = parts[0] if heading is None else parts[parts.index(heading) + 1]
    return re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL)


def assert_prints(printed: str, shown: str, rel: float = 5e-3, near: float = 2e-3) -> None:
    """The same words, and the same numbers as far as processors agree: a fraction to `rel` or `near`, a count to one.

    The teacher computes in bfloat16: the longest head has 31 or 32 tokens of p >= 0.01.
    """
    assert shown and NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
    for got, wanted in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        if "." in wanted:
            assert float(got) == pytest.approx(float(wanted), rel=rel, abs=near)
        else:
            assert abs(int(got) - int(wanted)) <= 1, (got, wanted)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory in which the page's relative names mean what they say."""
    path = tmp_path_factory.mktemp("export page")
    (path / "examples").symlink_to(ROOT / "examples")
    return path


@pytest.fixture(scope="module")
def exported(place: Path) -> str:
    """The page's two commands, as typed; what the second printed."""
    import contextlib
    import io

    ((_, commands), _) = blocks(None)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for command in commands.splitlines():
            patch.setattr(sys, "argv", command.split())
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
                cli.main()
            assert not stop.value.code
    return printed.getvalue()


def run(code: str, place: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)
    exec(compile(code, str(PAGE), "exec"), {})


def test_the_commands_print_what_the_page_shows(exported: str) -> None:
    assert_prints(exported, blocks(None)[1][1], rel=2e-2)


@pytest.mark.parametrize("heading", ["Read it with datasets", "A loop in plain PyTorch"])
def test_the_examples_print_what_the_page_shows(heading: str, place, exported, monkeypatch, capsys) -> None:
    (language, code), (_, shown) = blocks(heading)
    assert language == "python"
    torch.manual_seed(0)
    run(code, place, monkeypatch)
    # Whether a token of p = 0.0101 is kept is chance, and then `rest` and `tail` differ by it.
    assert_prints(capsys.readouterr().out, shown, near=2e-2)


@pytest.mark.parametrize("k", [None, 5])
def test_the_loop_is_the_trainer(k: int | None, place, exported, monkeypatch, capsys) -> None:
    """KL to 1e-5 and gradients of three batches, in float64 at T = 1 without draws, for a model that is not its own
    teacher; where `k` cuts, the trainer reads a cache that was cut."""
    from transformers import AutoModelForCausalLM

    from formats import TeacherCache
    from formats.cache_row import CacheRow
    from trainer import CachedDataset, LabelAnnealingCollator, OutputHead

    moved = place / f"moved-{k}"
    model = AutoModelForCausalLM.from_pretrained(place / "examples" / "tiny-base", dtype=torch.float32)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.2 * parameter.std(correction=0) * noise
    model.save_pretrained(moved)
    export_topk(place / "my-cache", place / f"{k}.parquet", k=k)

    found: list[dict[str, torch.Tensor]] = []

    def keep(optimizer, *arguments, **options):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        found.append({str(i): parameter.grad.clone() for i, parameter in enumerate(parameters)})

    monkeypatch.setattr(torch.optim.AdamW, "step", keep)
    ((_, code), _) = blocks("A loop in plain PyTorch")
    for old, new in (
        ("examples/tiny-base", moved.name),
        ("torch.float32", "torch.float64"),
        ("topk.parquet", f"{k}.parquet"),
        (":.4f}", ":.8f}"),
    ):
        assert old in code
        code = code.replace(old, new)
    run(code, place, monkeypatch)
    printed = [float(value) for value in re.findall(r"KL (\S+)", capsys.readouterr().out)]

    cache = TeacherCache(place / "my-cache")
    if k is not None:
        of_row = TeacherCache.__getitem__

        def cut(self, index):
            row = of_row(self, index)
            return CacheRow(row.tokens, row.teacher.prune(max_k=k), row.which)

        monkeypatch.setattr(TeacherCache, "__getitem__", cut)
    rows = CachedDataset(cache, tail_draws=False)
    model = AutoModelForCausalLM.from_pretrained(moved, dtype=torch.float64)
    head = OutputHead.of(model).install()
    assert len(found) == len(printed) == 3
    for step, (gradients, kl) in enumerate(zip(found, printed, strict=True)):
        batch = LabelAnnealingCollator()([rows[index] for index in range(4 * step, 4 * step + 4)])
        out = head.loss(model, batch, kl_coef=1.0)
        out.loss.backward()
        assert kl > 0.05 and kl == pytest.approx(float(out.kl), abs=1e-5)
        for mine, parameter in zip(gradients.values(), model.parameters(), strict=True):
            largest = float(parameter.grad.abs().max())
            assert largest > 0
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=2e-6 * largest)
        model.zero_grad()
