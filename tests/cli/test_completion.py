"""Shell completion: the scripts, and what a press of the tab key offers."""

import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cli
from commands import completion
from formats.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def offered(line: str) -> list[str]:
    """What bash is told for a line whose last word is being typed."""
    words = line.split(" ")
    environment = {
        "_ANNEAL_COMPLETE": "complete_bash",
        "COMP_WORDS": "\n".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    result = CliRunner().invoke(cli.app, prog_name="anneal", env=environment)
    return result.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_printed_for_each_shell(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    result = CliRunner().invoke(cli.app, ["--show-completion", shell], prog_name="anneal")
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"_ANNEAL_COMPLETE=complete_{shell}" in result.stdout


def test_commands_and_options() -> None:
    assert "train" in offered("anneal ") and "cache" in offered("anneal ")
    assert offered("anneal cac") == ["cache"]
    assert {"build", "inspect", "push"} <= set(offered("anneal cache "))
    assert offered("anneal train --kl-d") == ["--kl-direction"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("anneal train --kl-direction ", ["forward", "reverse"]),
        ("anneal cache build --engine t", ["transformers"]),
        ("anneal cache build --dtype b", ["bfloat16"]),
        ("anneal cache export --layout ", ["positions", "topk"]),
        ("anneal merge --method w", ["wise-ft"]),
        ("anneal chain --anchor p", ["previous"]),
        ("anneal restore --rank ", ["low-ppl", "random"]),
        ("anneal train --set kl_c", ["kl_coef="]),
        ("anneal train --set training.learning", ["training.learning_rate="]),
    ],
)
def test_values_of_options(line: str, found: list[str]) -> None:
    assert offered(line) == found


def test_refused_arguments_are_not_offered() -> None:
    assert offered("anneal train --set training.push_to_hub") == []


def test_suites_are_offered() -> None:
    from trainer.bench.suites import SUITES

    assert offered("anneal bench --suite ") == list(SUITES)


def test_caches_and_models_in_the_neighbourhood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, mark in (
        ("runs/cache", "manifest.json"),
        ("runs/model", "config.json"),
        ("base", "config.json"),
    ):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / mark).write_text("{}")
    (tmp_path / "runs" / ".hidden").mkdir()
    monkeypatch.chdir(tmp_path)
    assert offered("anneal train ") == ["runs/cache"]
    assert offered("anneal train --model ") == ["base", "runs/model"]
    assert offered("anneal train --model run") == ["runs/model"]
    assert offered("anneal train --model runs/m") == ["runs/model"]
    assert offered(f"anneal eval {tmp_path}/r") == [f"{tmp_path}/runs/cache"]
    assert completion.caches("held-out=r") == ["held-out=runs/cache"]
    assert offered("anneal train nowhere/") == []


def test_words_are_the_ones_that_the_commands_take() -> None:
    from cache_builder import BuildConfig
    from cache_builder.generation.settings import Start
    from trainer import config
    from trainer.chain import config as chain
    from trainer.merging.settings import DEFAULTS, TRIMS
    from trainer.quantization import WeightQuantization
    from trainer.selection.rules import Rule

    assert completion.DTYPES == config.DTYPES and completion.KL_DIRECTIONS == config.KL_DIRECTIONS
    assert sorted(completion.MERGES) == sorted(DEFAULTS) and completion.TRIMS == TRIMS
    assert (completion.ANCHORS, completion.CONTROLS, completion.METRICS) == (
        chain.ANCHORS,
        chain.CONTROLS,
        chain.METRICS,
    )
    for word in completion.RULES:
        Rule.parse(word)
    for word in completion.INTEGERS:
        WeightQuantization.parse("--quantize", word)
    for engine in completion.ENGINES:
        for positions in completion.POSITIONS:
            BuildConfig(corpus="c", model="m", out="o", engine=engine, positions=positions)
    assert typing.get_args(Start) == completion.STARTS
    for wrong in ({"engine": "x"}, {"positions": "x"}):
        with pytest.raises(ConfigError):
            BuildConfig(corpus="c", model="m", out="o", **typing.cast(typing.Any, wrong))


def test_completing_loads_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys, cli\ntry:\n    sys.argv[0] = 'anneal'\n    cli.main()\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'vllm', 'datasets'} & set(sys.modules)\n    assert not heavy, heavy"
    )
    words = {"COMP_WORDS": "anneal train --set kl_co", "COMP_CWORD": "3", "_ANNEAL_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT), **words},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.split(), done.stderr) == (["kl_coef="], "")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_with_the_script(tmp_path: Path) -> None:
    """The shell itself, as `anneal --install-completion` sets it up."""
    program = tmp_path / "anneal"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\nimport cli\ncli.main()\n"
    )
    program.chmod(0o755)
    script = """
eval "$(_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION=1 anneal --show-completion bash)"
COMP_WORDS=(anneal cache export --layout to) COMP_CWORD=4
_anneal_completion anneal
echo "${COMPREPLY[@]}"
complete -p anneal
"""
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["topk", "complete -o default -F _anneal_completion anneal"], (
        done.stderr
    )
