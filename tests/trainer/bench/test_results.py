"""What happens to results: they belong to weights and settings, are not computed twice, and are never mixed."""

import hashlib
import json
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from bench_tasks import DOCUMENTS, TINY_BASE, questions, write_forty
from corpora import write_jsonl
from warm_process import Command

from formats.errors import AnnealError, ConfigError, FormatError, IdentityMismatchError
from trainer import BenchSettings, bench_models, load_bench, paired
from trainer.bench.bench_file import BenchEntry, BenchFile


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_forty(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY_BASE, tmp_path / "model"))


def settings(folder: Path, *names: str, **more) -> BenchSettings:
    more = {"limit": 6, "apply_chat_template": "no", **more}
    return BenchSettings(tasks=names or ("forty",), task_dirs=(str(folder),), **more)


def nudge(model: Path, factor: float = 2.0) -> None:
    """Other weights: the last norm is scaled, which makes every prediction sharper or flatter."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * factor
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_a_second_run_computes_nothing_and_a_change_computes_again(model: Path, tmp_path: Path) -> None:
    folder = write_forty(tmp_path / "tasks")
    first = bench_models({"a": model}, settings(folder))
    assert first.models[0].ran == ("forty",)
    before = (model / "bench.json").read_bytes()
    assert bench_models({"a": model}, settings(folder, batch_size=3)).models[0].ran == ()
    assert (model / "bench.json").read_bytes() == before
    moved = Path(shutil.move(folder, tmp_path / "moved"))
    assert bench_models({"a": model}, settings(moved)).models[0].ran == ()
    # Other settings, another file, other data: each is a result of its own.
    assert bench_models({"a": model}, settings(moved, seed=1)).models[0].ran == ("forty",)
    task_file = moved / "forty.yaml"
    task_file.write_text(task_file.read_text().replace('"{{question}}"', '"Q: {{question}}"'))
    assert bench_models({"a": model}, settings(moved)).models[0].ran == ("forty",)
    write_jsonl(moved / "forty.jsonl", questions()[1:])
    assert bench_models({"a": model}, settings(moved)).models[0].ran == ("forty",)
    results = json.loads((model / "bench.json").read_text())["results"]
    assert len(results) == 4 and len({json.dumps(r["settings"], sort_keys=True) for r in results}) == 4
    # Items that are gone or damaged are computed again.
    for result in results:
        (model / result["samples"]).write_bytes(b"")
    with pytest.raises(ConfigError, match="forty: results are compared under one setting"):
        paired(load_bench(model), load_bench(model))
    alone = load_bench(model)
    for key in list(alone.entries)[1:]:
        del alone.entries[key]
    with pytest.raises(FormatError, match="items of forty must be those"):
        paired(alone, alone)
    assert bench_models({"a": model}, settings(moved)).models[0].ran == ("forty",)


def test_a_killed_run_goes_on_with_the_next_task(model: Path, tmp_path: Path) -> None:
    folder = write_forty(tmp_path / "tasks")
    text = " ".join(record["question"] for record in questions())
    write_jsonl(folder / "documents.jsonl", [{"text": text}] * 2000)
    (folder / "documents.yaml").write_text(DOCUMENTS)
    options = ["--apply-chat-template", "no", "--tasks", "forty,documents"]
    process = Command("bench", model, "--task-dir", folder, *options)
    while not (model / "bench.json").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    ended = process.communicate()
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert [e["task"] for e in json.loads((model / "bench.json").read_text())["results"]] == ["forty"]
    write_jsonl(folder / "documents.jsonl", [{"text": text}])
    report = bench_models({"a": model}, settings(folder, "forty", "documents", limit=None))
    assert report.models[0].ran == ("documents",)
    assert list(report.models[0].entries) == ["forty", "documents"]


def test_two_processes_lose_no_result_of_each_other(tmp_path: Path) -> None:
    """Each adds thirty results to one model while the other does; and those of weights that were replaced meanwhile
    go to where these weights' results were set aside.
    """
    old, new = {"weights": "a", "config": "c"}, {"weights": "b", "config": "c"}

    def add(model: dict, *tasks: str) -> None:
        results, _ = BenchFile.open_for(tmp_path, model)
        for task in tasks:
            add_to(results, task)

    def add_to(results: BenchFile, task: str) -> None:
        data = task.encode()
        entry = BenchEntry(
            task, {}, {}, "", 1, 0, results.samples_of(task, {}), hashlib.sha256(data).hexdigest()
        )
        results.add(entry, data)

    with ThreadPoolExecutor(2) as both:
        names = [[f"{side}{number}" for number in range(30)] for side in "xy"]
        list(both.map(lambda tasks: add(old, *tasks), names))
    late, _ = BenchFile.open_for(tmp_path, old)
    assert {entry.task for entry in late.entries.values()} == {*names[0], *names[1]}
    assert all(late.complete(key) for key in late.entries)
    add(new, "other")
    add_to(late, "late")
    assert [entry.task for entry in BenchFile.read(tmp_path).entries.values()] == ["other"]
    back, _ = BenchFile.open_for(tmp_path, old)
    assert {entry.task for entry in back.entries.values()} == {*names[0], *names[1], "late"}


def test_results_of_other_weights_are_refused_and_set_aside(model: Path, tasks: Path) -> None:
    bench_models({"a": model}, settings(tasks))
    old = (model / "bench.json").read_bytes()
    nudge(model)
    with pytest.raises(IdentityMismatchError, match="results must be of the weights on disk, got weights"):
        load_bench(model)
    report = bench_models({"a": model}, settings(tasks))
    assert report.models[0].ran == ("forty",)
    (aside,) = model.glob("bench-*.json")
    assert aside.read_bytes() == old
    assert load_bench(model).model != json.loads(old)["model"]
    new = (model / "bench.json").read_bytes()
    nudge(model, 0.5)  # the old weights again: their results and items are there
    assert bench_models({"a": model}, settings(tasks)).models[0].ran == ()
    assert (model / "bench.json").read_bytes() == old
    assert [path.read_bytes() for path in model.glob("bench-*.json")] == [new]
    (model / "config.json").write_text(
        (model / "config.json").read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
    )
    with pytest.raises(IdentityMismatchError, match="got config"):
        load_bench(model)


def test_pairs_are_the_same_items_under_equal_settings(model: Path, tmp_path: Path, tasks: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    nudge(other, 0.1)
    report = bench_models({"a": model, "b": other}, settings(tasks, limit=20))
    bench_models({"a": model}, settings(tasks, limit=None))
    a, b = load_bench(model), load_bench(other)
    pair = paired(a, b)["forty"]
    assert pair.metric == "acc,none" and len(pair.items) == 20
    assert set(pair.num_choices) == {2, 3, 4} and set(pair.weights) == {1.0}
    assert pair.num_choices.tolist() == [len(questions()[i]["choices"]) for i in pair.items]
    for side, results in ((pair.first, report.models[0]), (pair.second, report.models[1])):
        assert set(side) <= {0.0, 1.0}
        assert np.mean(side) == results.entries["forty"].metrics["acc,none"]["value"]
    assert paired(a, b, ["forty"], "acc_norm")["forty"].metric == "acc_norm,none"
    with pytest.raises(ConfigError, match="got 'f1'; choose one"):
        paired(a, b, ["forty"], "f1")
    with pytest.raises(ConfigError, match="got none for piqa"):
        paired(a, b, ["piqa"])
    assert report.text().splitlines()[0].split() == ["task", "metric", "shots", "items", "a", "b"]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"limit": 5}, "limit 6 and 5"),
        ({"seed": 3}, "seed 0 and 3"),
        ({"num_fewshot": 1}, "num_fewshot 0 and 1"),
        ({"apply_chat_template": "yes"}, "chat_template '' and '"),
        ({"dtype": "bfloat16"}, "dtype 'float32' and 'bfloat16'"),
    ],
)
def test_unequal_settings_are_refused_by_name(tmp_path: Path, tasks: Path, changed: dict, named: str) -> None:
    bench_models({"a": TINY_BASE}, settings(tasks, out=str(tmp_path / "one"), dtype="float32"))
    bench_models(
        {"a": TINY_BASE}, settings(tasks, out=str(tmp_path / "two"), **{"dtype": "float32", **changed})
    )
    one, two = (load_bench(TINY_BASE, tmp_path / out / "a") for out in ("one", "two"))
    with pytest.raises(IdentityMismatchError, match="equal settings") as error:
        paired(one, two)
    assert named in str(error.value)


def test_a_limit_draws_the_same_items_for_every_model_and_a_larger_one_holds_them(tmp_path, tasks) -> None:
    drawn = []
    for limit in (6, 12):
        bench_models({"a": TINY_BASE}, settings(tasks, limit=limit, out=str(tmp_path)))
    results = load_bench(TINY_BASE, tmp_path / "a")
    for entry in results.entries.values():
        drawn.append(results.samples(entry, "none").items.tolist())
    assert [len(items) for items in drawn] == [6, 12] and set(drawn[0]) < set(drawn[1])
    assert drawn[1] == sorted(drawn[1]) and drawn[1] != list(range(12))


def test_adapters_alone_are_measured_and_tied_to_their_model(
    model: Path, tmp_path: Path, tasks: Path
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = tmp_path / "adapter"
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=2, target_modules=["q_proj"])
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    tuned.save_pretrained(adapter)
    AutoTokenizer.from_pretrained(model).save_pretrained(adapter)
    bench_models({"a": adapter, "b": model}, settings(tasks, limit=None))
    pair = paired(load_bench(adapter), load_bench(model), metric="acc_norm")["forty"]
    assert pair.first.tolist() != pair.second.tolist()
    with pytest.raises(ConfigError, match="--backend vllm runs full models, got adapters"):
        bench_models({"a": adapter}, settings(tasks, backend="vllm", limit=3))
    nudge(model)
    with pytest.raises(IdentityMismatchError, match="got config"):
        load_bench(adapter)


def test_groups_and_tags(tmp_path: Path) -> None:
    folder = write_forty(tmp_path / "tasks")
    write_jsonl(folder / "ten.jsonl", questions()[:10])
    text = (folder / "forty.yaml").read_text()
    (folder / "forty.yaml").write_text(text + "tag: all_of_them\n")
    (folder / "ten.yaml").write_text(text.replace("forty", "ten") + "tag: all_of_them\n")
    (folder / "both.yaml").write_text(
        "group: both\ntask: [forty, ten]\n"
        "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
    )
    tagged = bench_models({"a": TINY_BASE}, settings(folder, "all_of_them", limit=None, out=str(tmp_path)))
    assert sorted(tagged.models[0].ran) == ["forty", "ten"] and tagged.groups == {}
    grouped = bench_models({"a": TINY_BASE}, settings(folder, "both", limit=None, out=str(tmp_path)))
    assert grouped.models[0].ran == ()  # the same tasks
    entries = grouped.models[0].entries
    parts = [entries[name].metrics["acc,none"]["value"] for name in ("forty", "ten")]
    found = grouped.group_metrics(grouped.models[0])["both"]["acc,none"]
    assert found["value"] == pytest.approx((40 * parts[0] + 10 * parts[1]) / 50)
    assert found["num_items"] == 50 and 0 < found["stderr"] < 0.2
    assert grouped.text().splitlines()[1].split()[:2] == ["both", "(all)"]
    with pytest.raises(ConfigError, match="a task is run once, got forty twice"):
        bench_models({"a": TINY_BASE}, settings(folder, "both", "forty", out=str(tmp_path)))


def test_prompts_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    folder = write_forty(tmp_path / "tasks")
    records = questions()[:3]
    records[1]["question"] = "word " * 700
    write_jsonl(folder / "forty.jsonl", records)
    report = bench_models({"a": TINY_BASE}, settings(folder, limit=None, out=str(tmp_path / "out")))
    assert report.models[0].entries["forty"].num_truncated == 1
    assert "a: 1 of 3 items of forty were longer than the model's context" in report.text()


def test_damaged_results_are_named(model: Path) -> None:
    with pytest.raises(FormatError, match=r"got no bench\.json"):
        load_bench(model)
    for text, message in (
        ("{", "must be a result of anneal bench"),
        ('{"format": 9}', "must have format 1, got 9"),
    ):
        (model / "bench.json").write_text(text)
        with pytest.raises(AnnealError, match=message):
            load_bench(model)
