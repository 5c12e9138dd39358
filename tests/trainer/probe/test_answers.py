"""Answers to questions with choices, against transformers in float64 and against cases with known numbers."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import write_jsonl
from runs import copy_model

from formats.errors import ConfigError
from trainer.loading import load_tokenizer
from trainer.probe import answers
from trainer.probe.answers import (
    Question,
    calibration_error,
    choice_tokens,
    means_of,
    probe_answers,
    read_questions,
)

QUESTIONS = [
    Question(prompt="the cat sat on the", choices=(" mat", " dog and the cat", " moon"), answer=1),
    Question(prompt="one and one is", choices=(" two", " three"), answer=0),
    Question(prompt="yes or no?", choices=(" yes", " no"), answer=1),
]


def by_hand(directory) -> dict[str, float]:
    """Every number from float64 logits of transformers, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval().requires_grad_(False)
    sums: dict[str, list[float]] = {}

    def add(**values: float) -> None:
        for name, value in values.items():
            sums.setdefault(name, []).append(float(value))

    for question in QUESTIONS:
        prompt, choices = choice_tokens(tokenizer, question)
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        p = torch.softmax(logits, -1)
        totals, rates = [], []
        for ids in choices:
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0]
            logprob = torch.log_softmax(logits, -1)
            found = sum(float(logprob[len(prompt) - 1 + i, token]) for i, token in enumerate(ids))
            totals.append(found)
            rates.append(found / len(ids))
        among = torch.softmax(torch.tensor(totals, dtype=torch.float64), -1)
        by_rate = torch.softmax(torch.tensor(rates, dtype=torch.float64), -1)
        truth = torch.nn.functional.one_hot(torch.tensor(question.answer), len(rates)).double()
        add(
            format=p[list({ids[0] for ids in choices})].sum(),
            entropy=-(p * p.log()).sum(),
            choice_entropy=-(among * among.log()).sum(),
            accuracy=int(among.argmax()) == question.answer,
            accuracy_per_token=int(by_rate.argmax()) == question.answer,
            class_perplexity=-by_rate[question.answer].log(),
            brier=(by_rate - truth).square().sum(),
        )
    means = {name: sum(values) / len(values) for name, values in sums.items()}
    return means | {"class_perplexity": math.exp(means["class_perplexity"])}


def test_against_float64_logits(tiny_llama_dir) -> None:
    found = probe_answers({"m": tiny_llama_dir}, QUESTIONS)["m"]
    for name, value in by_hand(tiny_llama_dir).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_in_float64_to_1e_6(tiny_llama_dir) -> None:
    """The same arithmetic where rounding of the forward pass is out of the way."""
    from transformers import AutoModelForCausalLM

    from trainer.probe.answers import logprobs_of

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float64).eval()
    tokens = [choice_tokens(load_tokenizer(tiny_llama_dir), question) for question in QUESTIONS]
    rows = [logprobs_of(model, *entry) for entry in tokens]
    firsts = [[ids[0] for ids in choices] for _, choices in tokens]
    found = means_of(QUESTIONS, firsts, [row for row, _ in rows], [scores for _, scores in rows])
    for name, value in by_hand(tiny_llama_dir).items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-9), name


def test_a_uniform_head(tiny_llama_dir, tmp_path) -> None:
    """format = c / V, entropy = ln V, every choice as likely per token as the others."""
    uniform = copy_model(tiny_llama_dir, tmp_path / "m", lambda name, t: 0 * t if "lm_head" in name else t)
    found = probe_answers({"m": uniform}, QUESTIONS)["m"]
    tokenizer = load_tokenizer(uniform)
    vocab_size = json.loads((uniform / "config.json").read_text())["vocab_size"]
    firsts = [len({ids[0] for ids in choice_tokens(tokenizer, q)[1]}) for q in QUESTIONS]
    assert found.format == pytest.approx(np.mean(firsts) / vocab_size, rel=1e-6)
    assert found.entropy == pytest.approx(math.log(vocab_size), rel=1e-6)
    counts = [len(q.choices) for q in QUESTIONS]
    assert found.class_perplexity == pytest.approx(math.exp(np.mean(np.log(counts))), rel=1e-6)
    assert found.brier == pytest.approx(np.mean([1 - 1 / c for c in counts]), rel=1e-6)


