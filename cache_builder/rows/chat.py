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

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from cache_builder.corpus.examples import Conversation
from cache_builder.corpus.values import unicode_text
from cache_builder.rows.encoding import Encoded, encode_spans
from cache_builder.rows.shown import require_shown, unread_fields
from cache_builder.rows.template import ChatTemplate, Span
from formats.errors import CorpusError


class ChatEncoder:
    """Conversations to token ids and loss masks through a tokenizer's chat template.

    Args:
        arguments: variables of the template, for every conversation.
        instant: what the template's `strftime_now` tells; None asks the clock once.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """

    def __init__(
        self, tokenizer: Any, arguments: Mapping[str, Any] | None = None, instant: datetime | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, arguments, instant)
        self.num_shortened_turns = 0
        """Assistant turns that the template showed shortened so far."""
        self.num_empty_turns = 0
        """Assistant turns of nothing but white space, beside others that are trained."""
        self.num_turns_without_loss = 0
        """Assistant turns that the data excepts from the loss."""
        self.unread_fields: Counter[str] = Counter()
        """Messages by a field of theirs that the template does not read."""
        added = tokenizer.added_tokens_decoder.values()
        self._special_texts = tuple(token.content for token in added if token.special)

    @property
    def has_markers(self) -> bool:
        """Whether the template marks the assistant's text itself."""
        return self.template.has_markers

    def encode(self, conversations: list[Conversation]) -> list[Encoded]:
        """One `Encoded` per conversation, special tokens exactly where the template writes them.

        Raises:
            CorpusError: the template refuses a conversation or drops a part of it, or its turns cannot be told
                apart.
        """
        texts, spans, blank = [], [], []
        for conversation in conversations:
            text, ranges = self.target_spans(conversation)
            # A role, a field or a tool's description has not been looked at yet.
            texts.append(unicode_text(text, "a rendered conversation", conversation.where))
            spans.append(ranges)
            blank.append(self._count_turns(conversation))
        encoded = encode_spans(self.tokenizer, texts, spans)
        return [
            Encoded(ids, mask, splittable=False, where=conversation.where, is_empty=is_empty)
            for (ids, mask), conversation, is_empty in zip(encoded, conversations, blank, strict=True)
        ]

    def _count_turns(self, conversation: Conversation) -> bool:
        """Count what of the answers is not trained; True if that is all of them, for being empty."""
        answers, targets = conversation.answers(), conversation.targets()
        excepted = conversation.without_loss & set(answers)
        num_empty = len(answers) - len(targets) - len(excepted)
        if num_empty and not targets:
            return True
        self.num_empty_turns += num_empty
        self.num_turns_without_loss += len(excepted)
        return False

    def target_spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The rendered conversation and the character ranges that the assistant is to produce."""
        conversation = self.template.prepared(conversation)
        marked: list[Span] = []
        if self.has_markers:
            full, marked = self.template.marked_spans(conversation)
        else:
            full = self.template.render(conversation)
        require_shown(self.template, conversation, full)
        self.unread_fields += unread_fields(self.template, conversation, full)
        if self.has_markers:
            turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
            targets = set(conversation.targets())
            if targets == set(turns):
                return full, marked
            if len(turns) == len(marked):
                return full, [span for i, span in zip(turns, marked, strict=True) if i in targets]
        return full, self.incremental_spans(conversation, full)

    def incremental_spans(self, conversation: Conversation, full: str) -> list[Span]:
        """The turns of the assistant in the rendered conversation, found by rendering its beginnings."""
        spans: list[Span] = []
        for index in conversation.targets():
            spans.append(self._turn_span(full, index, conversation))
            if len(spans) > 1 and spans[-1][0] < spans[-2][1]:
                raise self._unstable(index, conversation)
        return spans

    def _turn_span(self, full: str, index: int, conversation: Conversation) -> Span:
        messages = conversation.messages
        upto = self.template.render(conversation, messages[: index + 1])
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
        if index == 0:  # there is nothing to render before it
            return self._first_turn_start(full, upto, conversation)
        beginning = conversation.messages[:index]
        before = self.template.render(conversation, beginning)
        prompted = self.template.render(conversation, beginning, generation_prompt=True)
        if not all(text.startswith(before) for text in (full, upto, prompted)):
            raise self._unstable(index, conversation)
        if full.startswith(prompted) and upto.startswith(prompted):
            return len(prompted)
        # The prompt promises what the turn does not keep, such as an opened <think>: the part both share is
        # the turn's header, up to its last special token or line break, lest it run into the answer.
        pairs = zip(full, upto, prompted, strict=False)
        length = next((at for at, letters in enumerate(pairs) if len(set(letters)) > 1), None)
        shared = min(full, upto, prompted, key=len)[:length]
        return max(len(before), self._end_of_header(shared))

    def _first_turn_start(self, full: str, upto: str, conversation: Conversation) -> int:
        """Where a turn begins that nothing stands before: behind the first header in the rendering, which is what a
        generation prompt adds to a user's turn."""
        asked = replace(conversation, messages=[{"role": "user", "content": "x"}])
        before = self.template.render(asked)
        prompted = self.template.render(asked, generation_prompt=True)
        header = prompted[len(before) :] if prompted.startswith(before) else ""
        if not header:
            return self._first_content_start(full, upto, conversation)
        # It may promise what the turn does not keep, such as an opened <think>.
        while header and header not in upto:
            header = header[: self._end_of_header(header[:-1])]
        start = upto.find(header) + len(header)
        if not header or header in before or full[:start] != upto[:start]:
            raise self._unstable(0, conversation)
        return start

    def _first_content_start(self, full: str, upto: str, conversation: Conversation) -> int:
        """The same for a template without generation prompts, if the turn is its content and nothing else."""
        message = conversation.messages[0]
        content = message["content"].strip()
        start = upto.find(content)
        if (
            not content
            or upto.count(content) > 1
            or set(message) - {"role", "content"}
            or full[:start] != upto[:start]
        ):
            raise self._unstable(0, conversation)
        return start

    def _end_of_header(self, text: str) -> int:
        """Where the last special token or line break of a text ends; 0 without one."""
        ends = [text.rfind(token) + len(token) for token in self._special_texts if token in text]
        return max(text.rfind("\n") + 1, *ends, 0)

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

    def _unstable(self, index: int, conversation: Conversation) -> CorpusError:
        return CorpusError(
            "the chat template must render the beginning of a conversation as within the whole, "
            f"got another text for message {index + 1} of {conversation.where}; use a template with "
            "{% generation %} markers, or bring input_ids with a loss_mask"
        )
