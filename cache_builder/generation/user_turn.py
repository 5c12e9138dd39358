"""A user's turn that the chat model writes itself, before it answers: Magpie (Xu et al. 2024, arXiv 2406.08464).

A chat model that is given no more than what its template puts before a user's text goes on with what a user would
type. So its own distribution of questions and answers is had without a collection of prompts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from formats.errors import ConfigError

_MARK = "the-text-of-a-user"
"""Stands for a user's text, to find where the template puts one."""


@dataclass(frozen=True, kw_only=True)
class UserTurn:
    """Where a user's text stands in a conversation, and how one that the model wrote becomes a prompt."""

    before: np.ndarray
    """int32 [L]: what the template puts before the text."""
    stop_tokens: tuple[int, ...]
    """The special token that the template puts behind it, if it is one."""
    max_new_tokens: int
    """Longest text; a longer one is cut there. As many are left for the answer at least."""
    behind: str
    """The first line that the template puts behind the text: where a text goes on to it, it ends."""
    decode: Callable[[np.ndarray], str]
    """Tokens as text, without special ones."""
    prompt_of: Callable[[str], np.ndarray]
    """int32 [L] of a conversation with that text, the assistant's header included."""
    max_length: int
    """A prompt must be shorter."""

    @classmethod
    def of(
        cls, tokenizer: Any, render: Callable[[str], str], encode: Callable[[str], list[int]], max_length: int
    ) -> "UserTurn":
        """Of a chat template.

        Args:
            render: a user's text -> the conversation up to the assistant's header, as text.
            encode: such text -> token ids.
            max_length: of a row.

        Raises:
            ConfigError: the template shows a user's text elsewhere or not at all, or a row has no room for it.
        """
        before, mark, behind = (shown := render(_MARK)).partition(_MARK)
        if not mark or _MARK in behind:
            raise ConfigError(
                "for a user's turn of the model's own the chat template must show a user's text once, got it "
                f"{shown.count(_MARK)} times; use --generate-from empty-turn, or bring --prompts FILE"
            )

        def prompt_of(text: str) -> np.ndarray:
            return np.array(encode(render(text)), np.int32)

        def decode(tokens: np.ndarray) -> str:
            ids = [int(token) for token in tokens]
            return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

        least = len(prompt_of(""))
        if max_length < least + 2:
            raise ConfigError(
                f"max_length must be at least {least + 2} (an empty conversation, a token of the user and one of the "
                f"answer), got {max_length}"
            )
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        return cls(
            # A word begins with its space: the one that the template would put there is the model's to write.
            before=np.array(encode(before.rstrip(" ")), np.int32),
            stop_tokens=tuple(token for token in encode(behind.lstrip())[:1] if token in special),
            max_new_tokens=(max_length - least) // 2,
            behind=behind.strip().partition("\n")[0],
            decode=decode,
            prompt_of=prompt_of,
            max_length=max_length,
        )

    def prompt(self, new_tokens: np.ndarray) -> np.ndarray:
        """int32 [L], shorter than a row: the prompt with the text of int32 tokens that the model wrote."""
        text = self.decode(new_tokens)
        if self.behind:
            text = text.partition(self.behind)[0]
        text = text.strip()
        # What a model wrote may take more tokens when it is read again, as broken characters do.
        while len(found := self.prompt_of(text)) >= self.max_length:
            text = text[: len(text) // 2]
        return found
