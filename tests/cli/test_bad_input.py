"""Bad input through the real command line: one clear line, exit code 1 or 2, nothing written."""

import shutil
import sys
from pathlib import Path

import pytest
import warm_process
from typed_here import Run, one_line

from formats import TeacherCache


def build(anneal: Run, corpus: Path | str, model: Path, out: Path, *more: str) -> str:
    """Run a build that must fail; returns its one-line error."""
    before = sorted(out.parent.iterdir()) if out.parent.is_dir() else None
    code, printed, err = anneal(
        "cache", "build", corpus, "--model", model, "--out", out, "--engine", "transformers", *more
    )
    assert code == 1, err
    assert printed == ""
    if before is not None and not out.exists():
        assert sorted(out.parent.iterdir()) == before
    return one_line(err)


def test_missing_corpus(anneal: Run, tiny_llama_dir: Path, tmp_path: Path) -> None:
    error = build(anneal, tmp_path / "nowhere.jsonl", tiny_llama_dir, tmp_path / "cache")
    assert "nowhere.jsonl" in error
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ("at least one record",)),
        ('{"foo": "a", "bar": 1}\n', ("foo", "bar", "messages")),
        ('{"text": "fine"}\n{"text": \n', ("line 2",)),
        ('{"input_ids": [5]}\n', ("two tokens", "1 record")),
    ],
)
def test_a_corpus_without_rows(
    anneal: Run, tiny_llama_dir: Path, tmp_path: Path, content: str, words: tuple[str, ...]
) -> None:
    (tmp_path / "corpus.jsonl").write_text(content)
    error = build(anneal, tmp_path / "corpus.jsonl", tiny_llama_dir, tmp_path / "cache")
    assert all(word in error for word in words), error


def test_model_without_tokenizer(anneal: Run, corpus: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_llama_dir / name, bare / name)
    assert "tokenizer" in build(anneal, corpus, bare, tmp_path / "cache")


def test_model_directory_that_is_none(anneal: Run, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "hollow").mkdir()
    assert "hollow" in build(anneal, corpus, tmp_path / "hollow", tmp_path / "cache")


def test_output_that_holds_something_else(
    anneal: Run, corpus: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.txt").write_text("years of work")
    for more in ((), ("--overwrite",)):
        assert "thesis" in build(anneal, corpus, tiny_llama_dir, out, *more)
        assert (out / "chapter1.txt").read_text() == "years of work"
        assert [path.name for path in out.iterdir()] == ["chapter1.txt"]


def test_output_below_a_file(anneal: Run, corpus: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "file" in build(anneal, corpus, tiny_llama_dir, tmp_path / "file" / "cache")


def test_unwritable_output(anneal: Run, corpus: Path, tiny_llama_dir: Path) -> None:
    out = Path("/sys/anneal-cache")  # refused to every user, root included
    assert str(out) in build(anneal, corpus, tiny_llama_dir, out)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--min-prob", "1.5"), "1.5"),
        (("--positions", "some"), "some"),
        (("--shards", "3"), "3"),
        (("--dtype", "int4"), "int4"),
        (("--head-dtype", "float16"), "float16"),
        (("--max-length", "4096"), "at most 1024 (the model's context), got 4096; pass --max-length 1024"),
        (("--engine-arg", "nonsense"), "KEY=VALUE"),
    ],
)
def test_build_settings(
    anneal: Run, corpus: Path, tiny_llama_dir: Path, tmp_path: Path, words: tuple[str, str], expected: str
) -> None:
    assert expected in build(anneal, corpus, tiny_llama_dir, tmp_path / "cache", *words)
    assert not (tmp_path / "cache").exists()


def test_another_rate_of_tail_draws(anneal: Run, corpus: Path, cache: Path, tiny_llama_dir: Path) -> None:
    error = build(anneal, corpus, tiny_llama_dir, cache, "--tail-draws", "4")
    assert "--tail-draws: 8 there, 4 now" in error and "--overwrite" in error


def test_a_seed_below_zero_draws_no_rows(
    anneal: Run, corpus: Path, cache: Path, tiny_llama_dir: Path
) -> None:
    for words in (("cache", "verify", cache), ("cache", "estimate", corpus)):
        code, printed, err = anneal(*words, "--model", tiny_llama_dir, "--seed", "-1")
        assert (code, printed) == (2, "") and "--seed" in err and "Traceback" not in err


def test_verification_by_an_engine_that_does_not_start(
    anneal: Run, cache: Path, tiny_llama_dir: Path
) -> None:
    words = ("--engine", "transformers", "--engine-arg", "device=nowhere")
    code, printed, err = anneal("cache", "verify", cache, "--model", tiny_llama_dir, *words)
    assert (code, printed) == (1, "") and "the engine must start, got RuntimeError" in one_line(err)


