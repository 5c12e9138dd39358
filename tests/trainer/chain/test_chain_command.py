"""`anneal chain` as it is typed: finished models, corpora whose caches the stages build, a chain that is killed."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml
from corpora import write_jsonl
from pool_here import InThisProcess
from runs import QUICK, copy_model, noise, same_weights
from warm_process import Command
from warm_process import anneal as anneal_process

from formats.errors import AnnealError, ConfigError
from trainer import evaluate
from trainer.chain.caches import CacheMaker
from trainer.chain.config import ChainConfig, Task
from trainer.chain.releases import read_finished
from trainer.sweep.sweep import held

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def releases(tiny_llama_dir, tmp_path_factory):
    """Three models, each with more noise, as from another tool: no anneal.json."""
    folder = tmp_path_factory.mktemp("releases")
    return [copy_model(tiny_llama_dir, folder / f"v{n}", noise(n, 0.02 * n)) for n in (1, 2, 3)]


def test_a_report_on_releases(anneal, releases, tiny_llama_dir, task_caches, tmp_path):
    texts = {name: task_caches[name][1] for name in ("one", "two")}
    words = ["chain", "--models", *releases, "--initial", tiny_llama_dir, "--out", tmp_path / "out"]
    words += [word for name, text in texts.items() for word in ("--heldout", f"{name}={text}")]
    code, out, err = anneal(*words, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [row["label"] for row in found["rows"]] == [tiny_llama_dir.name, "v1", "v2", "v3"]
    for row, values in zip(found["rows"], found["R"], strict=True):
        again = evaluate(row["directory"], texts, kl=False)
        assert values == [-again[name]["ce"] for name in texts]
    R = [row[0] for row in found["R"]]
    assert found["lost"]["one"]["lost"] == pytest.approx(max(R[:-1]) - R[-1])
    assert found == json.loads((tmp_path / "out/matrix.json").read_text())
    code, out, err = anneal(*words, "--plot", tmp_path / "m.png")
    assert code == 0 and (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    assert (
        out.splitlines()[0].split() == ["perplexity", "one", "two"] and "lost: the best earlier model" in out
    )
    assert "rows" not in err, "evaluations are remembered"


def test_finished_stages_get_the_whole_report(anneal, releases, tiny_llama_dir, task_caches, tmp_path):
    tasks = {f"t{n}": {"model": str(m), "heldout": task_caches["one"][1]} for n, m in enumerate(releases)}
    file = tmp_path / "chain.yaml"
    file.write_text(
        yaml.safe_dump({"model": str(tiny_llama_dir), "tasks": tasks, "metric": "accuracy"}, sort_keys=False)
    )
    code, out, err = anneal("chain", file, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert len(found["R"]["chain"]) == 4 and found["metric"] == "accuracy"
    assert found["summary"]["chain"]["backward transfer"] is not None
    code, out, err = anneal("chain", file, "--out", tmp_path / "out", "--plot", tmp_path / "m.svg")
    assert code == 0 and "token accuracy after" in out and "backward transfer" in out
    drawn = (tmp_path / "m.svg").read_bytes()
    assert b"<svg" in drawn and b"share worse than the best" in drawn and b"nats" not in drawn


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "a", "--out", "o", "--task", "a=b,c"], "--models trains nothing"),
        (
            ["--models", "{model}", "--out", "{tmp}", "--heldout", "a={text}"],
            "needs two models at least, got 1",
        ),
        (["--models", "{model}", "x={model}", "--out", "{tmp}"], "needs held-out texts, got none"),
        (["--models", "{model}", "{model}", "--out", "{tmp}"], "models must have different labels"),
        (["--models", "{model}", "x={model}", "--heldout", "a={text}"], "out must name a directory"),
        (["a.yaml", "b.yaml", "--out", "o"], "a chain is one file, got 2 words"),
        (["--out", "o", "--heldout", "a={text}"], "--heldout is for --models"),
        (["--out", "o", "--model", "{model}"], "a chain needs tasks"),
        (
            ["--out", "{tmp}", "--task", "a={text},{text}", "--build", "engin=vllm", "--model", "{model}"],
            "got engin;",
        ),
        (
            ["--out", "{tmp}", "--task", "a=b.txt,{text}", "--build", "revision=v1", "--model", "{model}"],
            "got revision;",
        ),
        (
            ["--out", "{tmp}", "--task", "a={text},{text}", "--build", "max_length=8", "--model", "{model}"],
            "--build settings need a corpus",
        ),
        (
            ["--out", "{tmp}", "--task", "a={text},{text}", "--plot", "x.gif", "--model", "{model}"],
            "writable .png",
        ),
    ],
)
def test_bad_words_are_one_line(anneal, tiny_llama_dir, task_caches, tmp_path, words, message):
    known = {"model": tiny_llama_dir, "tmp": tmp_path / "out", "text": task_caches["one"][1]}
    code, out, err = anneal("chain", *(word.format(**known) for word in words))
    assert (code, out) == (1, "") and err.count("\n") == 1 and message in err, err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_would_be_done(anneal, tiny_llama_dir, task_caches, tmp_path):
    words = [w for name in ("one", "two") for w in ("--task", f"{name}={','.join(task_caches[name])}")]
    words += ["--model", tiny_llama_dir, "--out", tmp_path / "out", "--compare", "never-seen", "--dry-run"]
    code, out, err = anneal("chain", *words)
    assert code == 0, err
    assert out.splitlines() == [
        "stages/1-one          to do     from the initial model",
        "stages/2-two          to do     from stages/1-one",
        "controls/without-one  to do     from the initial model",
        "controls/without-two  to do     from the initial model",
    ]
    code, out, err = anneal("chain", *words, "--json")
    runs = {run["name"]: (run["after"], run["finished"]) for run in json.loads(out)["runs"]}
    assert len(runs) == 4 and runs["stages/2-two"] == ("stages/1-one", False), err
    assert not (tmp_path / "out").exists()


def test_each_stage_builds_the_cache_that_the_next_one_is_held_by(tiny_llama_dir, task_caches, tmp_path):
    """anchor previous: KL of stage 2 is to stage 1, whose model captured the corpus; a second call builds nothing."""
    from cache_builder import BuildConfig, build_cache
    from trainer.chain.chain import plan_chain, run_chain
    from trainer.chain.config import chain_from_options

    text = "the cat sat on the mat and the dog sat on the cat " * 4
    corpora = [
        write_jsonl(tmp_path / f"{n}.jsonl", [{"text": f"{n} {i} {text}"} for i in range(8)]) for n in "ab"
    ]
    calls = []

    def build(corpus, model, out, options):
        calls.append((corpus, out))
        build_cache(BuildConfig(corpus=corpus, model=model, out=out, **options))

    options = {
        "build": ["engine=transformers"],
        "method": ["kl_coef=1"],
        "overrides": [w for w in QUICK if "step0" not in w],
    }
    words = [f"{n}={corpus},{task_caches['one'][1]}" for n, corpus in zip("ab", corpora, strict=True)]
    config = chain_from_options(
        None, tasks=words, model=str(tiny_llama_dir), out=str(tmp_path / "out"), **options
    )
    report = run_chain(config, build=build, pool=InThisProcess())
    assert not report.failed
    caches = tmp_path / "out/caches"
    assert calls == [(str(corpora[0]), str(caches / "a")), (str(corpora[1]), str(caches / "b-by-1-a"))]
    record = json.loads((tmp_path / "out/stages/2-b/anneal.json").read_text())
    first = json.loads((tmp_path / "out/stages/1-a/anneal.json").read_text())
    assert record["kl_to"]["weights"] == record["lineage"][-1]["weights"] != first["lineage"][-1]["weights"]
    assert record["step0"]["kl"] < 1e-3, "the model of stage 1 is the teacher of stage 2"
    pool = InThisProcess()
    run_chain(config, build=build, pool=pool)
    assert len(calls) == 2 and pool.names == []
    controls = plan_chain(replace(config, compare=["direct", "multitask"]), build).direct
    assert [run.settings["cache"] for run in controls] == [str(caches / "a"), str(caches / "b-by-1-a")]
    corpora[0].write_text(corpora[1].read_text())
    with pytest.raises(Exception, match=r"--out keeps its texts, but in .*caches/a content was"):
        run_chain(config, build=build, pool=pool)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_chain_ends_with_the_same_matrix(number, tiny_llama_dir, task_caches, tmp_path):
    """The kill comes in the middle of stage 2; what that stage had saved is used."""

    def command(out):
        words = ["chain", "--model", tiny_llama_dir, "--out", out, "--method", "sfa.beta=0.5"]
        words += [w for name in ("one", "two") for w in ("--task", f"{name}={','.join(task_caches[name])}")]
        for override in (
            *QUICK,
            "training.max_steps=4",
            "training.save_strategy=steps",
            "training.save_steps=1",
        ):
            words += ["--set", override]
        return [str(word) for word in words]

    whole, out = tmp_path / "whole", tmp_path / "out"
    done = anneal_process(*command(whole))
    assert done.returncode == 0, done.stderr
    process = Command(*command(out))
    second = out / "stages/2-two"
    while not list(second.glob("checkpoint-*/trainer_state.json")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    stopped = process.communicate()
    assert stopped.returncode == (143 if number == signal.SIGTERM else -9)
    if number == signal.SIGTERM:
        assert "stopped by SIGTERM with 1 of 2 runs finished; the same command continues" in stopped.stderr
    assert not (out / "matrix.json").exists()
    done = anneal_process(*command(out))
    assert done.returncode == 0, done.stderr
    assert same_weights(out / "stages/2-two", whole / "stages/2-two")
    found, expected = ((place / "matrix.json").read_bytes() for place in (out, whole))
    assert found.replace(str(out).encode(), str(whole).encode()) == expected


@pytest.mark.slow
def test_a_cache_is_built_in_a_process_of_its_own(tiny_llama_dir, tmp_path):
    from commands.cache_process import build_in_process
    from formats.cache import TeacherCache
    from formats.errors import AnnealError

    corpus = write_jsonl(tmp_path / "a.jsonl", [{"text": "the cat sat on the mat " * 3}] * 3)
    build_in_process(str(corpus), str(tiny_llama_dir), str(tmp_path / "cache"), {"engine": "transformers"})
    assert len(TeacherCache(tmp_path / "cache")) == 3
    with pytest.raises(AnnealError, match=r"cache .*other of .*nowhere\.jsonl: "):
        build_in_process(str(tmp_path / "nowhere.jsonl"), str(tiny_llama_dir), str(tmp_path / "other"), {})


def test_a_text_that_moved_is_the_same_text(tiny_llama_dir, task_caches, tmp_path):
    """A corpus that is a file is known by its content, so its cache stays right wherever the file goes."""
    corpus, place = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}]), tmp_path / "out/caches/a"
    built = []

    def build(corpus, model, out, options):
        built.append(corpus)
        shutil.copytree(task_caches["one"][0], out)

    maker = CacheMaker(out=tmp_path / "out", options={}, build=build)
    maker.make(str(corpus), str(tiny_llama_dir), str(place))
    moved = corpus.rename(tmp_path / "b.jsonl")
    maker.make(str(moved), str(tiny_llama_dir), str(place))
    assert built == [str(corpus)]
    moved.write_text(json.dumps({"text": "two"}))
    with pytest.raises(ConfigError, match="content was"):
        maker.make(str(moved), str(tiny_llama_dir), str(place))


def test_a_text_of_which_nothing_was_built_may_be_mended(tiny_llama_dir, task_caches, tmp_path):
    corpus, place = write_jsonl(tmp_path / "a.jsonl", [{"txet": "one"}]), tmp_path / "out/caches/a"

    def build(corpus, model, out, options):
        if "txet" in Path(corpus).read_text():
            raise ConfigError("no known layout")
        shutil.copytree(task_caches["one"][0], out)

    maker = CacheMaker(out=tmp_path / "out", options={}, build=build)
    with pytest.raises(ConfigError, match="no known layout"):
        maker.make(str(corpus), str(tiny_llama_dir), str(place))
    write_jsonl(corpus, [{"text": "one"}])
    maker.make(str(corpus), str(tiny_llama_dir), str(place))
    assert maker.place("a", str(corpus)) == str(place) and place.is_dir()


@pytest.fixture
def maker_of(tiny_llama_dir, tmp_path):
    """Makes `caches/a` of a text by the real build; the texts that went through it are noted."""
    from cache_builder import BuildConfig, build_cache

    built = []

    def build(corpus, model, out, options):
        built.append(corpus)
        build_cache(BuildConfig(corpus=corpus, model=model, out=out, **options))

    maker = CacheMaker(out=tmp_path / "out", options={"engine": "transformers"}, build=build)

    def make(text) -> list[str]:
        built.clear()
        maker.make(str(text), str(tiny_llama_dir), str(tmp_path / "out/caches/a"))
        return list(built)

    return make


@pytest.mark.parametrize("what", ["folder", "folder/*.jsonl"])
def test_a_file_more_in_a_folder_is_another_text(what, maker_of, tmp_path):
    text = tmp_path / what
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder/one.jsonl", [{"text": "one and one"}])
    assert maker_of(text) == [str(text)] and maker_of(text) == []
    (tmp_path / "folder/README.md").write_text("What this is.")
    assert maker_of(text) == ([str(text)] if what == "folder" else []), "looked at: it is no text"
    assert maker_of(text) == []
    write_jsonl(tmp_path / "folder/two.jsonl", [{"text": "two and two"}])
    for _ in range(2):  # a refusal is no answer for the next time
        with pytest.raises(AnnealError, match=r"finished cache with other settings .*corpus contents"):
            maker_of(text)


@pytest.mark.parametrize("note", ["", "[]", None])
def test_a_note_that_is_gone_vouches_for_nothing(note, maker_of, tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"text": "one and one"}])
    assert maker_of(corpus) == [str(corpus)]
    place = tmp_path / "out/caches/a.json"
    whole = place.read_text()

    def damage() -> None:
        if note is None:
            place.unlink()
        else:
            place.write_text(note)

    damage()
    assert maker_of(corpus) == [str(corpus)] and place.read_text() == whole and maker_of(corpus) == []
    damage()
    write_jsonl(corpus, [{"text": "two and two"}])
    with pytest.raises(AnnealError, match=r"finished cache with other settings .*corpus contents"):
        maker_of(corpus)


def test_releases_do_not_take_the_matrix_of_a_chain(anneal, releases, task_caches, tmp_path):
    (tmp_path / "out/stages").mkdir(parents=True)
    (tmp_path / "out/matrix.json").write_text("the chain's")
    words = ["chain", "--models", *releases, "--heldout", f"one={task_caches['one'][1]}"]
    code, _, err = anneal(*words, "--out", tmp_path / "out")
    assert code == 1 and "takes a directory of its own" in err and err.count("\n") == 1
    assert (tmp_path / "out/matrix.json").read_text() == "the chain's"
    with held(tmp_path / "other", "report"):
        code, _, err = anneal(*words, "--out", tmp_path / "other")
    assert code == 1 and "--out must belong to one report" in err


def test_an_initial_model_that_is_called_like_a_stage_has_a_row(
    releases, tiny_llama_dir, task_caches, tmp_path
):
    first = shutil.copytree(tiny_llama_dir, tmp_path / "1-one")
    task = Task(model=str(releases[0]), heldout=task_caches["one"][1])
    config = ChainConfig(tasks={"one": task}, out=str(tmp_path / "out"), model=str(first))
    report = read_finished(config, limit=1)
    assert [(row.label, row.kind) for row in report.rows] == [("initial", "initial"), ("1-one", "stage")]
    assert report.matrix() is not None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_build_ends_with_the_command_that_needs_it(number, tiny_llama_dir, tmp_path):
    """In order: what it has committed stays."""
    corpus = write_jsonl(
        tmp_path / "a.jsonl", [{"text": f"{n} the cat sat on the mat " * 6} for n in range(9000)]
    )
    call = (str(corpus), str(tiny_llama_dir), str(tmp_path / "cache"), {"engine": "transformers"})
    code = f"from commands.cache_process import build_in_process; build_in_process(*{call!r})"
    command = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, cwd=ROOT)
    while not (tmp_path / "cache").is_dir() and command.poll() is None:
        time.sleep(0.05)
    builds = psutil.Process(command.pid).children(recursive=True)
    command.send_signal(number)
    command.wait()
    assert builds and not psutil.wait_procs(builds, timeout=120)[1]
