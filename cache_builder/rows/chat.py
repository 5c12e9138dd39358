"""Chat: which characters of a rendered conversation the assistant is to produce.

Two ways, decided by the template:

* It marks the assistant's text with `{% generation %}`: the ranges that `transformers` reports are taken.
* It does not: for every assistant turn i the conversation is rendered up to the turn, with the generation
  prompt, and with the turn. What the second adds to the first is what the model writes at inference. Both
  must be beginnings of the whole rendering, so that the pieces join to exactly what is tokenised. The line
  break that templates put after the end-of-turn token is left out: no model is ever asked for it.

Some templates render a turn in full only while it is the last and shorten it later (they drop its reasoning).
Such a turn is trained as the whole conversation shows it, if that is an ending of its full form, and counted.
Any other difference is an error that names the row: its mask would be a guess. Cost: two renderings per turn.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cache_builder.corpus.examples import Conversation, Message
from cache_builder.rows.encoding import Encoded, encode_spans
from formats.errors import ConfigError, CorpusError

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
Span = tuple[int, int]


@contextlib.contextmanager
def _named_errors(conversation: Conversation) -> Iterator[None]:
    """Whatever a template raises, as an error that names the row."""
    import jinja2

    try:
        yield
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CorpusError(
            f"the chat template must accept every conversation, got {reason!r} for {conversation.where}; "
            "mend or drop the record"
        ) from error


@dataclass
class ChatEncoder:
    """Conversations to token ids and loss masks through a tokenizer's chat template.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """

    tokenizer: Any
    num_shortened_turns: int = 0
    """Assistant turns that the template showed shortened so far."""
    _special_texts: tuple[str, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "messages need a chat template, got a tokenizer without one; use a chat model's tokenizer, "
                "or bring prompt and completion strings"
            )
        added = self.tokenizer.added_tokens_decoder.values()
        self._special_texts = tuple(token.content for token in added if token.special)

    @property
    def has_markers(self) -> bool:
        """Whether the template marks the assistant's text itself."""
        template = self.tokenizer.chat_template
        templates = template.values() if isinstance(template, dict) else [template]
        return all(_GENERATION.search(text) for text in templates)

    def encode(self, conversations: list[Conversation]) -> list[Encoded]:
        """One `Encoded` per conversation, special tokens exactly where the template writes them.

        Raises:
            CorpusError: the template refuses a conversation, or its turns cannot be told apart.
        """
        texts, spans = [], []
        for conversation in conversations:
            text, ranges = self.target_spans(conversation)
            texts.append(text)
            spans.append(ranges)
        encoded = encode_spans(self.tokenizer, texts, spans, add_special_tokens=False)
        return [Encoded(ids, mask, splittable=False) for ids, mask in encoded]

    def target_spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The rendered conversation and the character ranges that the assistant is to produce."""
        if self.has_markers:
            text, spans = self._marked_spans(conversation)
            if conversation.first_target == 0:
                return text, spans
            turns = [
                index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"
            ]
            if len(turns) == len(spans):
                wanted = zip(turns, spans, strict=True)
                return text, [span for index, span in wanted if index >= conversation.first_target]
        return self.incremental_spans(conversation)

    def _marked_spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """What `apply_chat_template(return_assistant_tokens_mask=True)` does, short of the tokens."""
        from transformers.utils.chat_template_utils import render_jinja_template

        # Annotated as a string there; it returns the texts and, for each, its ranges.
        render: Any = render_jinja_template
        with _named_errors(conversation):
            rendered, spans = render(
                conversations=[conversation.messages],
                tools=conversation.tools,
                chat_template=self.tokenizer.get_chat_template(tools=conversation.tools),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        return rendered[0], [(start, end) for start, end in spans[0]]

    def incremental_spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The rendered conversation and its assistant turns, found by rendering its beginnings."""
        messages = conversation.messages
        full = self._render(messages, conversation)
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index < conversation.first_target:
                continue
            spans.append(self._turn_span(full, index, conversation))
            if len(spans) > 1 and spans[-1][0] < spans[-2][1]:
                raise self._unstable(index, conversation)
        return full, spans

    def _turn_span(self, full: str, index: int, conversation: Conversation) -> Span:
        messages = conversation.messages
        upto = self._render(messages[: index + 1], conversation)
        start = self._turn_start(full, upto, index, conversation)
        turn = upto[start:]
        if not full.startswith(turn, start):
            turn = self._shortened(full, start, turn, messages[index]["content"])
            if not turn:
                raise self._unstable(index, conversation)
            self.num_shortened_turns += 1
        return start, start + len(self._without_trailing_space(turn))

    def _turn_start(self, full: str, upto: str, index: int, conversation: Conversation) -> int:
        """Where the model takes over: after the generation prompt, as far as the turn goes along with it."""
        if index == 0:  # nothing to render before it; the content is the last thing in the rendering
            content = conversation.messages[0]["content"].strip()
            if not content or content not in upto:
                raise self._unstable(index, conversation)
            return upto.rindex(content)
        before = self._render(conversation.messages[:index], conversation)
        prompted = self._render(conversation.messages[:index], conversation, add_generation_prompt=True)
        if not all(text.startswith(before) for text in (full, upto, prompted)):
            raise self._unstable(index, conversation)
        if full.startswith(prompted) and upto.startswith(prompted):
            return len(prompted)
        # The prompt promises what the turn does not keep, such as an opened <think>: the part both share is
        # the turn's header, up to its last special token or line break, lest it run into the answer.
        pairs = zip(full, upto, prompted, strict=False)
        length = next((at for at, letters in enumerate(pairs) if len(set(letters)) > 1), None)
        shared = min(full, upto, prompted, key=len)[:length]
        ends = [shared.rfind(token) + len(token) for token in self._special_texts if token in shared]
        return max(len(before), shared.rfind("\n") + 1, *ends)

    def _shortened(self, full: str, start: int, turn: str, content: str) -> str:
        """The longest ending of `turn` that `full` continues with, if it still holds the answer."""
        lines = content.strip().splitlines()
        last_line = lines[-1].strip() if lines else ""
        for cut in range(1, len(turn)):
            if full.startswith(turn[cut:], start):
                return turn[cut:] if last_line and last_line in turn[cut:] else ""
        return ""

    def _without_trailing_space(self, turn: str) -> str:
        stripped = turn.rstrip()
        return stripped if stripped.endswith(self._special_texts) else turn

    def _render(self, messages: list[Message], conversation: Conversation, **options: Any) -> str:
        with _named_errors(conversation):
            rendered = self.tokenizer.apply_chat_template(
                messages, tools=conversation.tools, tokenize=False, **options
            )
        assert isinstance(rendered, str)
        return rendered

    def _unstable(self, index: int, conversation: Conversation) -> CorpusError:
        return CorpusError(
            "the chat template must render the beginning of a conversation as within the whole, "
            f"got another text for message {index + 1} of {conversation.where}; use a template with "
            "{% generation %} markers, or bring input_ids with a loss_mask"
        )
