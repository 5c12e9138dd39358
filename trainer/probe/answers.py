"""Questions with choices: does the model answer in the right form, does it know, and does it know that it knows?

Of each question, at the position where the answer begins:

    format           probability, over the whole vocabulary, of the first tokens of the choices (Zhang et al. 2024:
                     format alignment)
    entropy          of the next token over the vocabulary; and over the choices (their knowledge alignment)
    accuracy         the choice of the largest probability; and of the largest one per token (length-normalised)
    class perplexity exp of minus the mean log-probability of the right choice among the choices, by probability per
                     token (Springer et al. 2025)
    calibration      ECE in ten bins and Brier score of the probabilities among the choices, by probability per token

V: vocabulary, C: choices of a question.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from formats.errors import ConfigError
from formats.progress import Progress, counted
from formats.table import aligned
from trainer.loading import context_of, default_device, load_model, load_tokenizer, quiet_transformers
from trainer.loss.token_measures import NUM_BINS


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question: what stands before the answer, and what may come."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, kw_only=True)
class AnswerMeans:
    """Means over questions."""

    num_questions: int
    format: float
    entropy: float
    choice_entropy: float
    accuracy: float
    accuracy_per_token: float
    class_perplexity: float
    calibration_error: float
    brier: float


def read_questions(path: str | Path) -> list[Question]:
    """Questions of a .jsonl file: `{"prompt": TEXT, "choices": [TEXT, ...], "answer": NUMBER}` a line.

    Raises:
        ConfigError: the file cannot be read, or a line is not of that form; names it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # a text may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"--questions must name a readable .jsonl file, got {path}: {reason}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            found.append(_question(line, f"{path}, line {number}"))
    if not found:
        raise ConfigError(f"--questions must hold a question a line, got none in {path}")
    return found


def _question(line: str, where: str) -> Question:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: a question is a JSON object, got {error}") from None
    if not isinstance(entry, dict) or set(entry) != {"prompt", "choices", "answer"}:
        got = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
        raise ConfigError(f"{where}: a question has prompt, choices and answer, got {got}")
    prompt, choices, answer = entry["prompt"], entry["choices"], entry["answer"]
    if not isinstance(prompt, str) or not prompt:
        raise ConfigError(f"{where}: prompt must be a text, got {prompt!r}")
    texts = isinstance(choices, list) and all(isinstance(choice, str) and choice for choice in choices)
    if not texts or len(set(choices)) < max(2, len(choices)):
        raise ConfigError(f"{where}: choices must be two different texts or more, got {choices!r}")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ConfigError(f"{where}: answer must be the number of a choice, counted from 0, got {answer!r}")
    return Question(prompt=prompt, choices=tuple(choices), answer=answer)


def choice_tokens(tokenizer: Any, question: Question) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt and of each choice behind it.

    Prompt and choice are tokenised together, as they would be written; where that changes tokens of the prompt, apart.

    Raises:
        ConfigError: the prompt or a choice has no tokens.
    """
    prompt = list(tokenizer(question.prompt)["input_ids"])
    found = []
    for choice in question.choices:
        whole = list(tokenizer(question.prompt + choice)["input_ids"])
        ids = whole[len(prompt) :] if whole[: len(prompt)] == prompt else []
        ids = ids or list(tokenizer(choice, add_special_tokens=False)["input_ids"])
        if not ids or not prompt:
            raise ConfigError(
                f"prompt and choice need a token each, got none of {choice!r} after {question.prompt!r}"
            )
        found.append(ids)
    return prompt, found


@torch.no_grad()
def logprobs_of(
    model: Any, prompt: Sequence[int], choices: Sequence[Sequence[int]]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """float64 log-probabilities [V] of the token after the prompt, and of each choice's tokens."""
    device = next(model.parameters()).device
    after: np.ndarray | None = None
    found = []
    for choice in choices:
        ids = torch.as_tensor([[*prompt, *choice]], device=device)
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
        logprobs = torch.log_softmax(logits, -1).cpu().numpy()
        after = logprobs[0] if after is None else after
        found.append(logprobs[np.arange(len(choice)), list(choice)])
    assert after is not None
    return after, found


