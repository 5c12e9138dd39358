"""Rendering: one instant for all, arguments for the template, and beginnings that it refuses."""

from datetime import datetime
from typing import Any

import pytest
from corpora import ANSWER, USER, rows_of
from corpus_tokenizers import CHATML, CHATML_MARKED, byte_tokenizer, targets_of, text_of

from cache_builder.corpus.examples import Conversation
from cache_builder.rows.chat import ChatEncoder
from cache_builder.rows.template import ChatTemplate, tells_the_time
from formats.errors import ConfigError, CorpusError

TIMED = "{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') + '\\n' }}" + CHATML
INSTANT = datetime(2026, 2, 3, 4, 5, 6)
# Qwen3.5's manner: somewhere there must be a user.
WANTS_USER = (
    "{% if not messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{ raise_exception('No user query found.') }}{% endif %}" + CHATML
)
# The first turn, system prompt apart, must be the user's: even the whole is refused.
STARTS_WITH_USER = "{% if messages[0].role != 'user' %}{{ raise_exception('Start!') }}{% endif %}" + CHATML


def test_the_time_stands_still() -> None:
    """With microseconds in the text, two renderings at two times could not agree."""
    tokenizer = byte_tokenizer(TIMED)
    encoder = ChatEncoder(tokenizer)
    conversation = Conversation([USER, ANSWER, USER, ANSWER], None, 0, "line 1")
    texts = {encoder.target_spans(conversation)[0] for _ in range(3)}
    assert len(texts) == 1
    [(text, spans)] = [ChatEncoder(tokenizer, instant=INSTANT).target_spans(conversation)]
    assert text.startswith("2026-02-03 04:05:06.000000\n<|im_start|>user\nHi")
    assert [text[a:b] for a, b in spans] == ["Yo<|im_end|>"] * 2


def test_the_time_stands_still_where_the_template_marks_the_answers() -> None:
    tokenizer = byte_tokenizer("{{ strftime_now('%d %b') + '\\n' }}" + CHATML_MARKED)
    text, spans = ChatEncoder(tokenizer, instant=INSTANT).target_spans(
        Conversation([USER, ANSWER], None, 0, "x")
    )
    assert text.startswith("03 Feb\n")
    assert [text[a:b] for a, b in spans] == ["Yo<|im_end|>"]


def test_who_tells_the_time() -> None:
    assert [tells_the_time(byte_tokenizer(t)) for t in (TIMED, CHATML, None)] == [True, False, False]
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.chat_template = {"default": CHATML, "tool_use": TIMED}
    assert tells_the_time(tokenizer)


def test_template_arguments_of_the_corpus_and_of_a_record(tmp_path: Any) -> None:
    tokenizer = byte_tokenizer("{{ mood | default('') }}{{ style | default('') }}" + CHATML)
    records = [
        {"messages": [USER, ANSWER]},
        {"messages": [USER, ANSWER], "chat_template_kwargs": {"mood": "C", "style": "D"}},
    ]
    rows, _ = rows_of(tmp_path, records, tokenizer, chat_template_kwargs={"mood": "A"})
    assert [text_of(row, tokenizer)[:3] for row in rows] == ["A<|", "CD<"]
    assert [targets_of(row, tokenizer) for row in rows] == [["Yo<|im_end|>"]] * 2


def test_template_arguments_that_nobody_reads_are_refused(tmp_path: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        ChatTemplate(byte_tokenizer(CHATML), {"mood": "A"})
    assert (
        str(caught.value) == "a template argument must be one that the template reads, got mood; leave it out"
    )
    with pytest.raises(ConfigError, match="template arguments need messages and a chat template, got text"):
        rows_of(tmp_path, [{"text": "abc"}], byte_tokenizer(CHATML), chat_template_kwargs={"mood": "A"})


def test_a_beginning_that_the_template_refuses_is_named() -> None:
    messages = [{"role": "assistant", "content": "Welcome"}, USER, ANSWER]
    with pytest.raises(CorpusError) as caught:
        ChatEncoder(byte_tokenizer(WANTS_USER)).encode(
            [Conversation(messages, None, 0, "data.jsonl, line 7")]
        )
    assert str(caught.value) == (
        "to find the assistant's turns, a chat template without markers must also accept the beginning of a "
        "conversation, got 'No user query found.' for message 1 of data.jsonl, line 7, although it accepts the whole; "
        "use a template with {% generation %} markers, or bring input_ids with a loss_mask"
    )
    system = {"role": "system", "content": "Be brief."}
    with pytest.raises(CorpusError, match=r"for messages 1 to 2 of data\.jsonl, line 7, although"):
        ChatEncoder(byte_tokenizer(WANTS_USER)).encode(
            [Conversation([system, *messages], None, 0, "data.jsonl, line 7")]
        )


def test_with_markers_the_same_conversation_is_trained() -> None:
    marked = WANTS_USER.replace(CHATML, CHATML_MARKED)
    messages = [{"role": "assistant", "content": "Welcome"}, USER, ANSWER]
    text, spans = ChatEncoder(byte_tokenizer(marked)).target_spans(Conversation(messages, None, 0, "line 7"))
    assert [text[a:b] for a, b in spans] == ["Welcome<|im_end|>", "Yo<|im_end|>"]


def test_a_conversation_that_is_refused_as_a_whole_says_so() -> None:
    with pytest.raises(CorpusError) as caught:
        ChatEncoder(byte_tokenizer(STARTS_WITH_USER)).encode(
            [Conversation([ANSWER, USER], None, 0, "line 7")]
        )
    assert str(caught.value) == (
        "the chat template must accept every conversation, got 'Start!' for line 7; mend or drop the record"
    )
