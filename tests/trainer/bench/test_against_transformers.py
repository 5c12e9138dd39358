"""Scores and log-likelihoods against loops over plain transformers, written here, one prompt at a time."""

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from bench_tasks import DOCUMENTS, TINY_BASE, WRITTEN, questions, write_forty
from corpora import write_jsonl
from recorded_progress import RecordedProgress

from trainer import BenchSettings, bench_models

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY_BASE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_BASE)


def run(tasks: str, directory: Path, out: Path, **settings):
    """Bench the tiny base; returns the entry and its items as columns."""
    report = bench_models(
        {"tiny": TINY_BASE},
        BenchSettings(
            tasks=(tasks,), task_dirs=(str(directory),), backend="transformers", out=str(out), **settings
        ),
    )
    (entry,) = report.models[0].entries.values()
    return entry, pq.read_table(report.models[0].directory / entry.samples).to_pydict()


@torch.no_grad()
def logprobs_of(model, ids: list[int]) -> torch.Tensor:
    """[L - 1, V] float64 log-probabilities of the next token."""
    return torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].double(), -1)


def continuation(model, tokenizer, prompt: str, text: str) -> float:
    """Sum of the log-probabilities of the tokens that `text` adds to `prompt`, in nats.

    The harness's rule: white space at the prompt's end belongs to the answer (a template ends in a newline).
    """
    stem = prompt.rstrip()
    prompt, text = stem, prompt[len(stem) :] + text
    start = len(tokenizer(prompt).input_ids)
    ids = tokenizer(prompt + text).input_ids
    table = logprobs_of(model, ids)
    return sum(float(table[place - 1, ids[place]]) for place in range(start, len(ids)))


@pytest.mark.parametrize(("template", "batch_size"), [("no", 8), ("yes", 8), ("yes", 1)])
def test_forty_questions(tmp_path, model, tokenizer, template, batch_size) -> None:
    entry, items = run(
        "forty",
        write_forty(tmp_path / "tasks"),
        tmp_path / "out",
        apply_chat_template=template,
        batch_size=batch_size,
    )
    right, right_by_length = [], []
    for number, record in enumerate(questions()):
        prompt, space = record["question"], " "
        if template == "yes":
            turns = [{"role": "user", "content": record["question"]}]
            prompt, space = (
                tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True),
                "",
            )
        expected = [continuation(model, tokenizer, prompt, space + choice) for choice in record["choices"]]
        assert items["item"][number] == number
        assert items["choice_logprobs"][number] == pytest.approx(expected, rel=0, abs=1e-5)
        per_length = [value / len(choice) for value, choice in zip(expected, record["choices"], strict=True)]
        right.append(max(range(len(expected)), key=expected.__getitem__) == record["gold"])
        right_by_length.append(max(range(len(expected)), key=per_length.__getitem__) == record["gold"])
    assert items["correct"] == right
    assert items["acc_norm"] == right_by_length
    assert 0 < sum(right) < 40 and right != right_by_length  # the task tells models apart
    assert entry.metrics["acc,none"]["value"] == pytest.approx(sum(right) / 40, rel=1e-12)
    assert entry.metrics["acc_norm,none"]["value"] == pytest.approx(sum(right_by_length) / 40, rel=1e-12)
    spread = math.sqrt(sum(right) / 40 * (1 - sum(right) / 40) / 39)
    assert entry.metrics["acc,none"]["stderr"] == pytest.approx(spread, rel=1e-9)
    assert entry.primary == "acc,none" and entry.num_items == 40 and entry.num_truncated == 0


def test_whole_documents(tmp_path, model, tokenizer) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    texts = [
        " ".join(record["question"] for record in questions()[start : start + 3]) for start in (0, 9, 20)
    ]
    write_jsonl(folder / "documents.jsonl", [{"text": text} for text in texts])
    (folder / "documents.yaml").write_text(DOCUMENTS)
    entry, items = run("documents", folder, tmp_path / "out")
    expected, words = [], []
    for text in texts:
        ids = [tokenizer.eos_token_id, *tokenizer(text).input_ids]  # the model has no token for a beginning
        table = logprobs_of(model, ids)
        expected.append(sum(float(table[place - 1, ids[place]]) for place in range(1, len(ids))))
        words.append(len(text.split()))
    assert items["word_perplexity"] == pytest.approx(expected, rel=1e-6)
    assert items["word_perplexity:weight"] == words
    assert items["correct"] == [None] * 3
    value = math.exp(-sum(expected) / sum(words))
    assert entry.metrics["word_perplexity,none"]["value"] == pytest.approx(value, rel=1e-5)
    assert entry.settings["chat_template"] == ""  # a document is not asked through a template


def test_written_answers(tmp_path, model, tokenizer) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    prompts = [record["question"] for record in questions()[:4]]
    answers = []
    for prompt in prompts:
        ids = tokenizer(prompt).input_ids
        for _ in range(12):
            ids.append(int(logprobs_of(model, [*ids, 0])[-1].argmax()))
            if "." in tokenizer.decode(ids[len(tokenizer(prompt).input_ids) :]):
                break
        answers.append(tokenizer.decode(ids[len(tokenizer(prompt).input_ids) :]).split(".")[0])
    assert all(answer.strip() for answer in answers)
    records = [{"question": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]
    records[3]["answer"] = "something else"
    write_jsonl(folder / "written.jsonl", records)
    (folder / "written.yaml").write_text(WRITTEN)
    entry, items = run("written", folder, tmp_path / "out", apply_chat_template="no")
    assert items["prediction"] == answers
    assert items["correct"] == [1, 1, 1, 0]
    assert items["choice_logprobs"] == [[]] * 4
    assert entry.metrics["exact_match,none"]["value"] == 0.75
    assert (
        json.loads((tmp_path / "out" / "tiny" / "bench.json").read_text())["results"][0]["task"] == "written"
    )


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_agrees(tmp_path, capfd) -> None:
    folder = write_forty(tmp_path / "tasks")
    _, ours = run("forty", folder, tmp_path / "hf", apply_chat_template="yes")
    report = bench_models(
        {"tiny": TINY_BASE},
        BenchSettings(
            tasks=("forty",),
            task_dirs=(str(folder),),
            backend="vllm",
            dtype="float32",
            out=str(tmp_path / "vllm"),
        ),
        progress := RecordedProgress(),
    )
    ((_, done, total),) = progress.phases
    assert done == total == sum(map(len, ours["choice_logprobs"])), "the engine's requests, each counted once"
    assert "".join(capfd.readouterr()) == "", "neither the engine's bars nor its log"
    (entry,) = report.models[0].entries.values()
    theirs = pq.read_table(report.models[0].directory / entry.samples).to_pydict()
    for left, right in zip(ours["choice_logprobs"], theirs["choice_logprobs"], strict=True):
        assert left == pytest.approx(right, abs=1e-3)
    assert entry.settings["backend"] == "vllm"
