"""What was measured of a model is in its card: the same numbers, once each, and nothing of others'."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from caches import write_cache
from huggingface_hub import ModelCard
from runs import settings

from trainer import compare, evaluate, train
from trainer.evaluation.evaluate import add_to_card
from trainer.result.measured import BEGIN, MeasuredText, add_measured


@pytest.fixture(scope="module")
def texts(tiny_llama_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return {
        name: write_cache(folder / name, tiny_llama_dir, num_rows=3, seed=seed)
        for name, seed in (("known", 11), ("new", 12))
    }


@pytest.fixture(scope="module")
def finished(tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("measured") / "run"
    train(settings(pruned_cache, tiny_llama_dir, out, f"eval_caches.held-out={llama_eval_cache}"))
    return out


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def rows_of(card: str) -> dict[str, list[str]]:
    """First cell -> the others, of the table in the section."""
    section = card[card.index(BEGIN) :]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: others for first, *others in cells}


def test_a_run_tells_what_its_evaluation_found(finished, tiny_llama_dir, llama_eval_cache):
    record = json.loads((finished / "anneal.json").read_text())
    found = record["evaluation"]["held-out"]
    before = evaluate(tiny_llama_dir, {"text": llama_eval_cache})["text"]["perplexity"]
    row = rows_of((finished / "README.md").read_text())["held-out"]
    assert float(row[0]) == pytest.approx(before, rel=2e-3), "the cache's own logprobs, as it stores them"
    assert row[1:4] == [f"{found['perplexity']:.3f}", f"{found['kl']:.5f}", tiny_llama_dir.name]


def test_a_comparison_adds_source_and_target_with_the_initial_model_as_evaluated(run, tiny_llama_dir, texts):
    card = run / "README.md"
    card.write_text(card.read_text().replace("tags:\n", "license: mit\ntags:\n") + "\nMy own words.\n")
    for _ in range(2):
        compare(
            {"run": run},
            source={"known": texts["known"]},
            target={"new": texts["new"]},
            initial={"initial": tiny_llama_dir},
        )
        text = card.read_text()
        assert text.count(BEGIN) == 1 and "My own words." in text
    assert not (tiny_llama_dir / "README.md").exists()
    rows = rows_of(text)
    assert list(rows) == ["known (source)", "new (target)", "held-out"]
    for name, path in texts.items():
        before, after = (evaluate(model, {name: path})[name] for model in (tiny_llama_dir, run))
        row = rows[f"{name} ({'source' if name == 'known' else 'target'})"]
        kept = "-" if after["kept"] is None else f"{after['kept']:.4f}"
        assert row[:2] == [f"{result['perplexity']:.3f}" for result in (before, after)]
        assert row[2] == f"{after['kl']:.5f}" and row[4] == kept
    data = ModelCard(text).data
    assert data.license == "mit" and data.to_dict()["library_name"] == "transformers"
    found = {(entry.dataset_name, entry.metric_name): entry.metric_value for entry in data.eval_results}
    assert found["known (source)", "perplexity"] == evaluate(run, {"k": texts["known"]})["k"]["perplexity"]
    assert ("known (source)", f"perplexity of {tiny_llama_dir.name}") in found


def test_an_evaluation_is_told_and_a_part_of_one_is_not(anneal, run, texts):
    before = (run / "README.md").read_text()
    status, _, err = anneal("eval", f"known={texts['known']}", "--model", run, "--limit", "1")
    assert status == 0 and "card" not in err and (run / "README.md").read_text() == before
    status, _, err = anneal("eval", f"known={texts['known']}", "--model", run)
    assert status == 0 and f"added to {run}/README.md, the model's card" in err
    assert "known" in rows_of((run / "README.md").read_text())


def test_evaluations_that_end_together_are_all_told(run):
    """Two commands that evaluate one model each read the record and wrote it again without the other's text."""
    weights = json.loads((run / "anneal.json").read_text())["measured"]["weights"]

    def add(side: str) -> None:
        for number in range(20):
            name = f"{side}{number}"
            text = MeasuredText(name=name, cache=name, perplexity=2.0, num_tokens=1)
            assert add_measured(run, [text], weights)

    with ThreadPoolExecutor(2) as both:
        list(both.map(add, "xy"))
    told = {entry["name"] for entry in json.loads((run / "anneal.json").read_text())["measured"]["texts"]}
    assert told == {"held-out", *(f"{side}{number}" for side in "xy" for number in range(20))}
    assert told == rows_of((run / "README.md").read_text()).keys() - {"---"}


def test_tokens_alone_do_not_take_the_place_of_a_kl(run, texts):
    named = {"known": str(texts["known"])}
    for kl in (True, False):
        assert add_to_card(run, named, evaluate(run, named, kl=kl))
    assert rows_of((run / "README.md").read_text())["known"][2] != "-"


def test_what_was_measured_of_other_weights_is_dropped(run, texts, tiny_llama_dir):
    shutil.copy(tiny_llama_dir / "model.safetensors", run / "model.safetensors")
    assert add_to_card(run, {"known": str(texts["known"])}, evaluate(run, {"known": texts["known"]}))
    assert list(rows_of((run / "README.md").read_text())) == ["known"]
    front = yaml.safe_load((run / "README.md").read_text().split("---\n")[1])
    assert [entry["dataset"]["name"] for entry in front["model-index"][0]["results"]] == ["known"]


def test_a_card_that_cannot_be_read_and_a_strange_model_stay_as_they_are(run, texts, tiny_llama_dir):
    found = evaluate(run, {"known": texts["known"]})
    (run / "README.md").write_text("---\nbase_model: [\n---\nmine\n")
    assert not add_to_card(run, {"known": str(texts["known"])}, found)
    assert (run / "README.md").read_text() == "---\nbase_model: [\n---\nmine\n"
    assert not add_to_card(tiny_llama_dir, {"known": str(texts["known"])}, found)
    assert not (tiny_llama_dir / "README.md").exists()
