"""`anneal cache convert --tokenizer`: `logprobs` in the responses of an OpenAI-style API as rectangles (topk_table.py).

A line of JSON holds a response and what was asked:

    {"messages": [...], "response": {...}}
    {"prompt": "...", "response": {...}}
    {"request": {...}, "response": {...}}
    {..., "prompt_token_ids": [...]}

The last is the response alone, if it says what was asked. Chat and completions, with `echo` or without; the shapes are
in response_logprobs.py. Ids are taken where a server says them: vLLM's `prompt_token_ids` and `token_ids`, Fireworks'
`token_id`, llama.cpp's `id`. A part of an answer (a stream's chunk, an answer without its reasoning) is refused: its
tokens would stand behind another text than the server's.

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

from cache_builder.corpus.readers import Record
from cache_builder.tools.parquet_file import NewParquetFile
from cache_builder.tools.response_logprobs import (
    UNKNOWN,
    Entry,
    body_of,
    count_failed,
    failure_of,
    is_partial,
    positions_of,
    response_of,
    shows_spaces,
)
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
from formats.errors import AnnealError, CorpusError, FormatError, one_line
from formats.progress import Progress

USUAL_K = 20
"""The most that these APIs give."""
MOST_K = 1000


@dataclass(frozen=True, kw_only=True)
class ResponsesReport:
    """What was written."""

    table: TopKReport
    """The new file."""
    num_unnamed: int
    """Entries whose text is that of no token, or of several: in the tail."""
    models: list[str]
    """The models that the responses name."""
    left_out: Mapping[str, tuple[int, str]]
    """Lines that were refused and left out: why -> (how many, the first)."""

    def text(self) -> str:
        """Four lines: the result, how to read it, and what is not known; one more for what was left out."""
        skipped = f"{_left_out(self.left_out)}\n" if self.left_out else ""
        return (
            f"{self.table.text()}\n{skipped}"
            f"{self.num_unnamed} entries had a text of no token, or of several: they are in the tail\n"
            f"teacher: {', '.join(self.models) or 'not named'}, by the server's word; T = 1 and identity unverified: "
            "the KL of its own teacher must be nearly zero before the first step"
        )


def _left_out(reasons: Mapping[str, tuple[int, str]]) -> str:
    counts = [f"{why}: {number} (first {where})" for why, (number, where) in reasons.items()]
    return f"lines left out: {sum(number for number, _ in reasons.values())}; {'; '.join(counts)}"


def convert_responses(
    files: Sequence[str | Path],
    tokenizer: Any,
    out: str | Path,
    *,
    k: int | None = None,
    limit: int | None = None,
    skip_refused: bool = False,
    progress: Progress | None = None,
) -> ResponsesReport:
    """Write the choices of every response, in order, to one Parquet file that appears when it is complete.

    Args:
        tokenizer: of the teacher, loaded by transformers.
        k: entries of every position; the others join the tail.
        limit: read only so many lines.
        skip_refused: leave out the lines that would be refused, and report how many and why.

    Raises:
        ConfigError: `out` exists or cannot be written; `k` out of range.
        FormatError: a line is no such response, names a token that the tokenizer does not have, or has a prompt of
            another length than the server counted; with `skip_refused`, every line.
    """
    progress = progress or Progress()
    file = NewParquetFile(out)
    check_choice(k, limit, most=MOST_K, what="entries of a position")
    k = k or USUAL_K
    reading = _Reading(
        [Path(name).expanduser() for name in files], tokenizer, k, limit, skip_refused, progress
    )
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
        left_out=reading.left_out,
    )


class _Reading:
    """The files' lines as rows."""

    def __init__(
        self,
        files: list[Path],
        tokenizer: Any,
        k: int,
        limit: int | None,
        skip_refused: bool,
        progress: Progress,
    ) -> None:
        self._files, self._k, self._limit, self._skip_refused = files, k, limit, skip_refused
        self._progress = progress
        self._ids = TokenIds(tokenizer)
        self._prompts = ResponsePrompts(tokenizer, self._ids.size)
        self.num_unnamed = 0
        self.models: set[str] = set()
        self.left_out: dict[str, tuple[int, str]] = {}

    def rows(self) -> Iterator[TopKRow]:
        """Every choice of every line.

        Raises:
            FormatError: a line is refused, or all are left out.
        """
        count = 0
        for row in self._rows_of_files():
            count += 1
            yield row
        if self.left_out and not count:
            raise FormatError(
                f"a line must hold a response with logprobs, got none; {_left_out(self.left_out)}"
            )

    def _rows_of_files(self) -> Iterator[TopKRow]:
        left = self._limit
        for path in self._files:
            try:
                self._ids.lost_spaces = self._ids.may_lose_spaces and not shows_spaces(path)
                with open(path, encoding="utf-8") as lines:
                    for number, line in enumerate(lines, 1):
                        if left == 0:
                            return
                        if line.strip():
                            left = None if left is None else left - 1
                            yield from self._choices(line, Record({}, path.name, number, "line"), path)
            except (OSError, UnicodeDecodeError) as error:
                raise FormatError(f"{path} must be a file of JSON lines, got {one_line(error)}") from None

    def _choices(self, line: str, place: Record, path: Path) -> Sequence[TopKRow]:
        """The rows of a line; none if it is refused and left out."""
        unnamed = self.num_unnamed
        try:
            return self._checked(line, place, path)
        except (FormatError, CorpusError) as error:
            if not self._skip_refused:
                raise
            why = str(error).replace(place.where, "").partition(", got ")[0].strip()
            number, first = self.left_out.get(why, (0, place.where))
            self.left_out[why] = number + 1, first
            self.num_unnamed = unnamed
            return ()

    def _checked(self, line: str, place: Record, path: Path) -> Sequence[TopKRow]:
        where = place.where
        try:
            record = json.loads(line)
        except ValueError as error:
            raise FormatError(f"{where} must be JSON, got {one_line(error)}") from None
        record = record if isinstance(record, dict) else {}
        try:
            response = response_of(record, where)
            if failure := failure_of(record, response):
                raise self._failed(failure, where, path)
            return self._rows(record, response, place)
        except AnnealError:
            raise
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
            raise FormatError(
                f"{where} must be a chat or completions response, got {one_line(error)}"
            ) from None

    def _failed(self, error: Any, where: str, path: Path) -> FormatError:
        """Says how many others there are: nobody wants to meet them one after another."""
        number, of = (1, 1) if self._skip_refused else count_failed(path)
        return FormatError(
            f"{where} must hold a response with choices, got the error {json.dumps(error, ensure_ascii=False):.200}; "
            f"{number} of {of} lines hold a request that failed: ask for them again, or leave them out with "
            "--skip-refused"
        )

    def _rows(
        self, record: Mapping[str, Any], response: Mapping[str, Any], place: Record
    ) -> Sequence[TopKRow]:
        where = place.where
        choices = response.get("choices")
        if not isinstance(choices, list) or not choices:
            raise FormatError(f"{where} must hold a response with choices, got none")
        for choice in choices:
            if "delta" in choice or choice.get("finish_reason", "") is None:
                raise FormatError(
                    f"{where} must hold a whole response, got a part of a stream; join its parts"
                )
            if not isinstance(choice.get("logprobs"), dict):
                raise FormatError(f"{where} must have logprobs, got none; ask for logprobs and top_logprobs")
        asked = body_of(record.get("request") or {}) or record
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
        chosen, tops = positions_of(choice["logprobs"], where)
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
                within_character=is_partial(chosen, number - 1),
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
                entry = chosen[number]
                named = self._number(entry, within_character=is_partial(chosen, number - 1))
                if named not in (None, token):
                    raise FormatError(
                        f"{where} must echo its prompt, got {entry.text!r} for its token {number}; another tokenizer?"
                    )
        return [*prompt, *new]

    def _id(self, chosen: list[Entry], number: int, where: str) -> int:
        entry = chosen[number]
        token = self._number(entry, within_character=is_partial(chosen, number - 1))
        if token is not None and entry.number is not None:
            self._check_id(entry, where)
        if token is None:
            raise FormatError(
                f"{where} must name tokens of the tokenizer, got {entry.text!r}, which is none of them or several; "
                f"{ASK_FOR_IDS}, or give the teacher's own tokenizer"
            )
        return token

    def _number(self, entry: Entry, *, within_character: bool) -> int | None:
        """The id of an entry, as it is said or named; None where it is no token's, or its text fits several."""
        if entry.number is not None:
            return entry.number if 0 <= entry.number < self._ids.size else None
        return self._ids.of(entry.text, entry.content, within_character=within_character)

    def _check_id(self, entry: Entry, where: str) -> None:
        """An id alone would fit any tokenizer: it must be that of the text beside it."""
        assert entry.number is not None
        own, said = (
            self._ids.content(entry.number),
            bytes(entry.content or entry.text.encode("utf-8", "replace")),
        )
        if entry.content and len(own) < len(said) and not own.isascii() and said.endswith(own):
            # llama.cpp gives the token that ends a character the bytes of all of its tokens, and leaves out the others
            raise FormatError(
                f"{where} must have logprobs of the whole answer, got a character of several tokens, {entry.text!r}, "
                "with its last one alone; leave the line out"
            )
        if own.isascii() and said.isascii() and own.strip() and said.strip() and own.strip() != said.strip():
            raise FormatError(
                f"{where} must name tokens of the tokenizer, got {entry.text!r} for the id {entry.number}, which is "
                f"{own.decode()!r}; give the teacher's own tokenizer"
            )

    def _named(
        self, top: Sequence[Entry], chosen: Entry, token: int, *, within_character: bool, where: str
    ) -> tuple[list[tuple[int, float]], float]:
        """The k most probable entries that have an id, each once, and log of the tail; together they sum to 1.

        Args:
            token: the id of the chosen one.
        """
        found: dict[int, float] = {}
        for entry in (*top, chosen):
            text, logprob = entry.text, entry.logprob
            if not isinstance(logprob, int | float) or math.isnan(logprob) or logprob > 1e-3:
                raise FormatError(f"{where} must have logprobs of at most 0, got {logprob!r} for {text!r}")
            if logprob < UNKNOWN:
                continue
            is_chosen = entry.number is None and (text, logprob) == (chosen.text, chosen.logprob)
            number = token if is_chosen else self._number(entry, within_character=within_character)
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
