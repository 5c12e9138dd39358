"""Tasks in a comparison: published tables read back, items paired and flipped, stale or unequal results refused."""

import hashlib
import json
import math
import shutil

import numpy as np
import pyarrow as pa
import pytest
from caches import write_cache
from paper_tables import SIDES_1, SIDES_2, TABLE_1, TABLE_2, TASKS, write_bench
from runs import copy_model, noise

from formats.errors import ConfigError, FormatError, IdentityMismatchError
from trainer import compare, select
from trainer.bench.bench_file import BenchEntry, BenchFile
from trainer.bench.model_identity import model_identity
from trainer.bench.samples import FIXED, table_bytes
from trainer.comparison.flips import count_flips


@pytest.fixture(scope="module")
def models(tiny_llama_dir, tmp_path_factory) -> dict:
    """The initial model and three others, which bench.json files are written for."""
    folder = tmp_path_factory.mktemp("models")
    found = {"initial": shutil.copytree(tiny_llama_dir, folder / "initial")}
    for seed, label in enumerate(("direct", "l2", "annealed")):
        found[label] = copy_model(tiny_llama_dir, folder / label, noise(seed, 0.02))
    return found


def with_table(models: dict, rows: dict, **changed) -> tuple[dict, dict]:
    """(models, the initial one) whose results are the rows of a published table."""
    found = {label: write_bench(models[label], percents, **changed) for label, percents in rows.items()}
    return {label: path for label, path in found.items() if label != "initial"}, {"initial": found["initial"]}


@pytest.mark.parametrize(
    ("rows", "sides", "chosen"), [(TABLE_1, SIDES_1, "annealed"), (TABLE_2, SIDES_2, "annealed")]
)
def test_the_papers_tables_are_printed_again(models, rows, sides, chosen):
    tuned, initial = with_table(models, rows)
    found = compare(tuned, **sides, initial=initial, direct="direct")
    lines = {
        line.split()[0].strip("*") or line.split()[1]: line for line in found.text().splitlines() if line
    }
    for label, percents in rows.items():
        for side, names in sides.items():
            for name in names:
                percent = percents[TASKS.index(name)]
                assert found.line(label).cells[f"{side}:{name}"].value == pytest.approx(
                    percent / 100, abs=1e-12
                )
                assert f"{percent / 100:.4f}" in lines[label]
    paper = select(found, "paper")
    assert paper.recommended == chosen and set(paper.picks["paper"].passed) == {"direct", "l2", "annealed"}
    if rows is TABLE_2:
        assert select(found, "keep-gain:0.9").recommended == "l2"
        assert select(found, "keep-gain:0.85").recommended == "annealed"
        assert found.standing("annealed").gain_kept == pytest.approx(0.865, abs=5e-4)
        assert [metric.name for metric in found.without_share] == ["mmlu"]
        with pytest.raises(
            ConfigError, match=r"nearest:0\.9 needs the KL to the initial model on a source text"
        ):
            compare(tuned, **sides, initial=initial, direct="direct", distance_for="nearest:0.9")
    assert "no interval for" in found.text() and found.kl_law() is None


def test_unequal_or_stale_results_are_refused(models):
    tuned, initial = with_table(models, TABLE_1)
    write_bench(models["l2"], TABLE_1["l2"], num_fewshot=5)
    with pytest.raises(IdentityMismatchError, match=r"num_fewshot 4 and 5"):
        compare(tuned, source="mmlu", target="gsm8k", initial=initial)
    write_bench(models["l2"], TABLE_1["l2"])
    content = json.loads((models["l2"] / "bench.json").read_text())
    content["model"]["weights"] = "0" * 64
    (models["l2"] / "bench.json").write_text(json.dumps(content))
    with pytest.raises(
        IdentityMismatchError, match=r"results must be of the weights on disk, got weights 0000"
    ):
        compare(tuned, source="mmlu", target="gsm8k", initial=initial)
    write_bench(models["l2"], TABLE_1["l2"])
    with pytest.raises(
        ConfigError, match=r"--source takes caches and tasks, got piqa: there is no such directory"
    ):
        compare(tuned, source="piqa", target="gsm8k", initial=initial)
    with pytest.raises(ConfigError, match=r"has the metrics acc,none, got 'f1'"):
        compare(tuned, source="mmlu:f1", target="gsm8k", initial=initial)


