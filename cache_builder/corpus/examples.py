"""One record of any layout to one of four kinds of training example; every field is checked here.

A layout and a tokenizer decide the kind for a whole corpus: Alpaca is a conversation where the tokenizer has
a chat template, else prompt + completion.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache_builder.corpus.layouts import Layout
from cache_builder.corpus.readers import Record
from formats.errors import CorpusError

ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Text:
    """A document; every token but the first is a target."""

    text: str


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """Two strings that are joined as they are; the completion is the target."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for the chat template; the assistant turns from `first_target` on are the targets."""

    messages: list[Message]
    tools: list[Any] | None
    first_target: int
    where: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """Ready token ids; `loss_mask` None makes every token but the first a target."""

    input_ids: np.ndarray
    loss_mask: np.ndarray | None


Example = Text | PromptCompletion | Conversation | Tokens


def convert(record: Record, layout: Layout, *, has_chat_template: bool, vocab_size: int) -> Example:
    """The training example in `record`.

    Raises:
        CorpusError: a column is missing, null or of the wrong type; the message names the row.
    """
    match layout.name:
        case "text":
            return Text(_string(record, layout.required[0]))
        case "prompt + completion":
            return PromptCompletion(_string(record, "prompt"), _string(record, "completion"))
        case "prompt + completion (chat)":
            prompt = _messages(_sequence(record, "prompt"), record, "prompt")
            completion = _messages(_sequence(record, "completion"), record, "completion")
            return Conversation(prompt + completion, _tools(record), len(prompt), record.where)
        case "messages":
            column = layout.required[0]
            return Conversation(
                _messages(_sequence(record, column), record, column), _tools(record), 0, record.where
            )
        case "ShareGPT":
            turns = [_from_sharegpt(turn, record) for turn in _sequence(record, "conversations")]
            messages = _system(record) + _messages(turns, record, "conversations")
            return Conversation(messages, _tools(record), 0, record.where)
        case "Alpaca":
            return _alpaca(record, has_chat_template)
        case "input_ids":
            return _tokens(record, vocab_size)
        case _:
            raise AssertionError(layout.name)


def _value(record: Record, column: str) -> Any:
    if column not in record.values:
        found = ", ".join(record.values) or "none"
        raise CorpusError(f"every record must have the column {column!r}, got only {found} in {record.where}")
    return record.values[column]


def _string(record: Record, column: str) -> str:
    value = _value(record, column)
    if not isinstance(value, str):
        raise CorpusError(
            f"{column} must be a string, got {_kind(value)} in {record.where}; mend or drop the record"
        )
    return _unicode(value, column, record.where)


