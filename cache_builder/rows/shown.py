"""Does the chat template show everything that a conversation holds? What it drops would silently not be trained.

A template that knows no tool calls renders such a turn as nothing but its end-of-turn token; one that knows no
reasoning drops it, or cuts it off the content; one that knows no `developer` drops the message. Asked of the template
itself: a field is not shown if taking it out changes neither the conversation up to its message nor the whole.
(Templates that drop the reasoning of *earlier* turns do show it while the turn is the last; such turns are counted
elsewhere.)
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from cache_builder.corpus.examples import Conversation
from cache_builder.corpus.field import is_given
from cache_builder.corpus.fields import names
from cache_builder.corpus.messages import Message
from cache_builder.rows.template import ChatTemplate
from formats.errors import CorpusError

Edit = Callable[[Message], Message]
_OPENING_TAG = re.compile(r"[<\[][^<>\[\]\s]+[>\]]\s*")
_OTHER_TEMPLATE = "use a template that shows it, or drop the record"


def require_shown(template: ChatTemplate, conversation: Conversation, full: str) -> None:
    """Refuse a conversation of which the template drops a part.

    Args:
        full: the conversation as the template renders it.

    Raises:
        CorpusError: names the part and the record.
    """
    where = conversation.where
    if conversation.tools and _render(template, replace(conversation, tools=None)) == full:
        raise CorpusError(
            f"a chat template must show the tools, got one that does not, for {where}; {_OTHER_TEMPLATE}"
        )
    doubtful = _doubtful_contents(template, conversation, full)
    for index, message in enumerate(conversation.messages):
        for field, edit in _parts(message, doubtful):
            if not _changes(template, conversation, index, edit, full):
                raise CorpusError(
                    f"a chat template must show all of a conversation, got one that does not show {field} of "
                    f"message {index + 1} (role {message['role']}) of {where}; {_OTHER_TEMPLATE}"
                )


def unread_fields(template: ChatTemplate, conversation: Conversation, full: str) -> Counter[str]:
    """Messages by a field of theirs that does not show: the template does not name it, or the name of a tool that
    answers is not in the rendering `full`."""
    found = Counter(name for message in conversation.messages for name in message)
    checked = {"role", "content", *names("turn content", "turn calls", "turn name")}
    unread = Counter({name: found[name] for name in found.keys() - template.words - checked})
    for message in conversation.messages:
        name = message.get("name")
        if message["role"] == "tool" and is_given(name) and str(name) not in full:
            unread["name"] += 1
    return unread


def _doubtful_contents(template: ChatTemplate, conversation: Conversation, full: str) -> set[str]:
    """Contents that the rendering need not show for each message that has them: those that are not in it (written in
    another way, shortened, or dropped), are in it less often than the messages have them, or could be there as a part
    of something else.
    """
    contents = [message["content"].strip() for message in conversation.messages]
    fields = [
        str(value)
        for message in conversation.messages
        for name, value in message.items()
        if name != "content"
    ]
    apart = "\0"  # so that no content is found across two
    all_contents = apart.join(contents)
    others = apart.join([*template.texts, str(conversation.tools or ""), *fields])
    return {
        content
        for content in set(contents) - {""}
        if full.count(content) < all_contents.count(content) or content in others
    }


def _parts(message: Message, doubtful: set[str]) -> list[tuple[str, Edit]]:
    """What must show of a message, and how to take it out."""
    parts: list[tuple[str, Edit]] = []
    for name in names("turn content"):
        if is_given(message.get(name)):
            parts.append((name, _without(name)))
    if len(message.get("tool_calls", ())) > 1:
        parts.append(("the last of tool_calls", lambda m: {**m, "tool_calls": m["tool_calls"][:-1]}))
    elif message.get("tool_calls"):
        parts.append(("tool_calls", _without("tool_calls")))
    if is_given(message.get("name")) and message["role"] != "tool":
        parts.append(("name", _without("name")))
    if message["content"].strip() in doubtful:
        parts.append(("the content", lambda m: {**m, "content": m["content"].rstrip() + "x"}))
        parts.append(("the beginning of the content", _begun_otherwise))
    return parts


def _begun_otherwise(message: Message) -> Message:
    """Another letter at the beginning, but within a thought that it begins with: templates look for its tags."""
    content = message["content"].lstrip()
    tag = _OPENING_TAG.match(content)
    start = tag.end() if tag is not None else 0
    return {**message, "content": content[:start] + "x" + content[start:]}


def _without(name: str) -> Edit:
    return lambda message: {key: value for key, value in message.items() if key != name}


def _changes(template: ChatTemplate, conversation: Conversation, index: int, edit: Edit, full: str) -> bool:
    messages = conversation.messages
    edited = [*messages[:index], edit(messages[index]), *messages[index + 1 :]]
    if _render(template, replace(conversation, messages=edited)) != full:
        return True
    before = _render(template, replace(conversation, messages=messages[: index + 1]))
    return before is not None and before != _render(
        template, replace(conversation, messages=edited[: index + 1])
    )


def _render(template: ChatTemplate, conversation: Conversation) -> str | None:
    """None where the template refuses."""
    try:
        return template.render(conversation)
    except CorpusError:
        return None
