"""A template that drops a part of a conversation is refused; one that shows it in its own way is not."""

import json
from typing import Any

import pytest
from corpora import ANSWER, USER
from corpus_tokenizers import CHATML, CHATML_MARKED, THINKING, TOOLS, byte_tokenizer

from cache_builder.corpus.examples import Conversation
from cache_builder.corpus.fields import names
from cache_builder.rows.chat import ChatEncoder
from formats.errors import CorpusError

CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "PET"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
# Mistral's manner: the system prompt is shown within the first question.
MOVES_SYSTEM = (
    "{% set ns = namespace(s='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.s = m.content %}"
    "{% elif m.role == 'user' %}{{ '[INST]' + ns.s + ' ' + m.content + '[/INST]' }}{% set ns.s = '' %}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
# Llama 3.1's manner: of a turn with a call nothing but the call is shown, and only one.
ONLY_CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REASONING = CHATML.replace(
    "m['content'] +",
    "('<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '') + m['content'] +",
)
DROPS_EARLIER = REASONING.replace("if m.reasoning_content else", "if m.reasoning_content and loop.last else")
KNOWS_THREE_ROLES = (
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def targets(template: str, messages: list[dict[str, Any]], **options: Any) -> list[str]:
    conversation = Conversation(messages, options.pop("tools", None), 0, "data.jsonl, line 7", **options)
    text, spans = ChatEncoder(byte_tokenizer(template)).target_spans(conversation)
    return [text[start:end] for start, end in spans]


def refusal(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    with pytest.raises(CorpusError) as caught:
        targets(template, messages, **options)
    return str(caught.value)


def not_shown(part: str) -> str:
    return (
        f"a chat template must show all of a conversation, got one that does not show {part} of data.jsonl, line 7; "
        "use a template that shows it, or drop the record"
    )


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_a_call_that_does_not_show_would_train_only_the_end_of_the_turn(template: str) -> None:
    assert refusal(template, [USER, CALLING]) == not_shown("tool_calls of message 2 (role assistant)")
    with_content = {**CALLING, "content": "Let me look."}
    assert refusal(template, [USER, with_content, ANSWER]) == not_shown(
        "tool_calls of message 2 (role assistant)"
    )
    assert targets(template, [USER, {**CALLING, "content": "Yo", "tool_calls": []}]) == ["Yo<|im_end|>"]


def test_every_call_must_show_and_the_content_beside_it() -> None:
    two = {**CALLING, "tool_calls": [CALL, CALL]}
    shown = '<call>{"name": "clock", "arguments": {"zone": "PET"}}'
    assert targets(TOOLS, [USER, two]) == [shown * 2 + "<|im_end|>"]
    assert refusal(ONLY_CALLS, [USER, two]) == not_shown(
        "the last of tool_calls of message 2 (role assistant)"
    )
    assert targets(ONLY_CALLS, [USER, CALLING]) == [json.dumps(CALL["function"]) + "<|im_end|>"]
    message = refusal(ONLY_CALLS, [USER, {**CALLING, "content": "Let me look."}])
    assert message == not_shown("the content of message 2 (role assistant)")


def test_tools_must_show() -> None:
    schema = [{"type": "function", "function": {"name": "clock"}}]
    assert targets(TOOLS, [USER, ANSWER], tools=schema) == ["Yo<|im_end|>"]
    assert refusal(CHATML, [USER, ANSWER], tools=schema) == (
        "a chat template must show the tools, got one that does not, for data.jsonl, line 7; use a template that shows "
        "it, or drop the record"
    )


@pytest.mark.parametrize("name", names("turn content"))
def test_reasoning_and_its_like_must_show(name: str) -> None:
    messages = [USER, {**ANSWER, name: "hm"}]
    assert refusal(CHATML, messages) == not_shown(f"{name} of message 2 (role assistant)")
    reads = CHATML.replace(
        "m['content'] +", f"(m['{name}'] | string if m['{name}'] else '') + m['content'] +"
    )
    assert targets(reads, messages) == ["hmYo<|im_end|>"]
    assert targets(reads, [USER, {**ANSWER, name: "hm", "content": ""}]) == ["hm<|im_end|>"]


def test_reasoning_that_only_the_last_turn_shows_is_shown() -> None:
    thought = {"role": "assistant", "content": "Two", "reasoning_content": "add"}
    messages = [USER, thought, USER, {**thought, "content": "Four"}]
    assert targets(REASONING, messages) == [
        "<think>add</think>Two<|im_end|>",
        "<think>add</think>Four<|im_end|>",
    ]
    assert targets(DROPS_EARLIER, messages) == ["Two<|im_end|>", "<think>add</think>Four<|im_end|>"]
    within = [USER, {"role": "assistant", "content": "<think>add</think>\nTwo"}, USER, ANSWER]
    assert targets(THINKING, within) == ["Two<|im_end|>", "<think></think>\nYo<|im_end|>"]


@pytest.mark.parametrize("thought", ["<think>\nHm.\n</think>\n\n", "Hm.</think>", "<think></think>"])
def test_reasoning_within_the_content_must_show(thought: str) -> None:
    """DeepSeek R1's manner: everything up to the end of the thought is cut off, of the last turn too."""
    cuts = CHATML.replace("m['content'] +", "m['content'].split('</think>')[-1] +")
    thinks = {"role": "assistant", "content": thought + "Yo"}
    message = refusal(cuts, [USER, thinks])
    assert message == not_shown("the beginning of the content of message 2 (role assistant)")
    assert targets(cuts, [USER, ANSWER]) == ["Yo<|im_end|>"]
    assert targets(CHATML, [USER, thinks]) == [thought + "Yo<|im_end|>"]


def test_reasoning_within_the_content_that_only_the_last_turn_shows_is_shown() -> None:
    thinks = {"role": "assistant", "content": "<think>Hm.</think>\nYo"}
    assert targets(THINKING, [USER, thinks, USER, thinks]) == [
        "Yo<|im_end|>",
        "<think>Hm.</think>\nYo<|im_end|>",
    ]


def test_a_name_must_show_but_for_a_tools_answer() -> None:
    assert refusal(CHATML, [{**USER, "name": "Ana"}, ANSWER]) == not_shown("name of message 1 (role user)")
    answer = {"role": "tool", "content": "12:00", "name": "clock"}
    assert targets(CHATML, [USER, ANSWER, answer, ANSWER]) == ["Yo<|im_end|>"] * 2
    reads = CHATML.replace("m['role'] +", "m['role'] + (' ' + m.name if m.name else '') +")
    assert targets(reads, [{**USER, "name": "Ana"}, ANSWER]) == ["Yo<|im_end|>"]


def test_a_message_of_a_role_that_the_template_skips() -> None:
    developer = {"role": "developer", "content": "Be brief."}
    assert targets(CHATML, [developer, USER, ANSWER]) == ["Yo<|im_end|>"]
    message = refusal(KNOWS_THREE_ROLES, [developer, USER, ANSWER])
    assert message == not_shown("the content of message 1 (role developer)")


@pytest.mark.parametrize("content", ["22", "assistant", "clock"])
def test_a_dropped_message_is_found_though_its_text_stands_elsewhere(content: str) -> None:
    """In a later answer, in what the template writes itself, in a call."""
    template = TOOLS.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    answer = {"role": "tool", "content": content}
    last = {"role": "assistant", "content": "It is 22 degrees."}
    assert not_shown("the content of message 3 (role tool)") == refusal(
        template, [USER, CALLING, answer, last]
    )
    assert targets(TOOLS, [USER, CALLING, answer, last])[1] == "It is 22 degrees.<|im_end|>"
    assert targets(TOOLS, [answer, answer, USER, ANSWER]) == ["Yo<|im_end|>"]


def test_what_is_shown_elsewhere_or_otherwise_is_shown() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert targets(MOVES_SYSTEM, [system, USER, ANSWER]) == ["Yo</s>"]
    as_json = CHATML.replace(
        "m['content'] +", "(m['content'] | tojson if m.role == 'tool' else m['content']) +"
    )
    answer = {"role": "tool", "content": '{"time": "12:00"}'}
    assert targets(as_json, [USER, ANSWER, answer, ANSWER]) == ["Yo<|im_end|>"] * 2


@pytest.mark.parametrize("as_text", [False, True])
def test_arguments_take_the_form_that_the_template_is_written_for(as_text: bool) -> None:
    """`tojson` on an object; joined text, and text printed as it is, from JSON text (DeepSeek's and OpenAI's way)."""
    arguments = {"zone": "PET", "at": "é"}
    call = {"type": "function", "function": {"name": "clock", "arguments": arguments}}
    messages = [USER, {**CALLING, "tool_calls": [call]}]
    shown = '{"zone": "PET", "at": "é"}'
    start = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}"
    end = (
        "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    joined = start + "{{ '```' + c.function.arguments + '```' }}" + end
    printed = start + "```{{ c.function.arguments }}```" + end
    encoded = start + "```{{ c.function.arguments | tojson }}```" + end
    for template in (joined, printed, encoded):
        assert targets(template, messages) == [f"```{shown}```<|im_end|>"]
        quoting = [*messages, {"role": "tool", "content": f"clock({arguments}) -> 12:00"}]
        assert targets(template, quoting) == [f"```{shown}```<|im_end|>"]
    assert messages[1]["tool_calls"] == [call]  # nobody wrote into the record
