"""Masks of conversations, worked out by hand for every kind of template."""

from typing import Any

import pytest
from corpus_tokenizers import (
    CHATML,
    CHATML_MARKED,
    INST,
    OPENED_THOUGHT,
    THINKING,
    TOOLS,
    UNSTABLE,
    byte_tokenizer,
)

from cache_builder.corpus.examples import Conversation
from cache_builder.rows.chat import ChatEncoder
from formats.errors import ConfigError, CorpusError

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]


def conversation(messages: list[dict[str, Any]], *, first_target: int = 0, tools: Any = None) -> Conversation:
    return Conversation(messages, tools, first_target, "data.jsonl, line 7")


def shown(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """The rendered conversation with its targets between brackets, assembled from the character spans."""
    text, spans = ChatEncoder(byte_tokenizer(template)).target_spans(conversation(messages, **options))
    for start, end in reversed(spans):
        text = f"{text[:start]}[{text[start:end]}]{text[end:]}"
    return text


CHATML_EXPECTED = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\n[Yo<|im_end|>]\n<|im_start|>user\nBye<|im_end|>\n"
    "<|im_start|>assistant\n[See you<|im_end|>]\n"
)


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_chatml_targets_are_the_answers_and_their_end_tokens(template: str) -> None:
    assert shown(template, TURNS) == CHATML_EXPECTED


def test_inst_targets_follow_the_closing_bracket_and_end_with_eos() -> None:
    expected = "<s>[INST] Hi [/INST][ Yo </s>]<s>[INST] Bye [/INST][ See you </s>]"
    assert shown(INST, TURNS[1:]) == expected


def test_token_mask_is_the_character_mask_for_a_byte_tokenizer() -> None:
    tokenizer = byte_tokenizer(CHATML)
    [encoded] = ChatEncoder(tokenizer).encode([conversation(TURNS[1:3])])
    header, answer = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Yo<|im_end|>"
    lengths = [len(tokenizer(part)["input_ids"]) for part in (header, answer, "\n")]
    assert lengths == [1 + 7 + 1 + 1 + 1 + 10, 3, 1]
    assert encoded.loss_mask.tolist() == [False] * lengths[0] + [True] * lengths[1] + [False]
    assert tokenizer.decode(encoded.input_ids.tolist()) == header + answer + "\n"


def test_special_tokens_of_the_template_are_not_doubled_by_the_tokenizer() -> None:
    tokenizer = byte_tokenizer(INST, adds_bos=True)
    [encoded] = ChatEncoder(tokenizer).encode([conversation(TURNS[1:3])])
    assert encoded.input_ids.tolist().count(tokenizer.bos_token_id) == 1


def test_marked_template_gives_the_mask_of_transformers(tiny_tokenizer: Any) -> None:
    """The independent reference: `apply_chat_template` with its own mask, on a trained tokenizer."""
    messages = [
        *TURNS,
        {"role": "user", "content": "def f(x):\n    return x"},
        {"role": "assistant", "content": "é 漢字 ok"},
    ]
    reference = tiny_tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    [encoded] = ChatEncoder(tiny_tokenizer).encode([conversation(messages)])
    assert encoded.input_ids.tolist() == reference["input_ids"]
    assert encoded.loss_mask.astype(int).tolist() == reference["assistant_masks"]
    assert 0 < encoded.loss_mask.sum() < len(encoded.loss_mask)


def test_incremental_rendering_agrees_with_markers_token_by_token(tiny_tokenizer: Any) -> None:
    import copy

    unmarked = copy.deepcopy(tiny_tokenizer)
    unmarked.chat_template = tiny_tokenizer.chat_template.replace("{% generation %}", "").replace(
        "{% endgeneration %}", ""
    )
    assert ChatEncoder(tiny_tokenizer).has_markers
    assert not ChatEncoder(unmarked).has_markers
    [marked] = ChatEncoder(tiny_tokenizer).encode([conversation(TURNS)])
    [incremental] = ChatEncoder(unmarked).encode([conversation(TURNS)])
    assert incremental.input_ids.tolist() == marked.input_ids.tolist()
    assert incremental.loss_mask.tolist() == marked.loss_mask.tolist()


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_first_target_leaves_answers_of_the_prompt_without_loss(template: str) -> None:
    expected = CHATML_EXPECTED.replace("[Yo<|im_end|>]", "Yo<|im_end|>")
    assert shown(template, TURNS, first_target=4) == expected


def test_system_and_tool_messages_carry_no_loss() -> None:
    messages = [*TURNS[:3], {"role": "tool", "content": "42"}, {"role": "assistant", "content": "It is 42"}]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n[Yo<|im_end|>]\n<|im_start|>tool\n42<|im_end|>\n"
        "<|im_start|>assistant\n[It is 42<|im_end|>]\n"
    )
    assert shown(CHATML, messages) == expected


def test_consecutive_answers_are_separate_targets() -> None:
    messages = [TURNS[1], TURNS[2], TURNS[4]]
    expected = (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Yo<|im_end|>]\n"
        "<|im_start|>assistant\n[See you<|im_end|>]\n"
    )
    assert shown(CHATML, messages) == expected


