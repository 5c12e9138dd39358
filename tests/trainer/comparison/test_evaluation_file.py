"""Remembered evaluations: found only under everything that decides them."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
from caches import write_cache

from formats.cache import TeacherCache
from trainer.comparison.evaluation_file import EVALUATIONS_NAME, EvaluationFile

MODEL = {"weights": "w", "config": "c", "vocabulary": "v"}
RESULT = {"ce": 2.5, "perplexity": math.exp(2.5), "kl": None, "row_ce": [1.0, 1.5], "row_tokens": [1, 1]}


@pytest.fixture(scope="module")
def cache(tiny_llama_dir, tmp_path_factory) -> TeacherCache:
    return TeacherCache(write_cache(tmp_path_factory.mktemp("cache") / "c", tiny_llama_dir, num_rows=3))


def key(cache: TeacherCache, **changed):
    return EvaluationFile.key(cache, **{"dtype": "float32", "device": "cpu", "limit": None, **changed})


def test_found_again_and_only_then(tmp_path, cache, tiny_llama_dir):
    file = EvaluationFile(tmp_path, MODEL, "a")
    assert file.find(key(cache)) is None
    assert file.add(key(cache), RESULT)
    assert EvaluationFile(tmp_path, MODEL, "b").find(key(cache)) == RESULT
    assert file.find(key(cache, limit=99)) == RESULT  # all three rows, too
    assert file.find(key(cache, device="cuda:1")) is None and key(cache, device="cuda:1") == key(
        cache, device="cuda"
    )
    for changed in ({"limit": 2}, {"dtype": "bfloat16"}, {"device": "cuda"}):
        assert file.find(key(cache, **changed)) is None
    other = TeacherCache(write_cache(tmp_path / "other", tiny_llama_dir, num_rows=3, seed=4))
    assert file.find(key(other)) is None
    for part in MODEL:
        assert EvaluationFile(tmp_path, {**MODEL, part: "x"}, "a").find(key(cache)) is None
    assert file.add(key(cache, limit=2), {**RESULT, "ce": 1.0})
    assert file.find(key(cache)) == RESULT and file.find(key(cache, limit=2))["ce"] == 1.0


def test_entries_of_other_weights_are_dropped(tmp_path, cache):
    EvaluationFile(tmp_path, MODEL, "a").add(key(cache), RESULT)
    EvaluationFile(tmp_path, {**MODEL, "weights": "new"}, "a").add(key(cache, limit=1), RESULT)
    content = json.loads((tmp_path / EVALUATIONS_NAME).read_text())
    assert content["model"]["weights"] == "new" and len(content["evaluations"]) == 1


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 2}', '{"format": 1, "model": 3}'])
def test_a_torn_file_costs_time_and_nothing_else(tmp_path, cache, text):
    (tmp_path / EVALUATIONS_NAME).write_text(text)
    file = EvaluationFile(tmp_path, MODEL, "a")
    assert file.find(key(cache)) is None
    assert file.add(key(cache), RESULT) and file.find(key(cache)) == RESULT


def test_what_is_no_number_is_not_remembered(tmp_path, cache):
    file = EvaluationFile(tmp_path, MODEL, "a")
    assert file.add(key(cache), {**RESULT, "ce": math.nan}) and file.find(key(cache)) is None


def test_a_folder_of_its_own_tells_models_of_one_label_apart(tmp_path, cache):
    one = EvaluationFile(tmp_path / "m", MODEL, "kl 1/x", tmp_path / "work")
    two = EvaluationFile(tmp_path / "m", {**MODEL, "weights": "other"}, "kl 1/x", tmp_path / "work")
    one.add(key(cache), RESULT)
    assert two.find(key(cache)) is None and one.find(key(cache)) == RESULT
    assert [path.name.startswith("kl_1_x-") for path in (tmp_path / "work").iterdir()] == [True]
    (tmp_path / "file").write_text("")
    assert not EvaluationFile(tmp_path, MODEL, "a", tmp_path / "file").add(key(cache), RESULT)


def test_another_label_finds_what_is_known_of_the_model(tmp_path, cache):
    """Renamed, or given as --initial too, it was evaluated once more."""
    work = tmp_path / "work"
    assert EvaluationFile(tmp_path / "m", MODEL, "a", work).add(key(cache), RESULT)
    other = EvaluationFile(tmp_path / "m", MODEL, "b", work)
    assert other.find(key(cache)) == RESULT
    assert other.add(key(cache, limit=2), RESULT)
    assert [path.name.startswith("a-") for path in work.iterdir()] == [True]


def test_what_two_comparisons_of_one_model_find_is_both_remembered(tmp_path, cache):
    """Each reads what is known and writes it again with its own result."""

    def compare(first: int) -> None:
        file = EvaluationFile(tmp_path, MODEL, "a")
        for number in range(first, first + 8):
            assert file.add({**key(cache), "limit": number}, RESULT)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(compare, range(0, 32, 8)))
    content = json.loads((tmp_path / EVALUATIONS_NAME).read_text())
    assert sorted(entry["settings"]["limit"] for entry in content["evaluations"]) == list(range(32))