def means_of(
    questions: Sequence[Question],
    first_tokens: Sequence[Sequence[int]],
    after: Sequence[np.ndarray],
    scores: Sequence[Sequence[np.ndarray]],
) -> AnswerMeans:
    """Put the numbers of all questions together.

    Args:
        questions: N of them.
        first_tokens: per question the first token of each choice.
        after: per question the log-probabilities, [V], of the token after the prompt.
        scores: per question and choice the log-probabilities of its tokens.
    """
    formats, entropies, choice_entropies = [], [], []
    right, right_per_token, losses, confidences, hits, briers = [], [], [], [], [], []
    for question, firsts, row_V, found in zip(questions, first_tokens, after, scores, strict=True):
        p_V = np.exp(row_V)
        formats.append(float(p_V[sorted(set(firsts))].sum()))
        entropies.append(float(-(p_V * np.where(p_V > 0, row_V, 0.0)).sum()))
        sums_C = np.array([choice.sum() for choice in found])
        per_token_C = np.array([choice.mean() for choice in found])
        q_C = np.exp(sums_C - np.logaddexp.reduce(sums_C))
        choice_entropies.append(float(-(q_C * np.log(np.maximum(q_C, 1e-300))).sum()))
        log_q_C = per_token_C - np.logaddexp.reduce(per_token_C)
        right.append(int(np.argmax(sums_C)) == question.answer)
        right_per_token.append(int(np.argmax(per_token_C)) == question.answer)
        losses.append(float(-log_q_C[question.answer]))
        q_C = np.exp(log_q_C)
        confidences.append(float(q_C.max()))
        hits.append(right_per_token[-1])
        truth_C = np.eye(len(q_C))[question.answer]
        briers.append(float(((q_C - truth_C) ** 2).sum()))
    return AnswerMeans(
        num_questions=len(questions),
        format=float(np.mean(formats)),
        entropy=float(np.mean(entropies)),
        choice_entropy=float(np.mean(choice_entropies)),
        accuracy=float(np.mean(right)),
        accuracy_per_token=float(np.mean(right_per_token)),
        class_perplexity=math.exp(float(np.mean(losses))),
        calibration_error=calibration_error(np.array(confidences), np.array(hits, float)),
        brier=float(np.mean(briers)),
    )


def calibration_error(confidence_N: np.ndarray, right_N: np.ndarray) -> float:
    """Guo et al. 2017, Eq. 3, with ten equal bins ((i - 1)/10, i/10]."""
    bins_N = np.clip(np.ceil(confidence_N * NUM_BINS).astype(int), 1, NUM_BINS)
    gaps = [abs(float((confidence_N - right_N)[bins_N == number].sum())) for number in range(1, NUM_BINS + 1)]
    return sum(gaps) / len(confidence_N)


def probe_answers(
    models: Mapping[str, Path],
    questions: Sequence[Question],
    *,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> dict[str, AnswerMeans]:
    """Label -> means over the questions, one model after another.

    Raises:
        ConfigError: not a model, or a question without tokens or longer than a model's context.
    """
    quiet_transformers()
    progress = progress or Progress()
    device = default_device()
    found = {}
    tokens_of = {label: _tokens(directory, questions) for label, directory in models.items()}
    for label, directory in models.items():  # before any model has answered
        _require_room(directory, questions, tokens_of[label])
    for label, directory in models.items():
        tokens = tokens_of[label]
        model = load_model(directory, dtype=dtype).to(device).eval()
        after, scores = [], []
        progress.start(f"{label}: questions", len(questions), unit="question")
        progress.running()
        for prompt, choices in tokens:
            row_V, of_choices = logprobs_of(model, prompt, choices)
            after.append(row_V)
            scores.append(of_choices)
            progress.advance(1)
        progress.finish()
        firsts = [[choice[0] for choice in choices] for _, choices in tokens]
        found[label] = means_of(questions, firsts, after, scores)
        del model
    return found


def _tokens(directory: Path, questions: Sequence[Question]) -> list[tuple[list[int], list[list[int]]]]:
    tokenizer = load_tokenizer(directory)
    return [choice_tokens(tokenizer, question) for question in questions]


def _require_room(
    directory: Path, questions: Sequence[Question], tokens: Sequence[tuple[list[int], list[list[int]]]]
) -> None:
    context = context_of(directory)
    for question, (prompt, choices) in zip(questions, tokens, strict=True):
        length = len(prompt) + max(map(len, choices))
        if context is not None and length > context:
            raise ConfigError(
                f"a question and its choices must fit the model's context of {context} tokens, got {length} of "
                f"{question.prompt[:40]!r}...; shorten it"
            )


TITLES = ("format", "entropy", "entropy of choices", "accuracy", "per token", "class ppl", "ECE", "Brier")


def answers_text(found: Mapping[str, AnswerMeans]) -> str:
    """For people: a line per model."""
    rows: list[tuple[str, ...]] = [("model", *TITLES)]
    for label, means in found.items():
        shares = (f"{100 * means.accuracy:.1f} %", f"{100 * means.accuracy_per_token:.1f} %")
        rows.append(
            (
                label,
                f"{100 * means.format:.2f} %",
                f"{means.entropy:.3f}",
                f"{means.choice_entropy:.3f}",
                *shares,
                f"{means.class_perplexity:.3f}",
                f"{means.calibration_error:.3f}",
                f"{means.brier:.3f}",
            )
        )
    number = next(iter(found.values())).num_questions
    error = 100 * math.sqrt(0.25 / number)
    return (
        aligned(rows)
        + f"\n\n{counted(number, 'question')}: the standard error of an accuracy is at most {error:.1f} percentage "
        "points\n"
        "format: probability of the first tokens of the choices\n"
        "per token: accuracy by probability per token, on which class ppl, ECE and Brier rest"
    )


def answers_to_dict(found: Mapping[str, AnswerMeans]) -> list[dict[str, Any]]:
    """Plain values under stable keys."""
    return [{"label": label, **asdict(means)} for label, means in found.items()]