def write_items(
    model,
    flags: np.ndarray,
    choices: int,
    *,
    task: str = "forty",
    words: np.ndarray | None = None,
    **changed,
):
    """bench.json with single items: right-or-wrong flags, or summed log-likelihoods over `words`."""
    results, _ = BenchFile.open_for(model, model_identity(model))
    number = len(flags)
    name = "acc" if words is None else "word_perplexity"
    columns: dict = {
        "item": list(range(number)),
        "doc_hash": [f"{task}{n}" for n in range(number)],
        "prompt_hash": [""] * number,
        "filter": ["none"] * number,
        "target": [""] * number,
        "prediction": [""] * number,
        "choice_logprobs": [[-1.0] * choices for _ in range(number)],
        "correct": [None] * number,
        "truncated": [False] * number,
    }
    arrays = [pa.array(columns[key], kind) for key, kind in FIXED.items()] + [pa.array(flags, pa.float64())]
    names = [*FIXED, name]
    value = float(flags.mean())
    if words is not None:
        arrays.append(pa.array(words, pa.float64()))
        names.append(f"{name}:weight")
        value = math.exp(-flags.sum() / words.sum())
    data = table_bytes(pa.table(arrays, names=names))
    entry = BenchEntry(
        task=task,
        settings={"num_fewshot": 0, "limit": None, "seed": None} | changed,
        metrics={f"{name},none": {"value": value, "stderr": 0.05, "higher_is_better": words is None}},
        primary=f"{name},none",
        num_items=number,
        num_truncated=0,
        samples=f"bench/{'-'.join([task, *(f'{key}={value}' for key, value in changed.items())])}.parquet",
        samples_sha256=hashlib.sha256(data).hexdigest(),
    )
    results.add(entry, data)


@pytest.fixture
def answered(models) -> tuple[dict, dict]:
    """Two tasks of 60 and 20 questions and a text, answered by the initial model and two others."""
    generator = np.random.default_rng(5)
    flags = {}
    for label in ("initial", "direct", "annealed"):
        (models[label] / "bench.json").unlink(missing_ok=True)
        rates = {"initial": 0.7, "direct": 0.5, "annealed": 0.65}
        flags[label] = [(generator.random(size) < rates[label]).astype(float) for size in (60, 20)]
        write_items(models[label], flags[label][0], 4, task="know_a")
        write_items(models[label], flags[label][1], 2, task="know_b")
        words = np.arange(1.0, 31.0)
        loglik = -words * {"initial": 3.0, "direct": 1.0, "annealed": 1.5}[label]
        write_items(models[label], loglik + generator.normal(size=30), 0, task="text", words=words)
    return {label: models[label] for label in ("initial", "direct", "annealed")}, flags


def test_items_are_paired(answered, tmp_path):
    models, flags = answered
    tuned = {label: models[label] for label in ("direct", "annealed")}
    found = compare(
        tuned, source="know_a", target="text", initial={"initial": models["initial"]}, direct="direct"
    )
    cell = found.line("annealed").cells["source:know_a"]
    before, after = flags["initial"][0], flags["annealed"][0]
    assert cell.difference.difference == pytest.approx((after - before).mean())
    assert cell.flips == count_flips(before, after, np.full(60, 4))
    assert (cell.flips.lost, cell.flips.won) == (
        ((before == 1) & (after == 0)).sum(),
        ((before == 0) & (after == 1)).sum(),
    )
    text = found.line("annealed").cells["target:text"]
    assert text.difference.difference == pytest.approx(found.standing("annealed").gains["target:text"])
    assert text.flips is None and found.standing("annealed").gain_kept == pytest.approx(0.75, abs=0.03)
    shown = found.text()
    assert "items against initial" in shown and f"{cell.flips.lost:g}" in shown
    page = found.page(tmp_path / "p.html").read_text()
    assert "Items against initial" in page


def test_a_task_behind_a_folder_of_its_name_can_be_meant(answered, tmp_path, monkeypatch):
    models, flags = answered
    (tmp_path / "know_a").mkdir()
    monkeypatch.chdir(tmp_path)
    one = {"annealed": models["annealed"]}, {"initial": models["initial"]}
    with pytest.raises(
        FormatError, match=r"got know_a; check the path, or write know_a:METRIC for the task of that name$"
    ):
        compare(one[0], source="know_a", target="text", initial=one[1])
    found = compare(one[0], source={"know": "know_a:acc"}, target="text", initial=one[1])
    assert found.line("annealed").cells["source:know"].value == pytest.approx(flags["annealed"][0].mean())
    with pytest.raises(FormatError, match=r"got .*know_a; check the path$"):
        compare(one[0], source=str(tmp_path / "know_a"), target="text", initial=one[1])


