"""One record of any layout to one of four kinds of training example; every field is checked here.

A layout and a tokenizer decide the kind for a whole corpus: Alpaca is a conversation where the tokenizer has
a chat template, else prompt + completion.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cache_builder.corpus.field import CHAT, is_given
from cache_builder.corpus.fields import names, refuse_columns
from cache_builder.corpus.json_text import parse_json
from cache_builder.corpus.layouts import Layout
from cache_builder.corpus.messages import Message, Turns, from_sharegpt, read_turns
from cache_builder.corpus.readers import Record
from cache_builder.corpus.ready_tokens import Tokens, tokens_of
from cache_builder.corpus.tool_calls import json_value, tools_of
from cache_builder.corpus.values import kind_of, optional_string, sequence_of, string_of
from formats.errors import CorpusError

RESERVED_ARGUMENTS = frozenset(
    {"messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message"}
    | {"tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"}
    | {"return_assistant_tokens_mask", "strftime_now"}
)
"""Arguments of `apply_chat_template` that are not the data's to choose."""


SWITCHES = frozenset({"enable_thinking", "preserve_thinking"})
"""Variables of templates that are true or false."""


@dataclass(frozen=True, slots=True)
class Text:
    """A document; every token but the first is a target."""

    text: str
    where: str


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """Two strings that are joined as they are; the completion is the target."""

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for the chat template, and what else it gets."""

    messages: list[Message]
    tools: list[Any] | None
    first_target: int
    """The assistant's turns before it are part of the prompt."""
    where: str
    without_loss: frozenset[int] = frozenset()
    """Turns that a field of the data excepts from the loss."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template."""
    template: str | None = None
    """The template that the record asks for."""

    def answers(self) -> list[int]:
        """The assistant's turns that are not part of the prompt."""
        return [
            index
            for index, message in enumerate(self.messages)
            if message["role"] == "assistant" and index >= self.first_target
        ]

    def targets(self) -> list[int]:
        """Those that carry loss: no field excepts them, and they hold something to learn."""
        return [
            index
            for index in self.answers()
            if index not in self.without_loss and not is_empty_turn(self.messages[index])
        ]


Example = Text | PromptCompletion | Conversation | Tokens


def is_empty_turn(message: Message) -> bool:
    """Whether a turn has nothing but its end: training it would teach to end at once."""
    return not message["content"].strip() and not any(
        is_given(message.get(name)) for name in names("turn calls", "turn content")
    )


def convert(record: Record, layout: Layout, *, has_chat_template: bool, vocab_size: int) -> Example:
    """The training example in `record`.

    Raises:
        CorpusError: a column is missing, null or of the wrong type, or asks for something that is not done here;
            the message names the row.
    """
    is_chat = layout.kind == CHAT or (layout.name == "Alpaca" and has_chat_template)
    read = (*layout.required, *layout.optional)
    if layout.name == "Alpaca" and not is_chat:
        read = (*layout.required, "input", *names("system"))
    if not layout.is_chosen:
        refuse_columns(record.values, CHAT if is_chat else layout.kind, read, record.where)
    match layout.name:
        case "text":
            return Text(string_of(record, layout.required[0]), record.where)
        case "prompt + completion":
            return PromptCompletion(
                string_of(record, "prompt"), string_of(record, "completion"), record.where
            )
        case "input_ids":
            return tokens_of(record, vocab_size)
        case "Alpaca" if not is_chat:
            return _headed_text(record)
        case _:
            return _conversation(record, layout)


