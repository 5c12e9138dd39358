"""Bad records are refused by their place, with the rule."""

from pathlib import Path
from typing import Any

import pytest
from corpora import USER, rows_of
from corpus_tokenizers import CHATML, byte_tokenizer

from formats.errors import CorpusError

BAD_RECORDS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"text": "fine"},
        {"text": None},
        "text must be a string, got null in data.jsonl, line 2; mend or drop the record",
    ),
    (
        {"text": "fine"},
        {"text": 7},
        "text must be a string, got int in data.jsonl, line 2; mend or drop the record",
    ),
    (
        {"text": "fine"},
        {"body": "x"},
        "every record must have the column 'text', got only body in data.jsonl, line 2",
    ),
    (
        {"text": "fine"},
        {"text": "half \ud800"},
        "text must be valid Unicode, got an unpaired surrogate at character 6 of data.jsonl, line 2; "
        "mend or drop the record",
    ),
    (
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": None},
        "completion must be a string, got null in data.jsonl, line 2; mend or drop the record",
    ),
    (
        {"messages": [USER]},
        {"messages": []},
        "messages must hold at least one message, got none in data.jsonl, line 2; drop the record",
    ),
    (
        {"messages": [USER]},
        {"messages": "Hi"},
        "messages must be a list, got the string 'Hi' in data.jsonl, line 2",
    ),
    (
        {"messages": [USER]},
        {"messages": ["Hi"]},
        "a message must be an object with role and content, got str in message 1 of data.jsonl, line 2",
    ),
    (
        {"messages": [USER]},
        {"messages": [USER, {"content": "Yo"}]},
        "role must be a string such as user or assistant, got null in message 2 of data.jsonl, line 2",
    ),
    (
        {"messages": [USER]},
        {"messages": [{"role": "user", "content": None}]},
        "content must be a string, got null in message 1 of data.jsonl, line 2; mend or drop the record",
    ),
    (
        {"messages": [USER]},
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        "content must be text, got a part of type image in message 1 of data.jsonl, line 2; drop the record",
    ),
    (
        {"conversations": [{"from": "human", "value": "Hi"}]},
        {"conversations": [{"from": "narrator", "value": "Hi"}]},
        "from must be one of human, user, prompter, gpt, assistant, chatgpt, model, bot, function_call, "
        "system, "
        "tool, observation, function_response, got 'narrator' in data.jsonl, line 2",
    ),
    (
        {"conversations": [{"from": "human", "value": "Hi"}]},
        {"conversations": [{"from": ["human"], "value": "Hi"}]},
        "from must be one of human, user, prompter, gpt, assistant, chatgpt, model, bot, function_call, "
        "system, tool, observation, function_response, got ['human'] in data.jsonl, line 2",
    ),
    (
        {"conversations": [{"from": "human", "value": "Hi", "role": "user", "content": "Hi"}]},
        {"conversations": [{"from": "human", "value": "Hi", "content": "Ho"}]},
        "a ShareGPT turn has one speaker and one text, got value and another content in data.jsonl, line 2; "
        "drop one",
    ),
    (
        {"conversations": [{"from": "human", "value": "Hi", "role": "human", "content": None}]},
        {"conversations": [{"from": "human", "value": "Hi", "role": "assistant"}]},
        "a ShareGPT turn has one speaker and one text, got from and another role in data.jsonl, line 2; drop one",
    ),
    (
        {"messages": [USER]},
        {"messages": [{"role": "assistant", "function_call": {"name": "f"}, "tool_calls": [{"name": "g"}]}]},
        "the calls of a turn stand in one field, got function_call and tool_calls in message 1 of data.jsonl, "
        "line 2; drop one",
    ),
    (
        {"input_ids": [7, 8], "labels": [7, 8]},
        {"input_ids": [7, 8], "labels": [8, -100]},
        "labels must equal input_ids or be -100 (they are not shifted), got others in data.jsonl, line 2",
    ),
    (
        {"input_ids": [7, 8]},
        {"input_ids": [7, 8], "labels": [7]},
        "labels must be as long as input_ids (2), got 1 in data.jsonl, line 2",
    ),
    (
        {"input_ids": [7, 8]},
        {"input_ids": [7, 999999]},
        "input_ids must lie in 0..260 (the tokenizer's vocabulary), got 7 to 999999 in data.jsonl, line 2; "
        "tokenise the corpus with this model's tokenizer",
    ),
    (
        {"input_ids": [7, 8]},
        {"input_ids": [7, 1.5]},
        "input_ids must be a list of integers, got other values in data.jsonl, line 2",
    ),
    (
        {"input_ids": [7, 8]},
        {"input_ids": [[7, 8], [9]]},
        "input_ids must be a list of integers, got other values in data.jsonl, line 2",
    ),
    (
        {"input_ids": [7, 8]},
        {"input_ids": [7, None]},
        "input_ids must be a list of integers, got other values in data.jsonl, line 2",
    ),
    (
        {"messages": [USER]},
        {"messages": '[{"role": "user", "content": "a", "content": "b"}]'},
        "an object must have every name once, got 'content' twice in data.jsonl, line 2; keep one of them",
    ),
    (
        {"messages": [USER], "tools": "[]"},
        {"messages": [USER], "tools": ["clock"]},
        "tools must be a list of JSON schemas, got another list in data.jsonl, line 2",
    ),
    (
        {"input_ids": [7, 8], "attention_mask": [1, 1]},
        {"input_ids": [7, 8, 9], "attention_mask": [1, 0, 1]},
        "attention_mask must be one run of ones, got gaps in data.jsonl, line 2",
    ),
    (
        {"input_ids": [7, 8], "loss_mask": [1, 1]},
        {"input_ids": [7, 8], "loss_mask": [1, 2]},
        "loss_mask must hold zeros and ones, got other values in data.jsonl, line 2",
    ),
]


@pytest.mark.parametrize(("good", "bad", "message"), BAD_RECORDS)
def test_bad_records_are_named(
    tmp_path: Path, good: dict[str, Any], bad: dict[str, Any], message: str
) -> None:
    with pytest.raises(CorpusError) as caught:
        rows_of(tmp_path, [good, bad], byte_tokenizer(CHATML))
    assert str(caught.value) == message
