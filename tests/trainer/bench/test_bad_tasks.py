"""Bad input: one line, nothing written, before any model is loaded."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from bench_tasks import MULTIPLE_CHOICE, TINY_BASE, questions, write_forty
from corpora import write_jsonl
from warm_process import anneal

from formats.errors import ConfigError
from trainer import BenchSettings, bench_models
from trainer.bench.backends import choose_backend
from trainer.bench.catalogue import load_catalogue
from trainer.bench.suites import SUITES, TaskRequest


def refused(folder: Path, out: Path, message: str, *names: str, **more) -> None:
    """The command fails with the message, in one line, and leaves nothing."""
    with pytest.raises(ConfigError, match=message) as error:
        bench_models(
            {"a": TINY_BASE},
            BenchSettings(tasks=names or ("forty",), task_dirs=(str(folder),), out=str(out), **more),
        )
    assert "\n" not in str(error.value)
    assert not out.exists()


def edit(folder: Path, old: str, new: str) -> None:
    assert old in MULTIPLE_CHOICE
    (folder / "forty.yaml").write_text(MULTIPLE_CHOICE.replace(old, new))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no YAML": (
        lambda f: edit(f, "{test: forty.jsonl}", "{test: forty.jsonl"),
        r"must be YAML, got .*forty.yaml line 4",
    ),
    "no mapping": (
        lambda f: (f / "other.yaml").write_text("- 1\n"),
        r"must be YAML, got .*other\.yaml: Expected",
    ),
    "no data": (
        lambda f: (f / "forty.jsonl").unlink(),
        r"task forty needs its data, got no file .*forty\.jsonl",
    ),
    "no items": (lambda f: (f / "forty.jsonl").write_text(""), "task forty must "),
    "no JSON": (lambda f: (f / "forty.jsonl").write_text("{\n"), "task forty must load"),
    "unknown setting": (
        lambda f: edit(f, "test_split", "tset_split"),
        "task forty must load, got TypeError.*tset_split",
    ),
    "unknown metric": (
        lambda f: edit(f, "metric: acc,", "metric: accurazy,"),
        "metrics of a task must be known to the harness, got accurazy in forty",
    ),
    "unknown column": (
        lambda f: edit(f, "{{question}}", "{{qestion}}"),
        "task forty must load, got .*qestion",
    ),
    "unknown split": (
        lambda f: edit(f, "test_split: test", "test_split: tset"),
        "task forty must load, got .*tset",
    ),
    "no function": (
        lambda f: edit(f, "doc_to_target: gold", "doc_to_target: !function nowhere.gold"),
        "functions of a task must import.*nowhere",
    ),
}


@pytest.mark.parametrize("kind", list(BROKEN))
def test_broken_task_files(tmp_path: Path, kind: str) -> None:
    folder = write_forty(tmp_path / "tasks")
    change, message = BROKEN[kind]
    change(folder)
    refused(folder, tmp_path / "out", message)


def test_a_task_that_fails_while_it_runs_leaves_no_result(tmp_path: Path) -> None:
    folder = write_forty(tmp_path / "tasks")
    (folder / "scores.py").write_text("def score(doc, results):\n    return {'acc': 1 / (doc['gold'] - 3)}\n")
    edit(folder, "test_split: test\n", "test_split: test\nprocess_results: !function scores.score\n")
    message = "task forty failed on a: ZeroDivisionError"
    with pytest.raises(ConfigError, match=message):
        bench_models(
            {"a": TINY_BASE},
            BenchSettings(tasks=("forty",), task_dirs=(str(folder),), out=str(tmp_path / "out")),
        )
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_a_metric_that_does_not_suit_the_kind_of_the_task_is_not_left_out_in_silence(tmp_path: Path) -> None:
    folder = write_forty(tmp_path / "tasks")
    edit(folder, "metric: acc_norm, aggregation: mean", "metric: perplexity, aggregation: perplexity")
    settings = BenchSettings(tasks=("forty",), task_dirs=(str(folder),), out=str(tmp_path / "out"), limit=2)
    with pytest.raises(ConfigError, match="got perplexity in forty, of kind multiple_choice; leave it out"):
        bench_models({"a": TINY_BASE}, settings)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_shots_that_a_task_does_not_allow(tmp_path: Path) -> None:
    folder = write_forty(tmp_path / "tasks")
    refused(folder, tmp_path / "out", "examples for at most 39 shots, got 40; ask for fewer", "forty:40")
    edit(folder, "fewshot_split: test\n", "")
    refused(folder, tmp_path / "out", "no split for its examples, got 2 shots", "forty:2")
    edit(folder, "test_split: test\nfewshot_split: test\n", "validation_split: test\nfewshot_split: test\n")
    refused(folder, tmp_path / "out", "no split for its examples, got 2 shots", "forty:2")
    edit(folder, "fewshot_split: test\n", "num_fewshot: 0\n")
    refused(folder, tmp_path / "out", "no examples by its own rule, got 5 shots", num_fewshot=5)


def test_code_runs_only_with_permission(tmp_path: Path) -> None:
    folder = write_forty(tmp_path / "tasks")
    (folder / "scores.py").write_text(
        "import os\ndef score(doc, results):\n    return {'acc': float(os.environ.get('HF_ALLOW_CODE_EVAL') == '1')}\n"
    )
    edit(
        folder,
        "test_split: test\n",
        "test_split: test\nunsafe_code: true\nprocess_results: !function scores.score\n",
    )
    refused(folder, tmp_path / "out", "forty runs the code that the model writes; pass --allow-code")
    settings = BenchSettings(
        tasks=("forty",), task_dirs=(str(folder),), out=str(tmp_path / "out"), allow_code=True, limit=2
    )
    report = bench_models({"a": TINY_BASE}, settings)
    assert report.models[0].entries["forty"].metrics["acc,none"]["value"] == 1.0
    assert "HF_ALLOW_CODE_EVAL" not in os.environ


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tasks": ()}, "needs tasks, got none"),
        ({"suite": "papers"}, "--suite must be one of eaft"),
        ({"tasks": ("forty:many",)}, "takes NAME or NAME:SHOTS, got 'forty:many'"),
        ({"tasks": ("forty:1", "forty:2")}, "in one way per command, got forty with 1 and 2 shots"),
        ({"backend": "sglang"}, "--backend must be one of"),
        ({"dtype": "int8"}, "--dtype must be one of"),
        ({"limit": 0}, "--limit must be at least 1"),
        ({"tasks": ("forty:2",), "num_fewshot": 3}, "--num-fewshot is for tasks whose .*, got 3 and no such task"),
        ({"num_fewshot": -1}, "--num-fewshot must be at least 0"),
        ({"apply_chat_template": "maybe"}, "--apply-chat-template must be one of"),
        ({"task_dirs": 5}, "--task-dir must be a text or a list of texts, got 5"),
        ({"task_dirs": ("nowhere",)}, "--task-dir must be a directory of task files, got nowhere"),
        ({"backend": "transformers", "engine_args": {"seed": 1}}, "--engine-arg is for the vllm backend"),
        ({"out": "s3://bucket/o"}, "--out must be a directory on this machine, got the address s3://bucket/o"),
        ({"engine_args": {"seed": 1}}, "--engine-arg must not set seed, got 1; use --seed"),
    ],
)  # fmt: skip
def test_settings_are_checked(more: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchSettings(**{"tasks": ("forty",), **more})


@pytest.mark.parametrize(
    ("more", "asked"), [({"backend": "vllm"}, "--backend vllm"), ({"engine_args": {"a": 1}}, "--engine-arg")]
)
def test_vllm_runs_no_adapters_however_it_is_asked_for(tmp_path: Path, monkeypatch, more, asked) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    for installed, message in (
        (tmp_path, "runs full models, got adapters alone"),
        (None, "needs vLLM, which is"),
    ):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=installed: found)
        with pytest.raises(ConfigError, match=f"^{asked} {message}"):
            choose_backend(BenchSettings(tasks=("forty",), **more), {"a": tmp_path})


def test_one_task_and_one_folder_need_no_list(tmp_path: Path) -> None:
    """As they stand in a sweep's YAML: `bench: {task_dirs: my-tasks}`."""
    one = BenchSettings(tasks="forty", task_dirs=str(tmp_path))
    assert one == BenchSettings(tasks=["forty"], task_dirs=[str(tmp_path)])
    assert [request.name for request in one.requests()] == ["forty"] and one.task_dirs == (str(tmp_path),)


