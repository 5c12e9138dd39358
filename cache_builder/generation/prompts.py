"""What generated rows begin with, as token ids: a file of prompts, or the start of a conversation or a text.

    a line of a .txt file      what a person types: a user's turn for a chat model, the beginning of a text without a
                               chat template
    any record of a corpus     as a build of that corpus has it, up to where the answer begins: `prompt` (strings as
                               they stand, messages through the template), conversations without a last turn of the
                               assistant, `instruction` (+ `input`), `text`, `input_ids` up to the first target
    no file                    a user's turn that the model writes too (`user_turn`), one of nothing, or what the
                               tokenizer puts before a text

Memory: the prompts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np

from cache_builder.corpus.examples import Conversation, Example, PromptCompletion, Text, convert
from cache_builder.corpus.fields import names
from cache_builder.corpus.files import DEFAULT_SPLIT, find_files
from cache_builder.corpus.hub_data_set import HubSource, parse_hub_name
from cache_builder.corpus.layouts import Layout, is_turns, recognise
from cache_builder.corpus.readers import Record, family_of, read_records
from cache_builder.corpus.ready_tokens import Tokens
from cache_builder.generation.settings import Start
from cache_builder.generation.user_turn import UserTurn
from cache_builder.rows.encoding import SpecialTokens
from cache_builder.rows.shown import require_shown
from cache_builder.rows.template import ChatTemplate
from formats.errors import ConfigError, CorpusError
from formats.progress import counted

LINE = "line"
"""The column of a record that is a line of text."""
_ANSWER = [{"role": "assistant", "content": "answer"}]
"""Stands for the answer of a prompt that has none, and goes with it."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The beginnings of rows."""

    tokens: tuple[np.ndarray, ...]
    """int32 [L] each, at least one token and room for another."""
    source: str
    """Where they are from, for people."""
    kind: str
    """What they are, for people."""
    uses_template: bool
    """Whether the chat template made one of them."""
    turn: UserTurn | None = None
    """Where the model writes the rest of a prompt."""
    num_empty: int = 0
    """Prompts of nothing, left out."""
    num_too_long: int = 0
    """Prompts that leave no room for a token, left out."""

    def notes(self) -> list[str]:
        """A sentence for everything that was left out."""
        remarks = ((self.num_empty, "empty"), (self.num_too_long, "no room for a new token in a row"))
        return [f"{counted(count, 'prompt')} skipped: {why}" for count, why in remarks if count]


