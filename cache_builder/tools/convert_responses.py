"""`anneal cache convert --tokenizer`: `logprobs` in the responses of an OpenAI-style API as rectangles (topk_table.py).

A line of JSON holds a response and what was asked:

    {"messages": [...], "response": {...}}
    {"prompt": "...", "response": {...}}
    {"request": {...}, "response": {...}}
    {..., "prompt_token_ids": [...]}

The last is the response alone, if it says what was asked. Two forms of response: chat, `choices[].logprobs.content[]`
with `token`, `bytes`, `logprob`, `top_logprobs`; and completions, `choices[].logprobs` with `tokens`,
`token_logprobs`, `top_logprobs`, with `echo` or without. vLLM's `prompt_token_ids` and `token_ids` are taken where they
are. A part of an answer (a stream's chunk, an answer without its reasoning) is refused: its tokens would stand behind
another text than the server's.

What the entries of a position leave of the mass is its tail, one number. The file is marked as what it is: at T = 1 by
the server's word, of a teacher whom nobody has identified. Its KL before the first step proves it, or refuses it.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache_builder.corpus.readers import Record
from cache_builder.tools.parquet_file import NewParquetFile
from cache_builder.tools.response_prompts import ASK_FOR_IDS, ResponsePrompts
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
from formats.errors import AnnealError, FormatError, one_line
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
        self._files, self._k, self._limit = files, k, limit
        self._progress = progress
        self._ids = TokenIds(tokenizer)
        self._prompts = ResponsePrompts(tokenizer, self._ids.size)
        self.num_unnamed = 0
        self.models: set[str] = set()

    def rows(self) -> Iterator[TopKRow]:
        """Every choice of every line."""
        left = self._limit
        for path in self._files:
            try:
                self._ids.lost_spaces = self._ids.may_lose_spaces and not _shows_spaces(path)
                with open(path, encoding="utf-8") as lines:
                    for number, line in enumerate(lines, 1):
                        if left == 0:
                            return
                        if line.strip():
                            left = None if left is None else left - 1
                            yield from self._choices(line, Record({}, path.name, number, "line"))
            except (OSError, UnicodeDecodeError) as error:
                raise FormatError(f"{path} must be a file of JSON lines, got {one_line(error)}") from None

    def _choices(self, line: str, place: Record) -> Iterator[TopKRow]:
        where = place.where
        try:
            record = json.loads(line)
        except ValueError as error:
            raise FormatError(f"{where} must be JSON, got {one_line(error)}") from None
        try:
            yield from self._rows(record if isinstance(record, dict) else {}, place)
        except AnnealError:
            raise
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
            raise FormatError(
                f"{where} must be a chat or completions response, got {one_line(error)}"
            ) from None

    def _rows(self, record: Mapping[str, Any], place: Record) -> Sequence[TopKRow]:
        where = place.where
        response = _body(record.get("response", record))
        choices = response.get("choices")
        if not isinstance(choices, list) or not choices:
            error = response.get("error") or record.get("error")
            got = (
                f"the error {json.dumps(error, ensure_ascii=False):.200}; leave the line out"
                if error
                else "none"
            )
            raise FormatError(f"{where} must hold a response with choices, got {got}")
        for choice in choices:
            if "delta" in choice or choice.get("finish_reason", "") is None:
                raise FormatError(
                    f"{where} must hold a whole response, got a part of a stream; join its parts"
                )
            if not isinstance(choice.get("logprobs"), dict):
                raise FormatError(f"{where} must have logprobs, got none; ask for logprobs and top_logprobs")
        asked = _body(record.get("request") or {}) or record
        prompts = self._prompts.of(asked, response, place)
        rows = [self._row(choice, prompt, where) for choice, prompt in zip(choices, prompts, strict=True)]
        written = (response.get("usage") or {}).get("completion_tokens") or 0
        found = sum(len(row.input_ids) for row in rows) - sum(map(len, prompts))
        if found < written - len(rows):  # servers count the end of an answer, or they do not
            raise FormatError(
                f"{where} must have logprobs of the whole answer, got {found} of {written} tokens; is it without its "
                "reasoning, or a part of a stream?"
            )
        if model := response.get("model"):
            self.models.add(str(model))
        self._progress.advance(len(rows), 0)
        return rows

    def _row(self, choice: Mapping[str, Any], prompt: list[int], where: str) -> TopKRow:
        chosen, tops = _positions(choice["logprobs"], where)
        echoed = bool(tops) and tops[0] is None
        ids = self._token_ids(choice, chosen, prompt, echoed=echoed, where=where)
        before = len(ids) - len(chosen)
        check_cells(len(ids), self._k, where)
        labels = np.where(np.arange(len(ids)) >= max(len(prompt), 1), ids, IGNORED).astype(np.int32)
        length = len(ids)
        entries = np.zeros((length, self._k), np.int32)
        values = np.full((length, self._k), PADDING_LOGPROB, np.float32)
        tail = np.full(length, PADDING_LOGPROB, np.float32)
        mask = np.zeros(length, np.bool_)
        count = 0
        for number, top in enumerate(tops):
            at = before + number - 1  # the position that predicts this token
            if top is None or at < 0:
                continue
            named, rest = self._named(
                top,
                chosen[number],
                ids[at + 1],
                within_character=_is_partial(chosen, number - 1),
                where=where,
            )
            entries[at], mask[at] = named[0][0], True
            entries[at, : len(named)] = [token for token, _ in named]
            values[at, : len(named)] = [logprob for _, logprob in named]
            tail[at] = rest
            count += len(named)
        return TopKRow(np.asarray(ids, np.int32), labels, entries, values, tail, mask, count)

    def _token_ids(
        self, choice: Mapping[str, Any], chosen: list[Entry], prompt: list[int], *, echoed: bool, where: str
    ) -> list[int]:
        """The tokens of prompt and answer, as they are said or named."""
        num_new = len(chosen) - len(prompt) if echoed else len(chosen)
        said = choice.get("token_ids")
        if said is not None:
            # With max_tokens 0 vLLM writes one token all the same, and gives no logprob of it.
            new = [] if echoed and num_new == 0 else self._prompts.checked(said, where)
        else:
            new = [
                self._id(chosen, number, where)
                for number in range(len(chosen) - max(num_new, 0), len(chosen))
            ]
        if len(new) != num_new:
            raise FormatError(
                f"{where} must have a logprob for every token, got {len(chosen)} for {len(new)}"
                + (f" after an echoed prompt of {len(prompt)}" if echoed else "")
            )
        if echoed:
            for number, token in enumerate(prompt):
                named = self._ids.of(*chosen[number][:2], within_character=_is_partial(chosen, number - 1))
                if named not in (None, token):
                    raise FormatError(
                        f"{where} must echo its prompt, got {chosen[number][0]!r} for its token {number}; another "
                        "tokenizer?"
                    )
        return [*prompt, *new]

    def _id(self, chosen: list[Entry], number: int, where: str) -> int:
        text, content, _ = chosen[number]
        token = self._ids.of(text, content, within_character=_is_partial(chosen, number - 1))
        if token is None:
            raise FormatError(
                f"{where} must name tokens of the tokenizer, got {text!r}, which is none of them or several; "
                f"{ASK_FOR_IDS}, or give the teacher's own tokenizer"
            )
        return token

    def _named(
        self, top: Sequence[Entry], chosen: Entry, token: int, *, within_character: bool, where: str
    ) -> tuple[list[tuple[int, float]], float]:
        """The k most probable entries that have an id, each once, and log of the tail; together they sum to 1.

        Args:
            token: the id of the chosen one.
        """
        found: dict[int, float] = {}
        for entry in (*top, chosen):
            text, content, logprob = entry
            if not isinstance(logprob, int | float) or math.isnan(logprob) or logprob > 1e-3:
                raise FormatError(f"{where} must have logprobs of at most 0, got {logprob!r} for {text!r}")
            if logprob < UNKNOWN:
                continue
            is_chosen = (text, logprob) == (chosen[0], chosen[2])
            number = token if is_chosen else self._ids.of(text, content, within_character=within_character)
            if number is None:
                self.num_unnamed += 1
                continue
            found[number] = max(found.get(number, -math.inf), float(logprob))
        if not found:
            raise FormatError(f"{where} must name a token at every position, got none that the tokenizer has")
        named = sorted(found.items(), key=lambda entry: -entry[1])[: self._k]
        total = math.fsum(math.exp(logprob) for _, logprob in named)
        scale = math.log(total) if total > 1 else 0.0
        rest = math.log1p(-total) if total < 1 else PADDING_LOGPROB
        return [(number, max(logprob - scale, PADDING_LOGPROB)) for number, logprob in named], max(
            rest, PADDING_LOGPROB
        )


def _body(value: Any) -> Mapping[str, Any]:
    """A request or response, as it is or as a batch file wraps it."""
    if not isinstance(value, dict):
        return {}
    return value["body"] if isinstance(value.get("body"), dict) else value


def _positions(logprobs: Mapping[str, Any], where: str) -> tuple[list[Entry], list[list[Entry] | None]]:
    """(every token of the choice, the entries of the position that predicts it; None for a token that nothing does)."""
    if logprobs.get("reasoning_content"):
        raise FormatError(
            f"{where} must have one list of logprobs, got reasoning_content beside content: which tokens stand between "
            "them is not said"
        )
    content = logprobs.get("content")
    if content is None:
        content = logprobs.get("refusal")  # OpenAI's name of an answer that refuses
    if content is not None:
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
    if not chosen:
        raise FormatError(f"{where} must have an answer of at least a token, got none; leave the line out")
    if len(tops) != len(chosen) or all(not top for top in tops):
        raise FormatError(f"{where} must have top_logprobs for every token, got none; ask for them")
    return chosen, tops


def _is_partial(chosen: list[Entry], number: int) -> bool:
    """Whether that token ends within a character, as vLLM shows it: without text and bytes."""
    return number >= 0 and not chosen[number][0] and not chosen[number][1]


def _shows_spaces(path: Path) -> bool:
    """Whether a token of the file is named with the space before its word."""
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            with contextlib.suppress(
                TypeError, KeyError, AttributeError, ValueError
            ):  # named when it is read
                record = json.loads(line)
                for choice in _body(record.get("response", record))["choices"]:
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
