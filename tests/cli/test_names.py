"""Names: another package called `trainer` is refused; nobody is sent to a stranger's package or to no option at all."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from formats.install import DISTRIBUTION, how_to_install

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = re.compile(
    r"(?:pip|pipx|tool) install (?:-\S+ )*['\"]?(anneal|trainer|formats|cache[-_]builder)(?![\w./-])"
)


def start(home: Path, *words: str, first: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What the console script does, with `first` before everything else on Python's path."""
    script = "import sys, cli; sys.argv[0] = 'anneal'; cli.main()"
    path = os.pathsep.join(str(entry) for entry in (first, home) if entry)
    return subprocess.run(
        [sys.executable, "-c", script, *words],
        env={**os.environ, "PYTHONPATH": path},
        cwd=first or home,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", ["formats", "cache_builder", "trainer", "onboarding", "commands"])
@pytest.mark.parametrize("kind", ["package", "module"])
def test_another_package_of_our_name(name: str, kind: str, tmp_path: Path) -> None:
    """As Coqui's `trainer` would be: importable, earlier on the path, and of no use to us."""
    if kind == "package":
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('a stranger was imported')\n")
    else:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a stranger was imported')\n")
    for words in (["--help"], ["cache", "inspect", "nowhere"]):
        result = start(ROOT, *words, first=tmp_path)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.count("\n") == 1, result.stderr
        assert result.stderr.startswith(
            f"error: the package {name} must be {ROOT / name}, got {tmp_path / name}"
        )
        assert "environment of its own" in result.stderr


def test_a_folder_of_our_name_is_no_package(tmp_path: Path) -> None:
    """A working directory with `trainer/` in it, such as a checkout of something else, does no harm."""
    (tmp_path / "trainer").mkdir()
    result = start(ROOT, "--version", first=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_package_of_ours_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "cli.py").write_text((ROOT / "cli.py").read_text(encoding="utf-8"), encoding="utf-8")
    result = start(tmp_path, "--help")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "the package formats must be" in result.stderr


def test_a_dependency_that_is_missing(tmp_path: Path) -> None:
    """As after `pip install --no-deps`: one line, and nothing is written."""
    script = "import sys, cli; sys.modules['yaml'] = None; cli.main()"
    result = subprocess.run(
        [sys.executable, "-c", script, "train", "cache", "--model", "model", "--out", "out"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (1, "") and list(tmp_path.iterdir()) == []
    assert result.stderr == (
        "error: this command needs the package yaml, which is not installed; pip install label-annealing\n"
    )


@pytest.mark.parametrize(
    "words",
    [
        ["train", "cache", "--model", "examples/tiny-base", "--out", "out"],
        ["init", "examples/own-data.jsonl", "--model", "examples/tiny-base", "--file", "out"],
    ],
)
def test_a_vision_package_built_for_another_torch(words: list[str], tmp_path: Path) -> None:
    """transformers then says that its own classes lack something; the line names the command that knows more."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('torchvision::nms is missing')\n"
    )
    (tmp_path / "torchvision-0.1.dist-info").mkdir()
    (tmp_path / "torchvision-0.1.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.1\n")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    result = start(ROOT, *words, first=tmp_path)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert "Could not import module" in result.stderr and "anneal doctor says which" in result.stderr
    assert not (tmp_path / "out").exists()


def test_how_to_install() -> None:
    assert how_to_install() == "pip install label-annealing"
    assert how_to_install("vllm") == "pip install 'label-annealing[vllm]'"
    assert how_to_install("plot", "lora") == "pip install 'label-annealing[plot,lora]'"


def test_the_distribution_is_called_that() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == DISTRIBUTION
    assert project["scripts"] == {"anneal": "cli:main"}


def test_no_page_or_message_names_the_package_of_another() -> None:
    """`anneal`, `trainer` and `formats` on the package index are not ours: only `how_to_install` writes commands."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*")]
    code = [ROOT / "cli.py"]
    for package in ("formats", "cache_builder", "trainer", "integrations", "onboarding", "commands"):
        code += (ROOT / package).rglob("*.py")
    texts = {
        path: path.read_text(encoding="utf-8") for path in [*pages, *code] if path.suffix in {".md", ".py"}
    }
    assert len(texts) > 100
    for path, text in texts.items():
        assert not (hit := FOREIGN.search(text)), f"{path} sends its reader to a stranger's package: {hit[0]}"
        if path in code and path.name != "install.py":
            assert f"{DISTRIBUTION}[" not in text, f"{path}: use formats.install.how_to_install"


OPTIONS_OF_OTHERS = {"--force-reinstall", "--query-gpu", "--format", "--help", "--version", "--debug"}
"""Of pip, nvidia-smi, and those that every command has."""


def test_options_that_messages_name_exist() -> None:
    known = set(re.findall(r"`(--[a-z-]+)", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")))
    assert {"--out", "--kl-coef"} <= known
    missing = {}
    for package in ("formats", "cache_builder", "trainer", "integrations", "onboarding", "commands"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name in ("page.py", "svg.py"):  # their CSS variables look alike
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    words = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", node.value))
                    for word in words - known - OPTIONS_OF_OTHERS:
                        missing[word] = path.name
    assert not missing
