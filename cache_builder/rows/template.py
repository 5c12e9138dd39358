"""A tokenizer's chat template: one conversation, or the beginning of one, to text.

What could make two renderings of the same conversation differ is held fast here: the time that `strftime_now` tells
is one instant for a whole build, and arguments of tool calls are given in the form that the template is written for.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import Any

from cache_builder.corpus.examples import Conversation
from cache_builder.corpus.messages import Message
from formats.errors import ConfigError, CorpusError, one_line

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
Span = tuple[int, int]


def template_texts(tokenizer: Any) -> list[str]:
    """The template, or several named ones (`default`, `tool_use`); empty without one."""
    template = tokenizer.chat_template
    if not template:
        return []
    return list(template.values()) if isinstance(template, Mapping) else [template]


def tells_the_time(tokenizer: Any) -> bool:
    """Whether renderings of the template depend on the time."""
    return any("strftime_now" in text for text in template_texts(tokenizer))


class ChatTemplate:
    """Renders conversations.

    Args:
        tokenizer: with a chat template.
        arguments: further variables of the template, the same for every conversation.
        instant: what `strftime_now` tells; None asks the clock once.

    Raises:
        ConfigError: the tokenizer has no chat template, or does not read one of `arguments`.
    """

    def __init__(
        self, tokenizer: Any, arguments: Mapping[str, Any] | None = None, instant: datetime | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.texts = template_texts(tokenizer)
        self._arguments = dict(arguments or {})
        self._instant = instant or datetime.now()
        if not self.texts:
            raise ConfigError(
                "messages need a chat template, got a tokenizer without one; use a chat model's tokenizer, "
                "or bring prompt and completion strings"
            )
        if unknown := sorted(set(self._arguments) - self.variables):
            raise ConfigError(
                f"a template argument must be one that the template reads, got {unknown[0]}; leave it out"
            )

    @property
    def has_markers(self) -> bool:
        """Whether the template marks the assistant's text itself."""
        return all(GENERATION.search(text) for text in self.texts)

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that the template reads from outside, `messages` among them."""
        import jinja2.meta
        from transformers.utils.chat_template_utils import _compile_jinja_template

        found: set[str] = set()
        for text in self.texts:
            environment = _compile_jinja_template(text).environment
            found |= jinja2.meta.find_undeclared_variables(environment.parse(text))
        return frozenset(found)

    @cached_property
    def words(self) -> frozenset[str]:
        """Every name in the template's text: a field that is not among them cannot be read."""
        return frozenset(word for text in self.texts for word in re.findall(r"[A-Za-z_]\w*", text))

    def prepared(self, conversation: Conversation) -> Conversation:
        """The conversation with tool arguments as the template wants them, once it is known to accept the rest.

        Raises:
            CorpusError: the record asks for another template, or for an argument that this one does not read.
        """
        where = conversation.where
        if conversation.template is not None and conversation.template not in self.texts:
            raise CorpusError(
                f"one cache has one chat template, got a column chat_template with another in {where}; put it into "
                "the model directory and drop the column"
            )
        for name in conversation.arguments:
            if name not in self.variables:
                raise CorpusError(
                    f"a template argument must be one that the template reads, got {name} in {where}; drop it, or "
                    "use a template that reads it"
                )
        calls = [call for message in conversation.messages for call in message.get("tool_calls", ())]
        if not any("arguments" in call.get("function", call) for call in calls):
            return conversation
        as_text = replace(conversation, messages=[_with_arguments(m, None) for m in conversation.messages])
        try:
            rendered = self.render(conversation)
        except CorpusError:
            with contextlib.suppress(CorpusError):
                self.render(as_text)
                return as_text
            raise
        # An object printed without `tojson` comes out in Python's way: the template is written for text.
        objects = [arguments for call in calls if (arguments := call.get("function", call).get("arguments"))]
        if any(str(arguments) in rendered for arguments in objects) and self._prints_objects(
            conversation, rendered
        ):
            return as_text
        return conversation

    def _prints_objects(self, conversation: Conversation, rendered: str) -> bool:
        """Whether the template itself writes arguments in Python's way: a message may quote them like that as well, so
        it is asked with arguments that stand in no message."""
        key = next(f"anneal_{n}" for n in itertools.count() if f"anneal_{n}" not in rendered)
        messages = [_with_arguments(message, {key: "value"}) for message in conversation.messages]
        try:
            return str({key: "value"}) in self.render(replace(conversation, messages=messages))
        except CorpusError:  # the template wants these arguments and no others
            return True

    def render(
        self,
        conversation: Conversation,
        messages: list[Message] | None = None,
        *,
        generation_prompt: bool = False,
    ) -> str:
        """The conversation, or its beginning `messages`, as text.

        Raises:
            CorpusError: the template refuses it; says of a beginning how far it goes.
        """
        shown = conversation.messages if messages is None else messages
        with self._named_errors(conversation, len(shown)):
            rendered = self.tokenizer.apply_chat_template(
                shown,
                tools=conversation.tools,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self._variables_of(conversation),
            )
        assert isinstance(rendered, str)
        return rendered

    def marked_spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """What `apply_chat_template(return_assistant_tokens_mask=True)` does, short of the tokens."""
        from transformers.utils.chat_template_utils import render_jinja_template

        # Annotated as a string there; it returns the texts and, for each, its ranges.
        render: Any = render_jinja_template
        with self._named_errors(conversation, len(conversation.messages)):
            rendered, spans = render(
                conversations=[conversation.messages],
                tools=conversation.tools,
                chat_template=self.tokenizer.get_chat_template(tools=conversation.tools),
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self._variables_of(conversation)},
            )
        return rendered[0], [(start, end) for start, end in spans[0]]

    def _variables_of(self, conversation: Conversation) -> dict[str, Any]:
        """Variables go before the globals of the environment, so this time replaces the running one."""
        return {
            **self._arguments,
            **conversation.arguments,
            "strftime_now": self._instant.strftime,
        }

    @contextlib.contextmanager
    def _named_errors(self, conversation: Conversation, num_messages: int) -> Iterator[None]:
        """Whatever a template raises, as an error that names the row, and of a beginning how long it is."""
        import jinja2

        try:
            yield
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            reason = one_line(error, 200, whole=True)
            if num_messages < len(conversation.messages):
                part = "message 1" if num_messages == 1 else f"messages 1 to {num_messages}"
                raise CorpusError(
                    "to find the assistant's turns, a chat template without markers must also accept the beginning of "
                    f"a conversation, got {reason!r} for {part} of {conversation.where}, although it accepts the "
                    "whole; use a template with {% generation %} markers, or bring input_ids with a loss_mask"
                ) from error
            raise CorpusError(
                f"the chat template must accept every conversation, got {reason!r} for {conversation.where}; "
                "mend or drop the record"
            ) from error


def _with_arguments(message: Message, arguments: dict[str, Any] | None) -> Message:
    """The message with other arguments in its calls; None for its own as JSON text."""
    if not message.get("tool_calls"):
        return message
    calls = deepcopy(message["tool_calls"])
    for call in calls:
        function = call.get("function", call)
        if isinstance(function.get("arguments"), dict):
            own = json.dumps(function["arguments"], ensure_ascii=False)
            function["arguments"] = own if arguments is None else arguments
    return {**message, "tool_calls": calls}
