"""`anneal cache convert --tokenizer`: `logprobs` in the responses of an OpenAI-style API as rectangles (topk_table.py).

A line of JSON holds a response and what was asked:

    {"messages": [...], "response": {...}}
    {"prompt": "...", "response": {...}}
    {"request": {...}, "response": {...}}

Two forms of response: chat, `choices[].logprobs.content[]` with `token`, `bytes`, `logprob`, `top_logprobs`; and
completions, `choices[].logprobs` with `tokens`, `token_logprobs`, `top_logprobs`, with `echo` or without. vLLM's
`prompt_token_ids` and `token_ids` are taken where they are.

What the entries of a position leave of the mass is its tail, one number. The file is marked as what it is: at T = 1 by
the server's word, of a teacher whom nobody has identified. Its KL before the first step proves it, or refuses it.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache_builder.tools.parquet_file import NewParquetFile
from cache_builder.tools.response_tokens import TokenIds
from cache_builder.tools.topk_table import (
    PADDING_LOGPROB,
    TopKReport,
    TopKRow,
    TopKTables,
    check_cells,
    check_choice,
    layout_metadata,
    schema_of,
)
from formats.disk.token_row import IGNORED
from formats.errors import FormatError, one_line
from formats.progress import Progress

USUAL_K = 20
"""The most that these APIs give."""
MOST_K = 1000
UNKNOWN = -9000.0
"""A logprob below it is not one: -9999 says that the token is not among the top."""

Entry = tuple[str, "list[int] | None", float]
"""A token's text, its bytes where they are said, its logprob."""


@dataclass(frozen=True, kw_only=True)
class ResponsesReport:
    """What was written."""

    table: TopKReport
    """The new file."""
    num_unnamed: int
    """Entries whose text is that of no token, or of several: in the tail."""
    models: list[str]
    """The models that the responses name."""

    def text(self) -> str:
        """Four lines: the result, how to read it, and what is not known."""
        return (
            f"{self.table.text()}\n"
            f"{self.num_unnamed} entries had a text of no token, or of several: they are in the tail\n"
            f"teacher: {', '.join(self.models) or 'not named'}, by the server's word; T = 1 and identity unverified: "
            "the KL of its own teacher must be nearly zero before the first step"
        )