def _conversation(record: Record, layout: Layout) -> Conversation:
    prompt, turns = Turns(), Turns()
    if layout.name == "Alpaca":
        turns = read_turns(_alpaca_turns(record), record, "history")
    elif layout.name == "prompt + completion (chat)":
        prompt = read_turns(sequence_of(record, "prompt"), record, "prompt", are_context=True)
        turns = read_turns(sequence_of(record, "completion"), record, "completion")
    else:
        column = layout.required[0]
        found = sequence_of(record, column)
        if layout.name == "ShareGPT":
            found = [from_sharegpt(turn, record.where) for turn in found]
        turns = read_turns(found, record, column)
    system = _system(record, [*prompt, *turns])
    messages = [*system, *prompt, *turns]
    offset = len(messages) - len(turns)
    return Conversation(
        messages,
        _tools(record),
        len(system) + len(prompt),
        record.where,
        frozenset(index + offset for index in turns.without_loss),
        _arguments(record),
        record.values.get("chat_template") or None,
    )


def _system(record: Record, turns: list[Message]) -> list[Message]:
    """The system prompt in a column of its own as a message, unless the conversation opens with the same."""
    given = {text for column in names("system") if (text := optional_string(record, column))}
    if len(given) > 1:
        raise CorpusError(f"a conversation has one system prompt, got two in {record.where}; drop a column")
    if not given:
        return []
    text = given.pop()
    if turns[0]["role"] == "system":
        if turns[0]["content"] != text:
            raise CorpusError(
                f"a conversation has one system prompt, got one in a column and another as message 1 of "
                f"{record.where}; drop one"
            )
        return []
    return [{"role": "system", "content": text}]


def _tools(record: Record) -> list[Any] | None:
    found = [tools for column in names("tools") if (tools := tools_of(record, column, record.where))]
    if len(found) > 1:
        raise CorpusError(f"tools stand in one column, got {' and '.join(names('tools'))} in {record.where}")
    return found[0] if found else None


def _arguments(record: Record) -> dict[str, Any]:
    """Variables of the template that this record sets."""
    arguments: dict[str, Any] = {}
    for column in names("template arguments"):
        value = record.values.get(column)
        if isinstance(value, str) and value:
            try:
                value = parse_json(value, record.where)
            except json.JSONDecodeError:
                value = None
        if is_given(record.values.get(column)):
            if not isinstance(value, Mapping):
                raise CorpusError(f"{column} must be an object, got {kind_of(value)} in {record.where}")
            arguments |= json_value(value, column, record.where)
    for column in names("one template argument"):
        if is_given(record.values.get(column)):
            value = _one_argument(record, column)
            if column in arguments and arguments[column] != value:
                raise CorpusError(f"{column} must be given once, got two values in {record.where}")
            arguments[column] = json_value(value, column, record.where)
    for name in arguments:
        if name in RESERVED_ARGUMENTS:
            raise CorpusError(
                f"chat_template_kwargs cannot set {name}, got it in {record.where}; take it out"
            )
    return arguments


def _one_argument(record: Record, column: str) -> Any:
    """The value of a template's variable in a column of its own. A CSV file has text for every type, and to a template
    the text `false` is true.
    """
    value = record.values[column]
    if column == "documents":
        return sequence_of(record, column)
    if column not in SWITCHES:
        return value
    said = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if (text := str(value).strip().lower()) not in said:
        raise CorpusError(f"{column} must be true or false, got {value!r:.40} in {record.where}")
    return said[text]


def _question(record: Record) -> tuple[str, str, str]:
    return string_of(record, "instruction"), optional_string(record, "input"), string_of(record, "output")


def _alpaca_turns(record: Record) -> list[Message]:
    turns: list[Message] = []
    if is_given(record.values.get("history")):
        for pair in sequence_of(record, "history"):
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise CorpusError(
                    f"history must be a list of [question, answer], got another in {record.where}"
                )
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    instruction, given, output = _question(record)
    question = "\n\n".join(part for part in (instruction, given) if part)
    return [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": output}]


def _headed_text(record: Record) -> PromptCompletion:
    instruction, given, output = _question(record)
    system = _system(record, [{"role": "user"}])
    prompt = f"{system[0]['content']}\n\n" if system else ""
    prompt += f"### Instruction:\n{instruction}\n\n"
    prompt += f"### Input:\n{given}\n\n" if given else ""
    return PromptCompletion(f"{prompt}### Response:\n", output, record.where)