def _unicode(text: str, column: str, where: str) -> str:
    """`text` itself, unless it holds half a surrogate pair: JSON can express it, no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{column} must be valid Unicode, got an unpaired surrogate at character {error.start + 1} of "
            f"{where}; mend or drop the record"
        ) from None
    return text


def _optional_string(record: Record, column: str) -> str:
    """The string in an optional column; a missing or null one is empty."""
    return "" if record.values.get(column) is None else _string(record, column)


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _sequence(record: Record, column: str) -> list[Any]:
    """A list, or the JSON text of one, as CSV files hold it."""
    value = _value(record, column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise CorpusError(
                f"{column} must be a list, got the string {value!r:.40} in {record.where}"
            ) from None
    if isinstance(value, np.ndarray):
        return list(value)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise CorpusError(
            f"{column} must be a list, got {_kind(value)} in {record.where}; mend or drop the record"
        )
    return list(value)


def _tools(record: Record) -> list[Any] | None:
    """Tool descriptions for the chat template; column files (Parquet, CSV) hold them as JSON text."""
    if record.values.get("tools") in (None, "", []):
        return None
    tools = _sequence(record, "tools")
    if all(isinstance(tool, str) for tool in tools):
        with contextlib.suppress(ValueError):
            tools = [json.loads(tool) for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise CorpusError(f"tools must be a list of JSON schemas, got another list in {record.where}")
    return tools or None


def _system(record: Record) -> list[Message]:
    text = _optional_string(record, "system")
    return [{"role": "system", "content": text}] if text else []


def _messages(turns: list[Any], record: Record, column: str) -> list[Message]:
    """Checked messages. Null fields, which column files put into every message, are taken out."""
    if not turns:
        raise CorpusError(
            f"{column} must hold at least one message, got none in {record.where}; drop the record"
        )
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        where = f"message {number} of {record.where}"
        if not isinstance(turn, Mapping):
            raise CorpusError(
                f"a message must be an object with role and content, got {_kind(turn)} in {where}"
            )
        message = {key: value for key, value in turn.items() if value is not None}
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise CorpusError(
                f"role must be a string such as user or assistant, got {_kind(role)} in {where}"
            )
        if content is None and message.get("tool_calls"):
            content = ""
        elif isinstance(content, list):
            content = _join_parts(content, where)
        if not isinstance(content, str):
            raise CorpusError(
                f"content must be a string, got {_kind(content)} in {where}; mend or drop the record"
            )
        messages.append({**message, "content": _unicode(content, "content", where)})
    return messages


def _join_parts(parts: list[Any], where: str) -> str:
    """The text of a content given in parts; anything but text is refused, never dropped."""
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type", "part") if isinstance(part, Mapping) else _kind(part)
            raise CorpusError(f"content must be text, got a part of type {kind} in {where}; drop the record")
    return "".join(part["text"] for part in parts)


def _from_sharegpt(turn: Any, record: Record) -> Message:
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        raise CorpusError(
            f"a ShareGPT turn must be an object with from and value, got {turn!r:.80} in {record.where}"
        )
    speaker = turn["from"]
    if speaker not in ROLES:
        raise CorpusError(f"from must be one of {', '.join(ROLES)}, got {speaker!r} in {record.where}")
    return {"role": ROLES[speaker], "content": turn["value"]}


def _alpaca(record: Record, has_chat_template: bool) -> Example:
    instruction, output = _string(record, "instruction"), _string(record, "output")
    given = _optional_string(record, "input")
    if has_chat_template:
        question = f"{instruction}\n\n{given}" if given else instruction
        messages = [
            *_system(record),
            {"role": "user", "content": question},
            {"role": "assistant", "content": output},
        ]
        return Conversation(messages, None, len(messages) - 1, record.where)
    system = _optional_string(record, "system")
    prompt = f"{system}\n\n" if system else ""
    prompt += f"### Instruction:\n{instruction}\n\n"
    prompt += f"### Input:\n{given}\n\n" if given else ""
    return PromptCompletion(f"{prompt}### Response:\n", output)


def _integers(record: Record, column: str) -> np.ndarray:
    values = _sequence(record, column)
    try:
        array = np.array(values) if values else np.zeros(0, dtype=np.int64)
    except ValueError:  # lists of several lengths
        array = np.array(None)
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise CorpusError(f"{column} must be a list of integers, got other values in {record.where}")
    return array.astype(np.int64)


def _tokens(record: Record, vocab_size: int) -> Tokens:
    """Ready ids, padding taken out. Labels stand at the token they name (unshifted), as in `transformers`."""
    ids = _integers(record, "input_ids")
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        raise CorpusError(
            f"input_ids must lie in 0..{vocab_size - 1} (the tokenizer's vocabulary), got {ids.min()} to "
            f"{ids.max()} in {record.where}; tokenise the corpus with this model's tokenizer"
        )
    columns = {
        name: _integers(record, name)
        for name in ("labels", "loss_mask", "attention_mask")
        if record.values.get(name) is not None
    }
    for name, values in columns.items():
        if len(values) != len(ids):
            raise CorpusError(
                f"{name} must be as long as input_ids ({len(ids)}), got {len(values)} in {record.where}"
            )
        if name != "labels" and not np.isin(values, (0, 1)).all():
            raise CorpusError(f"{name} must hold zeros and ones, got other values in {record.where}")
    mask: np.ndarray | None = None
    if "labels" in columns:
        mask = columns["labels"] != -100
        if (columns["labels"][mask] != ids[mask]).any():
            raise CorpusError(
                f"labels must equal input_ids or be -100 (they are not shifted), got others in {record.where}"
            )
    if "loss_mask" in columns:
        mask = (columns["loss_mask"] == 1) & (True if mask is None else mask)
    if "attention_mask" in columns:
        attended = columns["attention_mask"] == 1
        used = np.flatnonzero(attended)
        if len(used) and not attended[used[0] : used[-1] + 1].all():
            raise CorpusError(f"attention_mask must be one run of ones, got gaps in {record.where}")
        ids, mask = ids[attended], None if mask is None else mask[attended]
    return Tokens(ids, mask)
