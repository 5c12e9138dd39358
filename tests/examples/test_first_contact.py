"""The notebook runs as it is committed: every cell in order, in a folder of examples; what it shows comes out."""

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "first_contact.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def code_cells() -> list[str]:
    return ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """A folder of examples that a run may write beside."""
    folder = tmp_path / "examples"
    folder.mkdir()
    for name in ("stdlib_text.py", NOTEBOOK.name):
        shutil.copy(ROOT / "examples" / name, folder / name)
    (folder / "tiny-base").symlink_to(ROOT / "examples" / "tiny-base")
    return folder


def test_the_committed_outputs_tell_no_machine_and_no_error() -> None:
    outputs = [output for cell in CELLS for output in cell.get("outputs", [])]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]
    text = json.dumps(outputs)
    assert "/tmp" not in text and "/home" not in text and "/root" not in text and "site-packages" not in text
    counts = [cell["execution_count"] for cell in CELLS if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run from the top in one go"


def test_every_cell_runs_and_annealing_forgets_less(
    examples: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(examples)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names: dict = {"__name__": "__main__"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, source in enumerate(code_cells()):
            exec(compile(source, f"cell {number}", "exec"), names)
    lines = {line.label: line for line in names["comparison"].models}
    source = {label: line.cells["source:prose"].value for label, line in lines.items()}
    target = {label: line.cells["target:code"].value for label, line in lines.items()}
    initial, direct, annealed = "initial model", "direct fine-tuning", "label annealing"
    assert source[initial] < source[annealed] < source[direct]
    assert target[direct] < target[initial] and target[annealed] < target[initial]
    assert "| prose (source) |" in printed.getvalue()
    assert not (ROOT / "examples" / "tiny-base" / "evaluations.json").exists()


@pytest.mark.slow
def test_a_kernel_runs_it(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(examples / NOTEBOOK.name, as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(
        notebook, timeout=1500, kernel_name="python3", resources={"metadata": {"path": str(examples)}}
    )
    client.execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "text" in output
    )
    assert "label annealing" in printed and "| prose (source) |" in printed
