"""Turns of a conversation, checked: what the template gets, and which turns carry loss.

Fields that say whether a turn is trained (`weight`, `train`, `loss`, ...) are taken out and obeyed; tool calls are
brought into one form; null fields are left out. Everything else goes to the template as it is.
"""

import json
from collections.abc import Mapping
from typing import Any

from cache_builder.corpus.field import PART, TURN, is_given
from cache_builder.corpus.fields import names, refuse_fields
from cache_builder.corpus.json_text import parse_json
from cache_builder.corpus.readers import Record
from cache_builder.corpus.tool_calls import function_call, tool_calls, tool_schema
from cache_builder.corpus.values import kind_of, unicode_text
from formats.errors import CorpusError

Message = dict[str, Any]
SPEAKERS = {
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
"""ShareGPT's `from` as a role."""
NO_ROLES = frozenset(
    {"human", "prompter", "gpt", "chatgpt", "chatbot", "model", "bot", "ai"}
    | {"function_call", "tool_call", "tool_response"}
)
"""What other formats call the user, the assistant and a tool: as a `role` it would be no one's turn."""
USUAL_ROLES = frozenset({"user", "assistant", "system", "tool", "developer"})
"""Written in another way (`Assistant`), it would be no one's turn either."""


class Turns(list[Message]):
    """Messages, and the indices of the assistant's turns that a field excepts from the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.without_loss: set[int] = set()


def read_turns(turns: list[Any], record: Record, column: str, *, are_context: bool = False) -> Turns:
    """Checked messages.

    Args:
        are_context: no turn of them is to be trained.

    Raises:
        CorpusError: no messages, a malformed one, or one that asks for something that is not done here.
    """
    if not turns:
        raise CorpusError(
            f"{column} must hold at least one message, got none in {record.where}; drop the record"
        )
    messages = Turns()
    for number, turn in enumerate(turns, 1):
        where = f"message {number} of {record.where}"
        if isinstance(turn, str) and turn.lstrip().startswith("{"):
            turn = _parsed_turn(turn, where)
        if not isinstance(turn, Mapping):
            raise CorpusError(
                f"a message must be an object with role and content, got {kind_of(turn)} in {where}"
            )
        message = _message({key: value for key, value in turn.items() if value is not None}, where)
        if not _take_loss(message, where, is_context=are_context):
            messages.without_loss.add(len(messages))
        messages.append(message)
    return messages


def _parsed_turn(text: str, where: str) -> Any:
    try:
        return parse_json(text, where)
    except json.JSONDecodeError:
        raise CorpusError(
            f"a message must be an object with role and content, got a string in {where}"
        ) from None


def _message(message: Message, where: str) -> Message:
    refuse_fields(message, TURN, where)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise CorpusError(f"role must be a string such as user or assistant, got {kind_of(role)} in {where}")
    usual = role.strip().lower()
    if usual in NO_ROLES or (usual in USUAL_ROLES and usual != role):
        raise CorpusError(
            f"role must be user, assistant, system, tool or another one of the template's, got {role!r} in {where}; "
            "rename it"
        )
    if role == "function":  # OpenAI's older name
        message["role"] = "tool"
    call, calls = message.pop("function_call", None), message.pop("tool_calls", None)
    if is_given(call) and is_given(calls):
        raise CorpusError(
            f"the calls of a turn stand in one field, got function_call and tool_calls in {where}; drop one"
        )
    if is_given(call):
        message["tool_calls"] = function_call(call, where)
    if is_given(calls):
        message["tool_calls"] = tool_calls(calls, where)
    if isinstance(tools := message.get("tools"), list):
        message["tools"] = [tool_schema(tool, "tools", where) for tool in tools]
    content = message.get("content")
    if content is None and any(is_given(message.get(name)) for name in names("turn calls", "turn content")):
        content = ""
    elif isinstance(content, list):
        parts, content = content, _joined(content, where)
        # By a name that no template reads, so that it is counted as a turn's own unread fields are.
        for name, value in ((name, value) for part in parts for name, value in part.items()):
            if name not in ("type", *names("part text")) and is_given(value):
                message[f"content.{name}"] = value
    if not isinstance(content, str):
        raise CorpusError(
            f"content must be a string, got {kind_of(content)} in {where}; mend or drop the record"
        )
    message["content"] = unicode_text(content, "content", where)
    for name in names("part thought"):  # called the same in a turn
        if name in message:
            if not isinstance(message[name], str):
                raise CorpusError(
                    f"{name} must be a string, got {kind_of(message[name])} in {where}; join its parts"
                )
            unicode_text(message[name], name, where)
    return message


def _joined(parts: list[Any], where: str) -> str:
    """The text of a content given in parts; anything but text is refused, never dropped."""
    for part in parts:
        is_text = isinstance(part, Mapping) and isinstance(part.get("text"), str)
        if not is_text or part.get("type") not in (None, "text", "input_text", "output_text"):
            kind = part.get("type", "part") if isinstance(part, Mapping) else kind_of(part)
            raise CorpusError(f"content must be text, got a part of type {kind} in {where}; drop the record")
        refuse_fields({key: value for key, value in part.items() if value is not None}, PART, where)
    return "".join(part["text"] for part in parts)


def _take_loss(message: Message, where: str, *, is_context: bool) -> bool:
    """Take out the fields that say whether the turn is trained; False if one says that it is not.

    Raises:
        CorpusError: something between yes and no, a contradiction, or loss where there is none.
    """
    said: dict[str, bool] = {}
    for name in names("turn loss", "turn masked"):
        if name not in message:
            continue
        value = message.pop(name)
        if value != value:  # what pandas makes of a missing number
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise CorpusError(
                f"{name} of a turn must be true, false, 1 or 0, got {value!r:.40} in {where}; a turn is trained or it "
                "is not"
            )
        said[name] = bool(value) != (name in names("turn masked"))
    if len(set(said.values())) > 1:
        raise CorpusError(f"a turn is trained or it is not, got both from {' and '.join(said)} in {where}")
    if any(said.values()) and (is_context or message["role"] != "assistant"):
        what = "the prompt" if is_context else f"role {message['role']}"
        raise CorpusError(
            f"only the assistant's turns of an answer are trained, got {next(iter(said))} for {what} in {where}; "
            "drop the field, or bring input_ids with a loss_mask"
        )
    return not said or any(said.values())


def from_sharegpt(turn: Any, where: str) -> Message:
    """A turn with `from` and `value` as a message; its other fields stay.

    Raises:
        CorpusError: no such turn, or an unknown speaker.
    """
    if isinstance(turn, str) and turn.lstrip().startswith("{"):
        turn = _parsed_turn(turn, where)
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        raise CorpusError(
            f"a ShareGPT turn must be an object with from and value, got {turn!r:.80} in {where}"
        )
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise CorpusError(f"from must be one of {', '.join(SPEAKERS)}, got {speaker!r} in {where}")
    for name, other, taken in (("from", "role", SPEAKERS[speaker]), ("value", "content", turn["value"])):
        if is_given(turn.get(other)) and turn[other] not in (turn[name], taken):
            raise CorpusError(
                f"a ShareGPT turn has one speaker and one text, got {name} and another {other} in {where}; drop one"
            )
    message = {key: value for key, value in turn.items() if key not in ("from", "value")}
    message |= {"role": SPEAKERS[speaker], "content": turn["value"]}
    if speaker == "function_call":
        message |= {"content": None, "function_call": turn["value"]}
    return message