class PromptReader:
    """Prompts through one tokenizer.

    Args:
        arguments: variables of the chat template.
        instant: what its `strftime_now` tells.
        max_length: of a row; a prompt must be shorter.
        num_outputs: tokens the model predicts, where known.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        arguments: Mapping[str, Any],
        instant: datetime | None,
        max_length: int,
        num_outputs: int | None,
    ) -> None:
        self._tokenizer, self._max_length, self._num_outputs = tokenizer, max_length, num_outputs
        self._special = SpecialTokens.of(tokenizer)
        self._template = ChatTemplate(tokenizer, arguments, instant) if tokenizer.chat_template else None
        self._used_template = False

    def default(self, start: Start | None = None) -> Prompts:
        """The one prompt without a file.

        Raises:
            ConfigError: there is no chat template, or no token to start from, or rows have no room for another one.
        """
        if start is None:
            start = "bos" if self._template is None else "dialogue"
        if start != "bos" and self._template is None:
            raise ConfigError(
                f"--generate-from {start} needs a chat template, got a tokenizer without one; leave it out"
            )
        if start == "dialogue":
            return self._dialogue()
        if start == "empty-turn":
            tokens, kind = self._of_conversation(_asked("")), "the chat template's empty user turn"
        else:
            first = self._special.prefix or self._start_token()
            tokens = np.array(first, np.int32)
            kind = " ".join(str(self._tokenizer.convert_ids_to_tokens(token)) for token in first)
        if len(tokens) >= self._max_length:
            raise ConfigError(
                f"max_length must be at least {len(tokens) + 1} (the prompt and one token), got {self._max_length}"
            )
        return Prompts(
            tokens=(tokens,), source="written by the model", kind=kind, uses_template=self._used_template
        )

    def _dialogue(self) -> Prompts:
        def render(text: str) -> str:
            assert self._template is not None
            return self._template.render(_asked(text), generation_prompt=True)

        turn = UserTurn.of(self._tokenizer, render, self._encode, self._max_length)
        if len(turn.before) == 0:  # a template that puts nothing there
            turn = replace(turn, before=np.array(self._start_token(), np.int32))
        return Prompts(
            tokens=(turn.before,),
            source="written by the model",
            kind=f"a user's turn that the model writes too, of up to {counted(turn.max_new_tokens, 'token')}",
            uses_template=True,
            turn=turn,
        )

    def _start_token(self) -> tuple[int, ...]:
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):  # documents follow an EOS
            if token is not None:
                return (int(token),)
        raise ConfigError(
            "a text must start from a token, got a tokenizer without BOS and EOS; bring --prompts FILE"
        )

    def read(self, source: str, limit: int) -> Prompts:
        """The first `limit` prompts that can be used.

        Raises:
            CorpusError: no such file, a malformed record, or no prompt that can be used.
        """
        tokens: list[np.ndarray] = []
        layout: Layout | None = None
        num_empty = num_too_long = 0
        for record in _records(source):
            if LINE not in record.values:
                record = _with_answer(record)
                layout = layout or recognise(record.values, what="prompts", remedy="rename them")
            found = self._of_record(record, layout)
            if len(found) == 0:
                num_empty += 1
            elif len(found) >= self._max_length:
                num_too_long += 1
            else:
                tokens.append(self._checked(found, record))
            if len(tokens) == limit:
                break
        prompts = Prompts(
            tokens=tuple(tokens),
            source=source,
            kind="lines" if layout is None else layout.name,
            uses_template=self._used_template,
            num_empty=num_empty,
            num_too_long=num_too_long,
        )
        if not tokens:
            skipped = "; ".join(prompts.notes()) or "nothing"
            raise CorpusError(f"prompts must hold at least one that can be used, got {skipped} in {source}")
        return prompts

    def _of_record(self, record: Record, layout: Layout | None) -> np.ndarray:
        example: Example
        if layout is None:
            line = str(record.values[LINE])
            if not line.strip():
                return np.zeros(0, np.int32)
            asked = replace(_asked(line), where=record.where)
            example = Text(line, record.where) if self._template is None else asked
        else:
            if layout.uses_chat_template and self._template is None:
                ChatTemplate(self._tokenizer)  # says that there is none
            example = convert(
                record,
                layout,
                has_chat_template=self._template is not None,
                vocab_size=len(self._tokenizer),
            )
        if isinstance(example, Conversation):
            return self._of_conversation(example)
        if isinstance(example, Tokens):
            mask = example.loss_mask
            first = int(mask.argmax()) if mask is not None and mask.any() else len(example.input_ids)
            return example.input_ids[:first].astype(np.int32)
        text = example.prompt if isinstance(example, PromptCompletion) else example.text
        if self._special.is_blank(text):
            return np.zeros(0, np.int32)
        before, _ = self._special.around(text, append_eos=False)
        return np.array([*before, *self._encode(text)], np.int32)

    def _of_conversation(self, conversation: Conversation) -> np.ndarray:
        """Everything before the last turn if that is the assistant's, and its header."""
        assert self._template is not None
        messages = list(conversation.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise CorpusError(
                f"a prompt must hold a turn that is not the assistant's, got none in {conversation.where}"
            )
        self._used_template = True
        asked = self._template.prepared(replace(conversation, messages=messages, without_loss=frozenset()))
        require_shown(self._template, asked, self._template.render(asked))
        return np.array(self._encode(self._template.render(asked, generation_prompt=True)), np.int32)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _checked(self, tokens: np.ndarray, record: Record) -> np.ndarray:
        if self._num_outputs is not None and int(tokens.max()) >= self._num_outputs:
            raise CorpusError(
                f"token ids must be from 0 to {self._num_outputs - 1} (the rows of the model's output head), got "
                f"{int(tokens.max())} in {record.where}; use the tokenizer that belongs to the model"
            )
        return tokens


def _asked(text: str) -> Conversation:
    """One user's turn, for the model to answer."""
    return Conversation([{"role": "user", "content": text}], None, 0, f"a user's turn {text!r:.60}")


def _records(source: str) -> Iterator[Record]:
    """Records of a local corpus or of a data set; of .txt files their lines, blank ones too."""
    files = find_files(source, None)
    if files is None:
        name = parse_hub_name(source)
        if name is None:
            raise CorpusError(
                "prompts must be an existing file or directory, a glob, or a data set name, "
                f"got {source:.200}, which does not exist"
            )
        yield from HubSource.open(name, DEFAULT_SPLIT).records()
        return
    for path in files:
        for record in read_records(path):
            if family_of(path) != "txt":
                yield record
                continue
            lines = record.values["text"].removesuffix("\n").split("\n")
            for number, line in enumerate(lines, 1):
                yield Record({LINE: line.removesuffix("\r")}, path.name, number, "line")


def _with_answer(record: Record) -> Record:
    """The record as a corpus would have it: with one answer, which is left out again, and nothing said of it."""
    compared = names("preference", "feedback", "label")
    values = {name: value for name, value in record.values.items() if name not in compared}
    if not {"input_ids", "messages", "conversations"} & set(values):
        prompt = values.get("prompt")
        if prompt is not None:
            values["completion"] = _ANSWER if is_turns(prompt) else ""
        elif values.get("instruction") is not None:
            values["output"] = "answer"
    return record._replace(values=values)
