"""The main path typed as a user types it: build, inspect, train, eval; the docs know every option."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import warm_process
from corpora import write_jsonl

import cli

ROOT = Path(__file__).resolve().parents[2]


def anneal(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own; it must succeed."""
    result = warm_process.anneal(*words)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("workspace")
    import textwrap

    texts = (textwrap.__doc__, textwrap.dedent.__doc__, textwrap.fill.__doc__, textwrap.wrap.__doc__)
    paragraphs = [str(text) for text in texts]
    chats = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": text * 3}]}
        for n, text in enumerate(paragraphs)
    ]
    write_jsonl(path / "chat.jsonl", chats)
    return path


@pytest.fixture(scope="module")
def cache(workspace: Path, tiny_llama_dir: Path) -> Path:
    out = workspace / "cache"
    command = ("cache", "build", workspace / "chat.jsonl", "--model", tiny_llama_dir, "--out", out)
    dry = anneal(*command, "--engine", "transformers", "--dry-run")
    assert not out.exists()
    assert "rows       4" in dry.stdout and "size       about" in dry.stdout
    built = anneal(*command, "--engine", "transformers")
    assert "bytes/token" in built.stdout
    again = anneal(*command, "--engine", "transformers")
    assert again.stdout != built.stdout  # says that there was nothing to do
    return out


