"""Where a response has its logprobs, by server; every token with its text, bytes and id, as far as they are said.

Three shapes:

    choices[].logprobs.content[]   chat of OpenAI, vLLM and Fireworks (`token_id`); llama.cpp's server (`id`), in
                                   /v1/completions too
    choices[].logprobs             completions: `tokens`, `token_logprobs`, `top_logprobs`; Fireworks adds `token_ids`
    completion_probabilities[]     llama.cpp's own /completion: entries as in `content`, and no `choices`

As documented in llama.cpp's tools/server/README.md, Fireworks' API reference and OpenAI's.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from formats.errors import FormatError

UNKNOWN = -9000.0
"""A logprob below it is not one: -9999 says that the token is not among the top."""


class Entry(NamedTuple):
    """One token with its logprob."""

    text: str
    content: list[int] | None
    """Its bytes, where they are said."""
    logprob: float
    number: int | None = None
    """Its id, where it is said."""

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> "Entry":
        """As an entry of `content` or of its `top_logprobs` says it."""
        number = said.get("token_id", said.get("id"))
        return cls(said["token"], said.get("bytes"), said["logprob"], number if type(number) is int else None)


def body_of(value: Any) -> Mapping[str, Any]:
    """A request or response, as it is or as a batch file wraps it."""
    if not isinstance(value, dict):
        return {}
    return value["body"] if isinstance(value.get("body"), dict) else value


def response_of(record: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The response of a line, with `choices` if it has any.

    Raises:
        FormatError: llama.cpp's server left out a part of the prompt.
    """
    response = body_of(record.get("response", record))
    entries = response.get("completion_probabilities")
    if "choices" in response or not isinstance(entries, list):
        return response
    if response.get("truncated"):
        raise FormatError(f"{where} must have the whole prompt, got truncated: true; leave the line out")
    choice = {
        "index": 0,
        "finish_reason": None if response.get("stop") is False else "stop",
        "logprobs": {"content": entries},
    }
    counts = {
        "prompt_tokens": response.get("tokens_evaluated"),
        "completion_tokens": response.get("tokens_predicted"),
    }
    return {**response, "choices": [choice], "usage": counts}


def failure_of(record: Mapping[str, Any], response: Mapping[str, Any]) -> Any:
    """The error of a request that has no answer; None where there is none."""
    return None if response.get("choices") else response.get("error") or record.get("error")


def count_failed(path: Path) -> tuple[int, int]:
    """(lines that hold a request that failed, lines) of a file."""
    num_failed = num_lines = 0
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            num_lines += bool(line.strip())
            with contextlib.suppress(TypeError, AttributeError, ValueError):
                record = json.loads(line)
                num_failed += bool(failure_of(record, body_of(record.get("response", record))))
    return num_failed, num_lines


def positions_of(logprobs: Mapping[str, Any], where: str) -> tuple[list[Entry], list[Sequence[Entry] | None]]:
    """(every token of the choice, the entries of the position that predicts it; None for a token that nothing does).

    Raises:
        FormatError: a part of the answer, or of its logprobs, is missing.
    """
    if logprobs.get("reasoning_content"):
        raise FormatError(
            f"{where} must have one list of logprobs, got reasoning_content beside content: which tokens stand between "
            "them is not said"
        )
    content = logprobs.get("content")
    if content is None:
        content = logprobs.get("refusal")  # OpenAI's name of an answer that refuses
    tops: list[Sequence[Entry] | None]
    if content is not None:
        if any("prob" in entry and "logprob" not in entry for entry in content):
            raise FormatError(
                f"{where} must have the model's own logprobs, got probabilities after sampling; ask without "
                "post_sampling_probs"
            )
        chosen = [Entry.of(entry) for entry in content]
        tops = [[Entry.of(top) for top in entry.get("top_logprobs") or ()] for entry in content]
    else:
        tokens, values = logprobs["tokens"], logprobs["token_logprobs"]
        numbers = logprobs.get("token_ids") or [None] * len(tokens)
        chosen = [
            Entry(text, None, UNKNOWN * 2 if value is None else value, number)
            for text, value, number in zip(tokens, values, numbers, strict=True)
        ]
        tops = [
            None if top is None else [Entry(text, None, value) for text, value in top.items()]
            for top in logprobs["top_logprobs"] or ()
        ]
    if not chosen:
        raise FormatError(f"{where} must have an answer of at least a token, got none; leave the line out")
    if len(tops) != len(chosen) or all(not top for top in tops):
        raise FormatError(f"{where} must have top_logprobs for every token, got none; ask for them")
    return chosen, tops


def is_partial(chosen: Sequence[Entry], number: int) -> bool:
    """Whether that token ends within a character, as vLLM shows it: without text and bytes."""
    return number >= 0 and not chosen[number].text and not chosen[number].content


def shows_spaces(path: Path) -> bool:
    """Whether a token of the file is named with the space before its word."""
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            with contextlib.suppress(TypeError, KeyError, AttributeError, ValueError, FormatError):
                for choice in response_of(json.loads(line), "")["choices"]:  # wrong ones are named when read
                    if any(re.match(r" [^ ]", text) for text in _texts(choice["logprobs"])):
                        return True
    return False


def _texts(logprobs: Mapping[str, Any]) -> Iterator[str]:
    """The names of tokens."""
    for entry in logprobs.get("content") or logprobs.get("refusal") or ():
        yield from (one["token"] for one in (entry, *(entry.get("top_logprobs") or ())))
    yield from logprobs.get("tokens") or ()
    for top in logprobs.get("top_logprobs") or ():
        yield from top or ()