def test_models_must_agree_on_a_template(tmp_path: Path) -> None:
    import shutil

    bare = Path(shutil.copytree(TINY_BASE, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    folder = write_forty(tmp_path / "tasks")
    for choice, message in (("auto", "got none in bare; say"), ("yes", "got none in bare; use")):
        with pytest.raises(ConfigError, match=message):
            bench_models(
                {"a": TINY_BASE, "bare": bare},
                BenchSettings(tasks=("forty",), task_dirs=(str(folder),), apply_chat_template=choice),
            )
    assert not (bare / "bench.json").exists()


def test_the_command_line(tmp_path: Path) -> None:
    folder = write_forty(tmp_path / "tasks")
    write_jsonl(folder / "forty.jsonl", questions()[:4])
    command = [
        "bench",
        f"tiny={TINY_BASE}",
        "--task-dir",
        folder,
        "--tasks",
        "forty:1",
        "--out",
        tmp_path / "out",
    ]
    done = anneal(*command, "--json")
    found = json.loads(done.stdout)["models"][0]
    assert found["label"] == "tiny" and found["tasks"]["forty"]["num_items"] == 4
    assert found["tasks"]["forty"]["settings"]["num_fewshot"] == 1
    assert "Traceback" not in done.stderr and "transformers, " in done.stderr
    again = anneal(*command)
    assert again.stdout.splitlines()[1].split()[:4] == ["forty", "acc", "^", "1"]
    assert "1 of 1 tasks are done" in again.stderr
    bad = anneal(*command[:2], "--tasks", "forty", "--task-dir", "x")
    assert bad.returncode == 1 and bad.stderr.startswith("error: --task-dir must be")
    assert bad.stderr.count("\n") == 1


@pytest.mark.slow
def test_names_the_harness_does_not_know_and_data_that_needs_the_hub(tmp_path: Path) -> None:
    """Reads the harness's 14,000 files."""
    folder = write_forty(tmp_path / "tasks")
    with pytest.raises(
        ConfigError, match="known to lm-evaluation-harness, got 'hellaswagg'; did you mean hellaswag"
    ):
        load_catalogue([TaskRequest("hellaswagg")], [str(folder)], allow_code=False)
    with pytest.raises(ConfigError, match="task piqa needs a data set from the Hugging Face Hub") as error:
        load_catalogue([TaskRequest("forty"), TaskRequest("piqa")], [str(folder)], allow_code=False)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_suites_name_tasks_of_the_harness() -> None:
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_tasks)
    for name, suite in SUITES.items():
        assert {request.name for request in suite.tasks} <= known, name