def convert_responses(
    files: Sequence[str | Path],
    tokenizer: Any,
    out: str | Path,
    *,
    k: int | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> ResponsesReport:
    """Write the choices of every response, in order, to one Parquet file that appears when it is complete.

    Args:
        tokenizer: of the teacher, loaded by transformers.
        k: entries of every position; the others join the tail.
        limit: read only so many lines.

    Raises:
        ConfigError: `out` exists or cannot be written; `k` out of range.
        FormatError: a line is no such response, names a token that the tokenizer does not have, or has a prompt of
            another length than the server counted.
    """
    progress = progress or Progress()
    file = NewParquetFile(out)
    check_choice(k, limit, most=MOST_K, what="entries of a position")
    k = k or USUAL_K
    reading = _Reading([Path(name).expanduser() for name in files], tokenizer, k, limit, progress)
    tables = TopKTables(reading.rows(), k)
    try:
        progress.start("convert", None, unit="line")
        metadata = layout_metadata(k) | {
            "anneal_marks": json.dumps(["T = 1 unverified", "identity unverified", "one tail"]),
            "responses": json.dumps([Path(name).name for name in files]),
        }
        num_bytes = file.write(schema_of(k), metadata, tables)
    finally:
        progress.finish()
    return ResponsesReport(
        table=tables.report(str(file.path), num_bytes),
        num_unnamed=reading.num_unnamed,
        models=sorted(reading.models),
    )


class _Reading:
    """The files' lines as rows."""

    def __init__(
        self, files: list[Path], tokenizer: Any, k: int, limit: int | None, progress: Progress
    ) -> None:
        self._files, self._tokenizer, self._k, self._limit = files, tokenizer, k, limit
        self._progress = progress
        self._ids = TokenIds(tokenizer)
        self.num_unnamed = 0
        self.models: set[str] = set()

    def rows(self) -> Iterator[TopKRow]:
        """Every choice of every line."""
        left = self._limit
        for path in self._files:
            try:
                with open(path, encoding="utf-8") as lines:
                    for number, line in enumerate(lines, 1):
                        if left == 0:
                            return
                        if line.strip():
                            left = None if left is None else left - 1
                            yield from self._choices(line, f"{path.name}, line {number}")
            except (OSError, UnicodeDecodeError) as error:
                raise FormatError(f"{path} must be a file of JSON lines, got {one_line(error)}") from None

    def _choices(self, line: str, where: str) -> Iterator[TopKRow]:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise FormatError(f"{where} must be JSON, got {one_line(error)}") from None
        response = _body(record.get("response", record)) if isinstance(record, dict) else {}
        choices = response.get("choices")
        if not isinstance(choices, list) or not choices:
            raise FormatError(f"{where} must hold a response with choices, got none")
        if model := response.get("model"):
            self.models.add(str(model))
        asked = _body(record.get("request") or {}) or record
        for choice in choices:
            logprobs = choice.get("logprobs") if isinstance(choice, dict) else None
            if not isinstance(logprobs, dict):
                raise FormatError(f"{where} must have logprobs, got none; ask for logprobs and top_logprobs")
            try:
                yield self._row(asked, response, choice, logprobs, where)
            except (TypeError, KeyError, AttributeError) as error:
                raise FormatError(
                    f"{where} must be a chat or completions response, got {one_line(error)}"
                ) from None
            self._progress.advance(1, 0)

    def _row(
        self,
        asked: Mapping[str, Any],
        response: Mapping[str, Any],
        choice: Mapping[str, Any],
        logprobs: Mapping[str, Any],
        where: str,
    ) -> TopKRow:
        chosen, tops = _positions(logprobs, where)
        completion = choice.get("token_ids")
        if completion is None:
            completion = [self._id(text, content, where) for text, content, _ in chosen]
        if len(completion) != len(chosen):
            raise FormatError(
                f"{where} must have a logprob for every token, got {len(chosen)} for {len(completion)}"
            )
        echoed = bool(tops) and tops[0] is None
        prompt = [] if echoed else self._prompt(asked, response, choice, where)
        first_label = _echoed_prompt(asked, logprobs, where) if echoed else len(prompt)
        ids = np.asarray([*prompt, *completion], np.int32)
        check_cells(len(ids), self._k, where)
        labels = np.where(np.arange(len(ids)) >= max(first_label, 1), ids, IGNORED).astype(np.int32)
        length = len(ids)
        entries = np.zeros((length, self._k), np.int32)
        values = np.full((length, self._k), PADDING_LOGPROB, np.float32)
        tail = np.full(length, PADDING_LOGPROB, np.float32)
        mask = np.zeros(length, np.bool_)
        count = 0
        for number, top in enumerate(tops):
            at = len(prompt) + number - 1  # the position that predicts this token
            if top is None or at < 0:
                continue
            named, rest = self._named([*top, chosen[number]], where)
            entries[at], mask[at] = named[0][0], True
            entries[at, : len(named)] = [token for token, _ in named]
            values[at, : len(named)] = [logprob for _, logprob in named]
            tail[at] = rest
            count += len(named)
        return TopKRow(ids, labels, entries, values, tail, mask, count)

    def _named(self, top: Sequence[Entry], where: str) -> tuple[list[tuple[int, float]], float]:
        """The k most probable entries that have an id, each once, and log of the tail; together they sum to 1."""
        found: dict[int, float] = {}
        for text, content, logprob in top:
            if not isinstance(logprob, int | float) or math.isnan(logprob) or logprob > 1e-3:
                raise FormatError(f"{where} must have logprobs of at most 0, got {logprob!r} for {text!r}")
            if logprob < UNKNOWN:
                continue
            token = self._ids.of(text, content)
            if token is None:
                self.num_unnamed += 1
                continue
            found[token] = max(found.get(token, -math.inf), float(logprob))
        if not found:
            raise FormatError(f"{where} must name a token at every position, got none that the tokenizer has")
        named = sorted(found.items(), key=lambda entry: -entry[1])[: self._k]
        total = math.fsum(math.exp(logprob) for _, logprob in named)
        scale = math.log(total) if total > 1 else 0.0
        rest = math.log1p(-total) if total < 1 else PADDING_LOGPROB
        return [(token, max(logprob - scale, PADDING_LOGPROB)) for token, logprob in named], max(
            rest, PADDING_LOGPROB
        )

    def _id(self, text: str, content: list[int] | None, where: str) -> int:
        token = self._ids.of(text, content)
        if token is None:
            raise FormatError(
                f"{where} must name tokens of the tokenizer, got {text!r}, which is none of them or several; ask the "
                "server for token ids (vLLM: return_token_ids), or give the teacher's own tokenizer"
            )
        return token

    def _prompt(
        self, asked: Mapping[str, Any], response: Mapping[str, Any], choice: Mapping[str, Any], where: str
    ) -> list[int]:
        known = choice.get("prompt_token_ids") or response.get("prompt_token_ids")
        if known:
            return [int(token) for token in known]
        if messages := asked.get("messages"):
            rendered = self._tokenizer.apply_chat_template(
                messages,
                tools=asked.get("tools"),
                add_generation_prompt=True,
                return_dict=True,
                **(asked.get("chat_template_kwargs") or {}),
            )
            prompt = list(rendered["input_ids"])
        elif isinstance(asked.get("prompt"), str):
            prompt = list(self._tokenizer(asked["prompt"])["input_ids"])
        else:
            raise FormatError(
                f"{where} must hold messages, a prompt or prompt_token_ids beside the response, got none"
            )
        counted = (response.get("usage") or {}).get("prompt_tokens")
        if counted is not None and counted != len(prompt):
            raise FormatError(
                f"{where} must have the prompt that the server saw, got {len(prompt)} tokens where it counted "
                f"{counted}; another tokenizer, chat template or template arguments"
            )
        return prompt


def _body(value: Any) -> Mapping[str, Any]:
    """A request or response, as it is or as a batch file wraps it."""
    if not isinstance(value, dict):
        return {}
    return value["body"] if isinstance(value.get("body"), dict) else value


def _positions(logprobs: Mapping[str, Any], where: str) -> tuple[list[Entry], list[list[Entry] | None]]:
    """(every token of the choice, the entries of the position that predicts it; None for a token that nothing does)."""
    if logprobs.get("content") is not None:
        content = logprobs["content"]
        chosen = [(entry["token"], entry.get("bytes"), entry["logprob"]) for entry in content]
        tops: list[list[Entry] | None] = [
            [(top["token"], top.get("bytes"), top["logprob"]) for top in entry.get("top_logprobs") or ()]
            for entry in content
        ]
    else:
        tokens, values = logprobs["tokens"], logprobs["token_logprobs"]
        chosen = [
            (text, None, UNKNOWN * 2 if value is None else value)
            for text, value in zip(tokens, values, strict=True)
        ]
        tops = [
            None if top is None else [(text, None, value) for text, value in top.items()]
            for top in logprobs["top_logprobs"] or ()
        ]
    if not chosen or len(tops) != len(chosen) or all(not top for top in tops):
        raise FormatError(f"{where} must have top_logprobs for every token, got none; ask for them")
    return chosen, tops


def _echoed_prompt(asked: Mapping[str, Any], logprobs: Mapping[str, Any], where: str) -> int:
    """Tokens of a prompt that stands in the response itself."""
    offsets, prompt = logprobs.get("text_offset"), asked.get("prompt")
    if not isinstance(prompt, str) or not offsets:
        raise FormatError(f"{where} must hold the prompt that it echoes, and text_offset, got none")
    return sum(offset < len(prompt) for offset in offsets)