def test_inspect_in_every_form(cache: Path, workspace: Path, tiny_llama_dir: Path) -> None:
    text = anneal("cache", "inspect", cache).stdout
    for word in ("rows", "tokens", "positions", "bytes per token", "entropy", "mass"):
        assert word in text
    first, second = (anneal("cache", "inspect", cache, "--json").stdout for _ in range(2))
    assert first == second
    parsed = json.loads(first)
    assert parsed["num_rows"] == 4
    row = anneal("cache", "inspect", cache, "--row", "0").stdout
    assert "%" in row or "0." in row
    picture = workspace / "cache.png"
    anneal("cache", "inspect", cache, "--plot", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_tail_draws_as_asked(cache: Path, workspace: Path, tiny_llama_dir: Path) -> None:
    """Rate 8 by default, in the cache that the other tests train on."""
    assert json.loads((cache / "manifest.json").read_text())["codec"]["draw_rate"] == 8
    assert "tail draws at rate 8" in anneal("cache", "inspect", cache).stdout
    command = ("cache", "build", workspace / "chat.jsonl", "--model", tiny_llama_dir)
    for rate in (0, 3):
        out = workspace / f"draws-{rate}"
        anneal(*command, "--out", out, "--engine", "transformers", "--tail-draws", str(rate))
        manifest = json.loads((out / "manifest.json").read_text())
        assert (manifest["version"], manifest["codec"]["draw_rate"]) == (1, rate)
    estimate = ("cache", "estimate", *command[2:], "--engine", "transformers", "--rows", "4", "--json")
    reports = [json.loads(anneal(*estimate, "--tail-draws", rate).stdout) for rate in ("0", "8")]
    asked = [report["estimates"][report["configured"]] for report in reports]
    assert [(line["min_prob"], line["tail_draws"]) for line in asked] == [(1e-2, 0), (1e-2, 8)]
    assert asked[1]["total_bytes"] > 1.1 * asked[0]["total_bytes"]


def test_train_then_eval(cache: Path, workspace: Path, tiny_llama_dir: Path) -> None:
    out = workspace / "tuned"
    trained = anneal(
        "train", cache, "--model", tiny_llama_dir, "--out", out, "--kl-coef", "0.5",
        "--set", "training.max_steps=6", "--set", "training.learning_rate=1e-3",
    )  # fmt: skip
    log = [line for line in trained.stderr.splitlines() if line.strip()]
    assert any(line.startswith("step 0: KL(initial || model)") for line in log)
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 1003
    before = json.loads(anneal("eval", f"chat={cache}", "--model", tiny_llama_dir, "--json").stdout)
    after = json.loads(anneal("eval", f"chat={cache}", "--model", out, "--json").stdout)
    assert before["caches"]["chat"]["kl"] < 1e-3
    assert after["caches"]["chat"]["kl"] > 10 * before["caches"]["chat"]["kl"]
    assert after["caches"]["chat"]["perplexity"] < before["caches"]["chat"]["perplexity"]
    assert "perplexity" in anneal("eval", cache, "--model", out).stdout
    half = workspace / "half"
    words = [
        "merge",
        out,
        "--initial",
        tiny_llama_dir,
        "--out",
        half,
        "--method",
        "wise-ft",
        "--alpha",
        "0.5",
    ]
    merged = subprocess.run(
        [sys.executable, "-m", "cli", *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert "merged 1 model" in merged.stdout
    assert merged.stderr == "", "libraries that are imported on the way keep quiet"
    between = json.loads(anneal("eval", f"chat={cache}", "--model", half, "--json").stdout)
    assert before["caches"]["chat"]["kl"] < between["caches"]["chat"]["kl"] < after["caches"]["chat"]["kl"]


def test_compare_prints_a_table_json_a_picture_and_a_page(
    cache: Path, workspace: Path, tiny_llama_dir: Path
) -> None:
    """One process per form; the words of the table, and the numbers of `evaluate` in the JSON."""
    from trainer import evaluate

    half = shutil.copytree(tiny_llama_dir, workspace / "compared-half")
    (half / "anneal.json").write_text('{"merge": {"method": "wise-ft", "alpha": 0.5, "tuned": []}}')
    words = (
        "compare",
        f"half={half}",
        "--source",
        f"old={cache}",
        "--target",
        cache,
        "--initial",
        tiny_llama_dir,
    )
    picture, page = workspace / "compared.png", workspace / "compared.html"
    shown = anneal(*words, "--work", workspace / "work", "--plot", picture, "--html", page)
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert lines[0] == ["source", "old", "target", cache.name, "source", "KL", "on"]
    assert lines[1][:4] == ["model", "method", "ppl", "nats"]
    assert lines[2][:2] == ["*", tiny_llama_dir.name] and "initial model" in shown.stdout
    assert lines[3][:5] == ["*", "half", "WiSE-FT", "alpha", "0.5"] and "+0.000" in lines[3]
    assert "name it with --direct LABEL" in shown.stdout
    assert picture.read_bytes().startswith(b"\x89PNG") and page.read_text().startswith("<!doctype html>")
    assert shown.stderr.splitlines()[-2:] == [f"picture in {picture}", f"page in {page}"]
    found = json.loads(anneal(*words, "--work", workspace / "work", "--json").stdout)
    expected = evaluate(half, {"text": cache})["text"]
    for text in (found["models"][1]["source"]["old"], found["models"][1]["target"][cache.name]):
        for key, value in expected.items():
            assert text[key] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), key
    assert found["initial"] == tiny_llama_dir.name and found["models"][1]["strengths"] == {"alpha": 0.5}


def test_every_command_and_option_says_what_it_is() -> None:
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        for child, leaf in getattr(command, "commands", {"": command}).items():
            assert leaf.help, f"{name} {child}"
            for parameter in leaf.params:
                assert parameter.param_type_name != "option" or parameter.help, f"{child} {parameter.name}"


def helped(*words: str) -> str:
    """`--help` on a terminal of 80 columns."""
    result = subprocess.run(
        [sys.executable, "-m", "cli", *words, "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout


@pytest.mark.parametrize("words", [[], ["cache"], ["probe"]])
def test_the_list_of_commands_says_what_each_does(words: list[str]) -> None:
    """No summary is cut, as "Print what MODEL..." was at any width."""
    listed = helped(*words).split("Commands:\n")[1].strip().splitlines()
    assert len(listed) >= 4
    assert [line for line in listed if line.endswith("...") or not line.endswith((".", "?"))] == []


@pytest.mark.parametrize("words", [["cache", "build"], ["compare"], ["chain"]])
def test_usage_has_brackets_once(words: list[str]) -> None:
    """`[[CORPUS]]` and `{MODEL...}...` come of metavars with brackets or dots of their own."""
    usage = helped(*words).splitlines()[0]
    assert not re.search(r"\[\[|\.\.\.[]}]", usage), usage


def test_the_reference_is_current() -> None:
    made = subprocess.run(
        [sys.executable, "docs/make_cli_reference.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout == (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")


def test_version_and_module_entry() -> None:
    from importlib.metadata import version

    result = subprocess.run(
        [sys.executable, "-m", "cli", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout.strip()) == (0, f"anneal {version('label-annealing')}")