def test_parts_of_a_task_are_pooled(answered):
    models, flags = answered
    found = compare(
        {"annealed": models["annealed"]}, source="know", target="text", initial={"initial": models["initial"]}
    )
    cell = found.line("annealed").cells["source:know"]
    before, after = (np.concatenate(flags[label]) for label in ("initial", "annealed"))
    assert cell.value == pytest.approx(after.mean())
    assert cell.flips == count_flips(before, after, np.repeat([4, 2], [60, 20]))
    assert found.metrics[0].where == "know_a know_b" and cell.details["num_items"] == 80


def test_a_task_under_several_settings_is_not_chosen_from_without_a_word(answered):
    models, flags = answered
    one = {"annealed": models["annealed"]}, {"initial": models["initial"]}
    for label in ("initial", "annealed"):
        write_items(models[label], 1 - flags[label][0], 4, task="know_a", num_fewshot=2)
        write_items(models[label], flags[label][1][:5], 2, task="know_b", limit=5, seed=0)
    with pytest.raises(
        ConfigError,
        match=r"know_a: results are compared under one setting, .*num_fewshot 0, 2\); choose with know_a:SHOTS",
    ):
        compare(one[0], source="know_a", target="text", initial=one[1])
    for word, expected in (("know_a:0", flags["annealed"][0]), ("know_a:2:acc", 1 - flags["annealed"][0])):
        found = compare(one[0], source={"know": word}, target="text", initial=one[1])
        assert found.line("annealed").cells["source:know"].value == pytest.approx(expected.mean())
    # A smaller limit is less of the same.
    found = compare(one[0], source="know_b", target="text", initial=one[1])
    assert found.line("annealed").cells["source:know_b"].details["num_items"] == 20
    with pytest.raises(ConfigError, match=r"got none for know_a with 3 shots in"):
        compare(one[0], source="know_a:3", target="text", initial=one[1])
    for label in ("initial", "annealed"):
        write_items(models[label], flags[label][1], 2, task="know_b", dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"dtype 'bfloat16', None\); choose with anneal bench --out DIR"):
        compare(one[0], source="know_b", target="text", initial=one[1])


def test_parts_of_a_task_are_read_under_one_setting(answered):
    models, flags = answered
    one = {"annealed": models["annealed"]}, {"initial": models["initial"]}
    for label in ("initial", "annealed"):
        (models[label] / "bench.json").unlink()
        write_items(models[label], flags[label][0][:30], 4, task="know_a", limit=30, seed=0)
        write_items(models[label], flags[label][1], 2, task="know_b")  # fewer than the limit
        write_items(models[label], flags[label][0], 0, task="text")
    found = compare(one[0], source="know", target="text", initial=one[1])
    assert found.line("annealed").cells["source:know"].details["num_items"] == 50
    for label in ("initial", "annealed"):
        write_items(models[label], flags[label][1], 2, task="know_c", num_fewshot=1)
    with pytest.raises(
        IdentityMismatchError, match=r"know: its parts .* num_fewshot 0 in know_a and 1 in know_c"
    ):
        compare(one[0], source="know", target="text", initial=one[1])


def test_damaged_items_are_refused(answered):
    models, _ = answered
    (models["annealed"] / "bench" / "know_a.parquet").write_bytes(b"torn")
    with pytest.raises(FormatError, match=r"the items of know_a must be those of bench\.json"):
        compare(
            {"annealed": models["annealed"]},
            source="know_a",
            target="text",
            initial={"initial": models["initial"]},
        )


def test_texts_and_tasks_together(answered, tmp_path, tiny_llama_dir):
    models, _ = answered
    cache = write_cache(tmp_path / "news", tiny_llama_dir, num_rows=3)
    tuned = {label: models[label] for label in ("direct", "annealed")}
    found = compare(
        tuned,
        source={"news": cache, "know": "know_a"},
        target="text",
        initial={"initial": models["initial"]},
        direct="direct",
        work=tmp_path / "work",
    )
    assert [(m.key, m.kind) for m in found.metrics] == [
        ("source:news", "text"), ("source:know", "task"), ("target:text", "task"),
    ]  # fmt: skip
    assert found.kl_on_target(found.line("direct")) is None
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.plot(tmp_path / "p.svg").is_file()
    assert len(list((tmp_path / "work").iterdir())) == 3
    assert not (models["direct"] / "evaluations.json").exists()
