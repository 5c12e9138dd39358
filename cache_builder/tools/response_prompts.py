"""What was asked, as the token ids that a server saw before its answer.

Ids are taken where they are said. Otherwise the question is rendered here, which is right only with the tokenizer and
template of the server: `usage.prompt_tokens` must be as many. What changes a prompt and cannot be done here is refused.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from cache_builder.corpus.examples import Conversation
from cache_builder.corpus.messages import read_turns
from cache_builder.corpus.readers import Record
from cache_builder.rows.template import ChatTemplate, tells_the_time
from formats.errors import FormatError

ASK_FOR_IDS = "ask the server for token ids (vLLM: return_token_ids)"


class ResponsePrompts:
    """Prompts through one tokenizer.

    Args:
        size: token ids there are.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        self._tokenizer, self._size = tokenizer, size

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizer)

    def of(self, asked: Mapping[str, Any], response: Mapping[str, Any], record: Record) -> list[list[int]]:
        """The prompt of every choice of a response to what `asked` says.

        Raises:
            FormatError: nothing says what was asked, or it is not what the server counted.
            AnnealError: the chat template does not accept the messages.
        """
        choices, where = response["choices"], record.where
        known = [choice.get("prompt_token_ids") or response.get("prompt_token_ids") for choice in choices]
        if all(known):
            return [self.checked(ids, where) for ids in known]
        if messages := asked.get("messages"):
            prompts = [self._of_messages(messages, asked, response, record)]
        else:
            prompts = [self._of_prompt(prompt, asked, where) for prompt in _prompts(asked, where)]
        counted, found = (response.get("usage") or {}).get("prompt_tokens"), sum(map(len, prompts))
        if counted is not None and counted != found:
            raise FormatError(
                f"{where} must have the prompt that the server saw, got {found} tokens where it counted "
                f"{counted}; another tokenizer, chat template or template arguments, or a prompt that was cut"
            )
        each, rest = divmod(len(choices), len(prompts))
        if rest:
            raise FormatError(
                f"{where} must have as many choices for every prompt, got {len(choices)} for {len(prompts)}"
            )
        numbers = [choice.get("index", at) for at, choice in enumerate(choices)]
        if sorted(numbers) != list(range(len(choices))):
            raise FormatError(f"{where} must have choices of the index 0, 1, ..., got {numbers}")
        return [prompts[number // each] for number in numbers]

    def checked(self, ids: Any, where: str) -> list[int]:
        """The same, once they are ids of the tokenizer.

        Raises:
            FormatError: names the first that is none.
        """
        for token in ids:
            if type(token) is not int or not 0 <= token < self._size:
                raise FormatError(
                    f"{where} must have token ids from 0 to {self._size - 1}, got {token!r}; give the teacher's own "
                    "tokenizer"
                )
        return list(ids)

    def _of_prompt(self, prompt: str | Sequence[int], asked: Mapping[str, Any], where: str) -> list[int]:
        if not isinstance(prompt, str):
            return self.checked(prompt, where)
        special = asked.get("add_special_tokens") is not False
        return list(self._tokenizer(prompt, add_special_tokens=special, verbose=False)["input_ids"])

    def _of_messages(
        self, messages: Any, asked: Mapping[str, Any], response: Mapping[str, Any], record: Record
    ) -> list[int]:
        where = record.where
        if asked.get("continue_final_message") or asked.get("add_generation_prompt") is False:
            raise FormatError(
                f"{where} must have an answer to the messages, got one that continues them; {ASK_FOR_IDS}"
            )
        for message in messages:
            content = message.get("content") if isinstance(message, dict) else None
            if isinstance(content, list) and len(content) > 1:
                raise FormatError(
                    f"{where} must have a message's content as one text, got {len(content)} parts, which servers join "
                    f"in their own ways; {ASK_FOR_IDS}"
                )
        template = self._template
        if tells_the_time(self._tokenizer):
            created = response.get("created")
            if not isinstance(created, int | float):
                raise FormatError(
                    f"{where} must say when it was created, for the chat template tells the time; {ASK_FOR_IDS}"
                )
            template = ChatTemplate(self._tokenizer, instant=datetime.fromtimestamp(created))
        # As servers do, what the template does not read is not given to it.
        given = {name: asked.get(name) for name in ("documents", "reasoning_effort")}
        given |= asked.get("chat_template_kwargs") or {}
        conversation = Conversation(
            messages=read_turns(messages, record, "messages", are_context=True),
            tools=asked.get("tools") or None,
            first_target=0,
            where=where,
            arguments={
                name: value
                for name, value in given.items()
                if name in template.variables and value is not None
            },
            template=asked.get("chat_template"),
        )
        text = template.render(template.prepared(conversation), generation_prompt=True)
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _prompts(asked: Mapping[str, Any], where: str) -> Sequence[Any]:
    """The prompts of a completions request: a text or token ids, or a list of them."""
    prompt = asked.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        return [prompt] if isinstance(prompt[0], int) else prompt
    raise FormatError(
        f"{where} must hold messages, a prompt or prompt_token_ids beside the response, got none"
    )