def test_an_opening_turn_is_a_target_as_a_later_one_is() -> None:
    """Its content may occur in the header, in its call, or behind a thought."""
    for content in ("end", "d", "assistant", "im_start"):
        answer = {"role": "assistant", "content": content}
        opening = "<|im_start|>assistant\n[" + content + "<|im_end|>]\n"
        assert shown(CHATML, [answer, TURNS[3]]) == opening + "<|im_start|>user\nBye<|im_end|>\n"
        assert shown(CHATML, [TURNS[0], answer]).endswith(opening)
    call = {"name": "weather", "arguments": {"city": "Lima"}}
    calling = {"role": "assistant", "content": "weather", "tool_calls": [call]}
    assert shown(TOOLS, [calling, TURNS[3]]) == (
        '<|im_start|>assistant\n[weather<call>{"name": "weather", "arguments": {"city": "Lima"}}<|im_end|>]\n'
        "<|im_start|>user\nBye<|im_end|>\n"
    )
    thinking = CHATML.replace("+ m['content']", "+ (m.reasoning_content or '') + m['content']")
    thought = {"role": "assistant", "content": "Yo", "reasoning_content": "Hm. "}
    assert shown(thinking, [thought, TURNS[3]]).startswith("<|im_start|>assistant\n[Hm. Yo<|im_end|>]")
    assert shown(OPENED_THOUGHT, [TURNS[2], TURNS[3]]).startswith("<|im_start|>assistant\n[Yo<|im_end|>]")


def test_an_opening_turn_under_another_header_is_refused() -> None:
    other = CHATML.replace("m['role'] + '\\n'", "('bot' if m['role'] == 'assistant' else m['role']) + '\\n'")
    with pytest.raises(CorpusError, match="got another text for message 1 of"):
        ChatEncoder(byte_tokenizer(other)).encode([conversation(TURNS[2:4])])


def test_an_opening_turn_without_generation_prompts() -> None:
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    assert shown(plain, TURNS[2:4]) == "assistant: [Yo\n]user: Bye\n"
    with pytest.raises(CorpusError, match="got another text for message 1 of"):
        shown(plain, [{"role": "assistant", "content": "s"}, TURNS[3]])


def test_half_a_surrogate_pair_anywhere_is_refused() -> None:
    role = [{"role": "us\ud800", "content": "Hi"}, TURNS[2]]
    with pytest.raises(CorpusError) as caught:
        ChatEncoder(byte_tokenizer(CHATML)).encode([conversation(role)])
    assert str(caught.value) == (
        "a rendered conversation must be valid Unicode, got an unpaired surrogate at character 15 of data.jsonl, "
        "line 7; mend or drop the record"
    )


def test_an_opening_answer_is_a_target_without_its_header() -> None:
    assert shown(CHATML, TURNS[2:4]) == (
        "<|im_start|>assistant\n[Yo<|im_end|>]\n<|im_start|>user\nBye<|im_end|>\n"
    )


def test_tools_reach_the_template() -> None:
    template = "{% if tools %}{{ 'tools: ' + tools[0]['name'] + '\\n' }}{% endif %}" + CHATML
    text = shown(template, TURNS[1:3], tools=[{"name": "clock"}])
    assert text.startswith("tools: clock\n<|im_start|>user")
    assert "[Yo<|im_end|>]" in text


def test_dropped_reasoning_is_trained_as_rendered_and_counted() -> None:
    messages = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "<think>add</think>\nTwo"},
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "<think>again</think>\nFour"},
    ]
    encoder = ChatEncoder(byte_tokenizer(THINKING))
    text, spans = encoder.target_spans(conversation(messages))
    assert text == (
        "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\nTwo<|im_end|>\n"
        "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n<think>again</think>\nFour<|im_end|>\n"
    )
    assert [text[start:end] for start, end in spans] == [
        "Two<|im_end|>",
        "<think>again</think>\nFour<|im_end|>",
    ]
    assert encoder.num_shortened_turns == 1


def test_a_generation_prompt_that_the_answer_does_not_keep() -> None:
    assert shown(OPENED_THOUGHT, TURNS[1:3]) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Yo<|im_end|>]\n"
    )
    # an answer that starts like the promised text must not lose its first characters
    like = [TURNS[1], {"role": "assistant", "content": "<thin> ice"}]
    assert shown(OPENED_THOUGHT, like).endswith("assistant\n[<thin> ice<|im_end|>]\n")
    kept = [TURNS[1], {"role": "assistant", "content": "<think>\nhm</think>Yo"}]
    assert shown(OPENED_THOUGHT, kept).endswith("assistant\n<think>\n[hm</think>Yo<|im_end|>]\n")


def test_an_unstable_template_is_refused_with_the_row() -> None:
    with pytest.raises(CorpusError) as caught:
        ChatEncoder(byte_tokenizer(UNSTABLE)).encode([conversation(TURNS)])
    assert str(caught.value) == (
        "the chat template must render the beginning of a conversation as within the whole, got another "
        "text for "
        "message 3 of data.jsonl, line 7; use a template with {% generation %} markers, or bring input_ids "
        "with a "
        "loss_mask"
    )


@pytest.mark.parametrize("earlier", ["m['content'] | upper", "''"])
def test_a_turn_rewritten_or_emptied_later_is_refused(earlier: str) -> None:
    """Shortening leaves an ending with the answer in it; anything else would make the mask a guess."""
    rewritten = CHATML.replace(
        "m['content'] +", f"(({earlier}) if m['role'] == 'assistant' and not loop.last else m['content']) +"
    )
    with pytest.raises(CorpusError, match="must render the beginning"):
        ChatEncoder(byte_tokenizer(rewritten)).encode([conversation(TURNS)])


def test_a_conversation_that_the_template_refuses_is_named() -> None:
    with pytest.raises(CorpusError) as caught:
        ChatEncoder(byte_tokenizer(INST)).encode([conversation(TURNS)])
    assert str(caught.value) == (
        "the chat template must accept every conversation, got 'roles must alternate' for data.jsonl, line "
        "7; "
        "mend or drop the record"
    )


def test_messages_without_a_template_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        ChatEncoder(byte_tokenizer())
    assert str(caught.value) == (
        "messages need a chat template, got a tokenizer without one; use a chat model's tokenizer, or "
        "bring prompt "
        "and completion strings"
    )
