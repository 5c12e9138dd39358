"""What an option says is done or refused by name: options that need another one, the name of what is at fault."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typed_here import Run


def refused(anneal: Run, *words: str | Path) -> str:
    """The one line of a command that must fail."""
    code, printed, err = anneal(*words)
    assert (code, printed) == (1, "") and err.count("\n") == 1 and err.startswith("error: "), err
    return err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("cache verify CACHE --rows 3", "--rows needs --model, got 3 without it"),
        ("cache verify CACHE --engine vllm", "--engine needs --model, got vllm"),
        ("cache verify CACHE --seed 0", "--seed needs --model, got 0"),
        ("cache verify CACHE --engine-arg a=1", "--engine-arg needs --model, got a=1"),
        ("cache build CORPUS --model MODEL --out OUT --ray-workers 2", "--ray-workers needs --ray, got 2"),
        ("cache build CORPUS --model MODEL --out OUT --revision x", "got x of the directory"),
        ("cache estimate CORPUS --model MODEL --revision x", "got x of the directory"),
        ("sweep CACHE --model MODEL --out OUT TEXTS --merge-of all", "--merge-of needs --merge, got all"),
        ("compare MODEL TEXTS --bench OUT", "--bench needs a task among --source and --target, got"),
        ("compare MODEL --source piqa --target asdiv --work OUT", "--work needs a cache among --source"),
        ("compare MODEL --source piqa --target asdiv --limit 3", "--limit needs a cache among --source"),
        (
            "select MODEL --initial MODEL --source piqa --target asdiv --dtype bfloat16",
            "--dtype needs a cache among --source and --target, got bfloat16",
        ),
        ("compare MODEL TEXTS --work CACHE/manifest.json", "--work must be a folder to remember"),
        (
            "sweep CACHE --model MODEL --out OUT TEXTS --search-runs 3",
            "search_runs (--search-runs) needs search: true (--search), got 3",
        ),
        (
            "sweep CACHE --model MODEL --out OUT TEXTS --bench limit=5",
            "bench (limit) needs a task among source",
        ),
    ],
)
def test_an_option_that_needs_another(
    anneal: Run, cache: Path, tiny_llama_dir: Path, tmp_path: Path, words: str, message: str
) -> None:
    texts = f"--source s={cache} --target t={cache}"
    places = {"CACHE": cache, "MODEL": tiny_llama_dir, "OUT": tmp_path / "out", "CORPUS": "corpus.jsonl"}
    words = words.replace("TEXTS", texts).replace("CACHE/", f"{cache}/")
    typed = [str(places.get(word, word)) for word in words.split()]
    assert message in refused(anneal, *typed)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("restore MODEL --initial ./nowhere --text CACHE --source s=CACHE --out OUT", "--initial"),
        ("restore ./nowhere --initial MODEL --text CACHE --source s=CACHE --out OUT", "TUNED"),
        ("chain --models MODEL x=./nowhere --heldout a=CACHE --out OUT", "MODEL"),
        ("chain --models MODEL --initial ./nowhere --heldout a=CACHE --out OUT", "--initial"),
        ("probe noise ./nowhere --source s=CACHE", "MODEL"),
        ("probe noise MODEL --source s=CACHE --init ./nowhere", "--init"),
        ("probe tune ./nowhere --text CACHE --source s=CACHE --target t=CACHE --lr 1e-4 --out OUT", "MODEL"),
        ("cache convert a.jsonl --tokenizer ./nowhere --parquet OUT.parquet", "--tokenizer"),
    ],
)
def test_a_model_that_is_not_there_is_called_what_it_was_typed_as(
    anneal: Run, cache: Path, tiny_llama_dir: Path, tmp_path: Path, words: str, option: str
) -> None:
    found = words.replace("CACHE", str(cache)).replace("MODEL", str(tiny_llama_dir))
    typed = found.replace("OUT", str(tmp_path / "out")).split()
    assert f"error: {option} must be a model directory or a Hugging Face name" in refused(anneal, *typed)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dry", ["", "--dry-run"])
@pytest.mark.parametrize(
    ("task", "what"),
    [("a=TEXT,nowhere.jsonl", "tasks.a.heldout"), ("a=nowhere.jsonl,TEXT", "tasks.a.train")],
)
def test_a_chain_looks_at_every_text_before_the_first_stage(
    anneal: Run, corpus: Path, tiny_llama_dir: Path, tmp_path: Path, task: str, what: str, dry: str
) -> None:
    words = ["chain", "--task", f"first={corpus},{corpus}", "--task", task.replace("TEXT", str(corpus))]
    typed = [*words, "--model", str(tiny_llama_dir), "--out", str(tmp_path / "out"), *dry.split()]
    err = refused(anneal, *typed)
    assert f"error: {what}: the corpus must be an existing file" in err and "got nowhere.jsonl" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        "restore MODEL --initial MODEL --source s=CACHE --lr 1e-4 --tokens 9",
        "probe tune MODEL --source s=CACHE --target t=CACHE --lr 1e-4",
    ],
)
def test_a_text_that_is_not_there_leaves_nothing_behind(
    anneal: Run, cache: Path, tiny_llama_dir: Path, tmp_path: Path, words: str
) -> None:
    typed = words.replace("CACHE", str(cache)).replace("MODEL", str(tiny_llama_dir)).split()
    err = refused(anneal, *typed, "--text", "nowhere.jsonl", "--out", tmp_path / "out")
    assert "error: --text: the corpus must be an existing file" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", ["chain --task a=CACHE,CACHE", "sweep CACHE --source s=CACHE --target t=CACHE"]
)
def test_a_dry_run_wants_a_place_for_its_runs_and_a_model(
    anneal: Run, cache: Path, corpus: Path, tiny_llama_dir: Path, words: str
) -> None:
    typed = [*words.replace("CACHE", str(cache)).split(), "--dry-run"]
    err = refused(anneal, *typed, "--model", tiny_llama_dir, "--out", corpus)
    assert f"--out must be a directory that can be written, got {corpus}: Not a directory" in err
    err = refused(anneal, *typed, "--model", cache, "--out", corpus.parent / "out")
    assert f"--model must be a model directory, got no config.json in {cache}" in err


@pytest.mark.parametrize("name", ["x.gif", "nowhere/x.png"])
def test_a_picture_of_a_cache_is_refused_before_the_work(
    anneal: Run, cache: Path, tmp_path: Path, name: str
) -> None:
    assert "writable .png, .svg or .pdf" in refused(
        anneal, "cache", "inspect", cache, "--plot", tmp_path / name
    )
    assert list(tmp_path.iterdir()) == []


def test_responses_without_a_line_make_no_file(anneal: Run, tiny_llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    words = ("--tokenizer", tiny_llama_dir, "--parquet", tmp_path / "x.parquet")
    assert "must be a row to write, got none" in refused(
        anneal, "cache", "convert", tmp_path / "empty.jsonl", *words
    )
    assert [place.name for place in tmp_path.iterdir()] == ["empty.jsonl"]


@pytest.mark.parametrize("words", ["train CACHE --out OUT", "cache build a.jsonl --out OUT"])
def test_a_directory_that_holds_no_model(anneal: Run, cache: Path, tmp_path: Path, words: str) -> None:
    typed = words.replace("CACHE", str(cache)).replace("OUT", str(tmp_path / "out")).split()
    assert refused(anneal, *typed, "--model", cache) == (
        f"error: --model must be a model directory, got no config.json in {cache}\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_settings_into_a_place_that_cannot_be(anneal: Run, corpus: Path, tiny_llama_dir: Path) -> None:
    """The name that was typed, not that of a temporary file."""
    err = refused(anneal, "init", corpus, "--model", tiny_llama_dir, "--file", corpus / "train.yaml")
    assert err.startswith(
        f"error: --file must name a file that can be written, got {corpus / 'train.yaml'}: "
    )
    gone = corpus.parent / "gone"
    err = refused(anneal, "init", corpus, "--model", tiny_llama_dir, "--file", gone / "train.yaml")
    assert (
        err
        == f"error: --file must name a file that can be written, got {gone / 'train.yaml'}: no directory {gone}\n"
    )
    assert not gone.exists()


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", b"\\xef"), ("utf-8", "ï".encode())])
def test_a_name_that_the_terminal_cannot_show(
    cache: Path, tmp_path: Path, encoding: str, shown: bytes
) -> None:
    """A whole process: its stdout is made by the interpreter."""
    (tmp_path / "naïve").symlink_to(cache)
    done = subprocess.run(
        [sys.executable, "-m", "cli", "cache", "inspect", tmp_path / "naïve"],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"na" + shown + b"ve" in done.stdout


def test_a_closed_stdout_is_no_error(cache: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -m cli cache inspect "{cache}" >&-'],
        cwd=Path(__file__).resolve().parents[2],
        stderr=subprocess.PIPE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
