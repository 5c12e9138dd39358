"""The house rules that keep the parts apart, read from the source's imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "vllm", "transformers", "datasets", "ray"}


def imports_of(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Root names of all modules that the file imports; function bodies are left out on request."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        pending.extend(ast.iter_child_nodes(node))
    return found


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert len(found) > 3, f"{package} has moved; the rules below would pass on nothing"
    return found


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("formats", {"cache_builder", "trainer", "cli", "torch", "vllm", "transformers"}),
        ("cache_builder", {"trainer", "cli"}),
        ("trainer", {"cache_builder", "cli", "vllm"}),
    ],
)
def test_packages_keep_their_distance(package: str, forbidden: set[str]) -> None:
    broken = {
        str(path.relative_to(ROOT)): sorted(hit)
        for path in sources(package)
        if (hit := imports_of(path) & forbidden)
    }
    assert not broken


def test_cli_imports_heavy_packages_only_inside_commands() -> None:
    assert not imports_of(ROOT / "cli.py", top_level_only=True) & (HEAVY | {"trainer", "cache_builder"})


@pytest.mark.parametrize(
    "statement", ["import formats", "import cache_builder", "import trainer", "import cli"]
)
def test_importing_the_packages_loads_nothing_heavy(statement: str) -> None:
    probe = f"import sys; {statement}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_no_pickle_and_no_remote_code_by_default() -> None:
    """A cache or a checkpoint from a stranger must not be able to run code."""
    for package in ("formats", "cache_builder", "trainer"):
        for path in sources(package):
            assert "pickle" not in imports_of(path), f"{path} imports pickle"
            assert "trust_remote_code=True" not in path.read_text(encoding="utf-8"), path


def test_files_hold_one_idea() -> None:
    too_long = {
        str(path.relative_to(ROOT)): length
        for package in ("formats", "cache_builder", "trainer")
        for path in sources(package)
        if (length := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not too_long