def test_wrong_usage_exits_with_two(anneal: Run, corpus: Path) -> None:
    code, _, err = anneal("cache", "build", corpus)
    assert code == 2 and "--model" in err
    assert anneal("cache", "dig")[0] == 2
    assert anneal("cache", "inspect", corpus, "--row", "first")[0] == 2
    for number in ("-1", "65", "many"):
        command = ("cache", "build", corpus, "--model", corpus, "--out", corpus, "--tail-draws", number)
        code, _, err = anneal(*command)
        assert code == 2 and "--tail-draws" in err


def test_inspect_of_what_is_no_cache(anneal: Run, tmp_path: Path) -> None:
    code, printed, err = anneal("cache", "inspect", tmp_path / "nowhere")
    assert (code, printed) == (1, "")
    assert "nowhere" in one_line(err)
    code, printed, err = anneal("cache", "inspect", tmp_path)
    assert (code, printed) == (1, "")
    one_line(err)


def test_inspect_of_a_row_beyond_the_end(anneal: Run, cache: Path) -> None:
    num_rows = len(TeacherCache(cache))
    code, printed, err = anneal("cache", "inspect", cache, "--row", str(num_rows))
    assert (code, printed) == (1, "")
    assert str(num_rows) in one_line(err)


def test_inspect_of_another_model(
    anneal: Run, cache: Path, tiny_qwen3_dir: Path, tiny_llama_dir: Path
) -> None:
    assert anneal("cache", "inspect", cache, "--model", tiny_llama_dir)[0] == 0
    code, _, err = anneal("cache", "inspect", cache, "--model", tiny_qwen3_dir)
    assert code == 1 and "weights" in one_line(err)


def test_a_damaged_shard_is_named(anneal: Run, cache: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    shard = copy / "shard-00000.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0x40
    shard.write_bytes(data)
    code, printed, err = anneal("cache", "verify", copy)
    assert code == 1 and "shard-00000.arrow" in printed
    assert "Traceback" not in err


def train(anneal: Run, cache: Path | str, model: Path, out: Path, *more: str) -> str:
    """Run a training that must be refused; returns its one-line error."""
    code, printed, err = anneal("train", cache, "--model", model, "--out", out, *more)
    assert code == 1, err
    assert printed == ""
    return one_line(err)


def test_train_into_something_else(anneal: Run, cache: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "photos"
    out.mkdir()
    (out / "cat.jpg").write_bytes(b"meow")
    assert "photos" in train(anneal, cache, tiny_llama_dir, out)
    assert (out / "cat.jpg").read_bytes() == b"meow"


def test_train_with_another_vocabulary_even_when_allowed(
    anneal: Run, cache: Path, tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    from tiny_models import save_tiny_model

    other = save_tiny_model(tmp_path / "wide", "llama", tiny_tokenizer_dir, vocab_size=512)
    error = train(anneal, cache, other, tmp_path / "out", "--allow-different-student")
    assert "vocab" in error and "1003" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--kl-coef", "-1"), "kl_coef"),
        (("--temperature", "0"), "temperature"),
        (("--kl-direction", "sideways"), "forward"),
        (("--set", "training.learning_rat=1"), "learning_rate"),
        (("--set", "kl_coeff=2"), "kl_coef"),
        (("--set", "nonsense"), "KEY=VALUE"),
        (("--config", "missing.yaml"), "missing.yaml"),
        (("--set", "ewc.coef=1", "--set", "ewc.cache=nowhere"), "nowhere"),
    ],
)
def test_train_settings(
    anneal: Run, cache: Path, tiny_llama_dir: Path, tmp_path: Path, words: tuple[str, ...], expected: str
) -> None:
    assert expected in train(anneal, cache, tiny_llama_dir, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_eval_names_must_differ(anneal: Run, cache: Path, tiny_llama_dir: Path) -> None:
    code, _, err = anneal("eval", cache, cache, "--model", tiny_llama_dir)
    assert code == 1 and "NAME=CACHE" in one_line(err)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("a=MODEL", "a=MODEL"), "got 'a' twice; write LABEL=DIR"),
        (("a=MODEL", "--initial", "a=MODEL"), "'a' for --initial and MODEL"),
        (("MODEL", "./nowhere"), "MODEL must be a model directory"),
        (("a=MODEL", "--initial", "OTHER"), "model weights"),
        (("MODEL", "--plot", "picture.gif"), ".png, .svg or .pdf"),
        (("MODEL", "--plot", "nowhere/picture.png"), "no directory nowhere"),
        (("MODEL", "--plot", "CACHE/picture.png"), "is a cache, which holds its own files alone"),
        (("MODEL", "--html", "CACHE/page.html"), "is a cache, which holds its own files alone"),
        (("MODEL", "--dtype", "int4"), "float32, bfloat16, float16"),
        (("MODEL", "--source", "./gone"), "gone"),
        (("MODEL", "--source", "gone"), "got no bench.json in"),
        (("MODEL", "--source", "a=CACHE"), "--source must have different names"),
        (("MODEL", "--direct", "nobody"), "--direct must be one of the models, got 'nobody'"),
        (("MODEL", "--html", "page.txt"), "writable .html file"),
        (("MODEL", "--html", "nowhere/page.html"), "no directory nowhere"),
    ],
)
def test_compare(
    anneal: Run,
    cache: Path,
    tiny_llama_dir: Path,
    tiny_qwen3_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": tiny_llama_dir, "OTHER": tiny_qwen3_dir, "CACHE": cache}
    given = list(words)
    for word, place in places.items():
        given = [text.replace(word, str(place)) for text in given]
    code, printed, err = anneal("compare", "--source", f"a={cache}", "--target", cache, *given)
    assert (code, printed) == (1, "") and expected in one_line(err)
    assert list(tmp_path.iterdir()) == []


def test_compare_without_matplotlib(
    anneal: Run, cache: Path, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = ("--source", cache, "--target", cache, "--plot", tmp_path / "p.png")
    code, printed, err = anneal("compare", tiny_llama_dir, *words)
    assert (code, printed) == (1, "") and "pip install 'label-annealing[plot]'" in one_line(err)
    assert list(tmp_path.iterdir()) == []


def test_compare_needs_both_texts(anneal: Run, cache: Path, tiny_llama_dir: Path) -> None:
    code, _, err = anneal("compare", tiny_llama_dir, "--source", cache)
    assert code == 2 and "--target" in err
    assert anneal("compare", "--source", cache, "--target", cache)[0] == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "a selection needs the initial model, got none; name it with --initial MODEL"),
        (("--initial", "base=MODEL", "--rule", "best"), "--rule must be paper, keep-gain:SHARE"),
        (
            ("--initial", "base=MODEL", "--work", "WORK"),
            "keep-gain:0.9 needs direct fine-tuning to relate to",
        ),
    ],
)
def test_select(
    anneal: Run, cache: Path, tiny_llama_dir: Path, tmp_path: Path, words: tuple[str, ...], expected: str
) -> None:
    given = [word.replace("MODEL", str(tiny_llama_dir)).replace("WORK", str(tmp_path)) for word in words]
    code, printed, err = anneal("select", tiny_llama_dir, "--source", cache, "--target", cache, *given)
    assert (code, printed) == (1, "") and expected in one_line(err)
    assert list(tmp_path.iterdir()) == [], "refused before anything is evaluated"