def test_calibration_by_hand() -> None:
    """Bins (0.2, 0.3] and (0.8, 0.9]: gaps |0.3 - 1| and |0.9 + 0.85 - 1| of three questions."""
    assert calibration_error(np.array([0.3, 0.9, 0.85]), np.array([1.0, 1.0, 0.0])) == pytest.approx(
        (0.7 + 0.75) / 3
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a question is a JSON object"),
        ("[1]", "a question has prompt, choices and answer, got list"),
        ('{"prompt": "a", "choices": ["b", "c"]}', "got prompt, choices"),
        ('{"prompt": "", "choices": ["b", "c"], "answer": 0}', "prompt must be a text"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "two different texts or more"),
        ('{"prompt": "a", "choices": ["b", "b"], "answer": 0}', "two different texts or more"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "answer must be the number of a choice"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', "answer must be the number of a choice"),
    ],
)
def test_bad_questions_name_their_line(tmp_path, line, message) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 1}\n\n' + line + "\n")
    with pytest.raises(ConfigError, match=f"line 3: .*{message}"):
        read_questions(file)


def test_a_text_may_hold_other_ends_of_lines(tmp_path) -> None:
    """As JSON does, and every file of records."""
    file, prompt = tmp_path / "q.jsonl", "one\u2028two\x85three"
    entry = {"prompt": prompt, "choices": ["b", "c"], "answer": 0}
    file.write_bytes(json.dumps(entry, ensure_ascii=False).encode() + b"\r\n")
    assert [question.prompt for question in read_questions(file)] == [prompt]


def test_a_question_longer_than_the_context_is_refused(tiny_llama_dir) -> None:
    context = json.loads((tiny_llama_dir / "config.json").read_text())["max_position_embeddings"]
    long = Question(prompt="one two " * context, choices=(" b", " c"), answer=0)
    with pytest.raises(ConfigError, match=f"context of {context} tokens, got .* of 'one two "):
        probe_answers({"m": tiny_llama_dir}, [long])


def test_no_model_answers_before_all_have_room(tiny_llama_dir, tmp_path, monkeypatch) -> None:
    """The second one's smaller context was found out after the first one had answered everything."""
    small = Path(shutil.copytree(tiny_llama_dir, tmp_path / "small"))
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    monkeypatch.setattr(answers, "load_model", lambda *args, **options: pytest.fail("weights were loaded"))
    question = Question(prompt="one two three four five six seven eight nine", choices=(" b", " c"), answer=0)
    with pytest.raises(ConfigError, match="context of 8 tokens"):
        probe_answers({"m": tiny_llama_dir, "small": small}, [question])


def test_missing_and_empty_files(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"readable \.jsonl file"):
        read_questions(tmp_path / "nothing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="got none"):
        read_questions(tmp_path / "empty.jsonl")


def test_the_command(anneal, tiny_llama_dir, tmp_path) -> None:
    file = write_jsonl(tmp_path / "q.jsonl", [vars(q) | {"choices": list(q.choices)} for q in QUESTIONS])
    code, out, err = anneal("probe", "answers", f"m={tiny_llama_dir}", "--questions", file)
    assert code == 0 and "class ppl" in out and "3 questions" in out, err
    code, out, err = anneal(
        "probe", "answers", f"m={tiny_llama_dir}", "--questions", file, "--json", "--limit", 2
    )
    (found,) = json.loads(out)
    assert found["label"] == "m" and found["num_questions"] == 2


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_json_of_a_model_that_has_diverged(anneal, tiny_llama_dir, llama_eval_cache, tmp_path) -> None:
    """JSON has no word for what is not a number: it is null, in every command."""
    broken = copy_model(tiny_llama_dir, tmp_path / "broken", lambda name, tensor: tensor * math.nan)
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps(vars(QUESTIONS[0]) | {"choices": list(QUESTIONS[0].choices)}) + "\n")
    code, out, err = anneal("probe", "answers", broken, "--questions", file, "--json")
    assert code == 0 and json.loads(out)[0]["entropy"] is None, err
    code, out, err = anneal("eval", llama_eval_cache, "--model", broken, "--json")
    assert code == 0 and json.loads(out)["caches"][llama_eval_cache.name]["ce"] is None, err