def test_eval_in_an_unknown_dtype(anneal: Run, cache: Path, tiny_llama_dir: Path) -> None:
    code, printed, err = anneal("eval", cache, "--model", tiny_llama_dir, "--dtype", "int4")
    assert (code, printed) == (1, "") and "bfloat16" in one_line(err)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = warm_process.anneal("--debug", "cache", "inspect", tmp_path / "nowhere")
    assert result.returncode == 1 and "Traceback" in result.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--method", "broth"), "wise-ft, task-arithmetic, ties, soup, fisher"),
        (("--method", "wise-ft", "--alpha", "2"), "--alpha must lie in [0, 1.5]"),
        (("--method", "ties", "--trim", "row"), "--trim must be one of model, tensor"),
        (("--method", "ties", "--weights", "1,2"), "--weights must have one number per tuned model"),
        (("--method", "ties", "--weights", "half"), "--weights takes numbers with commas"),
        (("--method", "wise-ft", "--weights", "1"), "wise-ft has no --weights"),
        (("--method", "ties", "--density", "0"), "--density must be above 0"),
        (("--method", "wise-ft", "--scale", "1"), "wise-ft has no --scale"),
    ],
)
def test_merge_settings(
    anneal: Run, tiny_llama_dir: Path, tmp_path: Path, words: tuple[str, ...], expected: str
) -> None:
    code, printed, err = anneal(
        "merge", tiny_llama_dir, "--initial", tiny_llama_dir, "--out", tmp_path / "out", *words
    )
    assert (code, printed) == (1, "") and expected in one_line(err)
    assert list(tmp_path.iterdir()) == []


def test_merge_of_unrelated_models(
    anneal: Run, tiny_llama_dir: Path, tiny_qwen3_dir: Path, tmp_path: Path
) -> None:
    words = ("--initial", tiny_llama_dir, "--out", tmp_path / "out", "--method", "wise-ft")
    for tuned in (tiny_qwen3_dir, tmp_path / "nowhere"):
        code, printed, err = anneal("merge", tuned, *words)
        assert (code, printed) == (1, "") and str(tuned) in one_line(err)
    assert list(tmp_path.iterdir()) == []
