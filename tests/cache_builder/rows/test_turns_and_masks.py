"""Which tokens carry loss: completions, conversations and ready tokens, by hand."""

from pathlib import Path
from typing import Any

import pytest
from corpora import USER, rows_of
from corpus_tokenizers import CHATML, byte_tokenizer, merging_tokenizer, shown, targets_of, text_of

from formats.errors import ConfigError


def test_completion_carries_the_loss_and_ends_with_eos(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(adds_bos=True)
    [row], _ = rows_of(tmp_path, [{"prompt": "Q: é?\n", "completion": "A: 漢"}], tokenizer)
    assert shown(row, tokenizer) == ("<s>Q: é?\nA: 漢</s>", ["A: 漢</s>"])


def test_a_token_across_the_boundary_is_a_target(tmp_path: Path) -> None:
    """Joint tokenisation: 'b' and 'c' merge, so the model must predict 'bc' to write the completion."""
    tokenizer = merging_tokenizer([("b", "c")])
    [row], _ = rows_of(tmp_path, [{"prompt": "ab", "completion": "cd"}], tokenizer)
    assert shown(row, tokenizer) == ("abcd</s>", ["bcd</s>"])


def test_a_merge_that_reaches_back_does_not_move_the_boundary(tmp_path: Path) -> None:
    """Alone, the prompt is 'ab'; jointly 'a', 'bc': comparing token prefixes would put loss on 'a'."""
    tokenizer = merging_tokenizer([("b", "c"), ("a", "b")])
    assert tokenizer.convert_ids_to_tokens(tokenizer("xab")["input_ids"]) == ["x", "ab"]
    [row], _ = rows_of(tmp_path, [{"prompt": "xab", "completion": "c"}], tokenizer)
    assert tokenizer.convert_ids_to_tokens(row.input_ids.tolist()) == ["x", "a", "bc", "</s>"]
    assert row.loss_mask.tolist() == [False, False, True, True]


def test_leading_space_of_the_completion_is_a_target_even_where_offsets_are_trimmed(tmp_path: Path) -> None:
    tokenizer = merging_tokenizer([("Ġ", "d")], trim_offsets=True)
    [row], _ = rows_of(tmp_path, [{"prompt": "ab", "completion": "  d"}], tokenizer)
    assert tokenizer.convert_ids_to_tokens(row.input_ids.tolist()) == ["a", "b", "Ġ", "Ġd", "</s>"]
    assert row.loss_mask.tolist() == [False, False, True, True, True]


def test_an_eos_that_the_tokenizer_adds_is_a_target(tmp_path: Path) -> None:
    tokenizer = merging_tokenizer([], adds_bos=True, adds_eos=True)
    [row], _ = rows_of(tmp_path, [{"prompt": "ab", "completion": "cd"}], tokenizer)
    assert shown(row, tokenizer) == ("<s>abcd</s>", ["cd</s>"])


def test_an_empty_prompt_leaves_the_first_token_without_loss(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    [row], _ = rows_of(tmp_path, [{"prompt": "", "completion": "cd"}], tokenizer)
    assert shown(row, tokenizer) == ("cd</s>", ["d</s>"])


def test_truncation_is_counted_and_rows_without_target_are_skipped(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    records = [
        {"prompt": "abc", "completion": "def"},  # 7 tokens, cut to 5
        {"prompt": "abcdef", "completion": "g"},  # the completion is cut off whole
        {"prompt": "a", "completion": "b"},
    ]
    rows, iterator = rows_of(tmp_path, records, tokenizer, max_length=5)
    assert [shown(row, tokenizer) for row in rows] == [("abcde", ["de"]), ("ab</s>", ["b</s>"])]
    stats = iterator.stats
    assert (stats.num_truncated, stats.num_truncated_tokens, stats.num_without_target) == (2, 2 + 3, 1)
    assert stats.notes() == [
        "2 records truncated (5 tokens cut off)",
        "1 record skipped: no token carries loss",
    ]


def test_chat_prompt_and_completion(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    record = {
        "prompt": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yo"},
            {"role": "user", "content": "Bye"},
        ],
        "completion": [{"role": "assistant", "content": "See you"}],
    }
    [row], _ = rows_of(tmp_path, [record], tokenizer)
    assert targets_of(row, tokenizer) == ["See you<|im_end|>"]
    assert text_of(row, tokenizer).startswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo")


# --- conversions --------------------------------------------------------------------------------------------


def test_alpaca_becomes_a_conversation_where_there_is_a_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    records = [
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"instruction": "Greet", "input": "", "output": "Hi"},
        {"instruction": "Greet", "output": "Hi", "system": "Be kind."},
        {"instruction": "", "input": "1 2", "output": "3"},
    ]
    rows, _ = rows_of(tmp_path, records, tokenizer)
    assert [shown(row, tokenizer) for row in rows] == [
        ("<|im_start|>user\nAdd\n\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n", ["3<|im_end|>"]),
        ("<|im_start|>user\nGreet<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n", ["Hi<|im_end|>"]),
        (
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nGreet<|im_end|>\n"
            "<|im_start|>assistant\nHi<|im_end|>\n",
            ["Hi<|im_end|>"],
        ),
        ("<|im_start|>user\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n", ["3<|im_end|>"]),
    ]


def test_alpaca_becomes_headed_text_where_there_is_none(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    records = [
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"instruction": "Greet", "output": "Hi"},
    ]
    rows, iterator = rows_of(tmp_path, records, tokenizer)
    assert [shown(row, tokenizer) for row in rows] == [
        ("### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n3</s>", ["3</s>"]),
        ("### Instruction:\nGreet\n\n### Response:\nHi</s>", ["Hi</s>"]),
    ]
    assert any("no chat template" in line for line in iterator.describe())


def test_sharegpt_roles_are_translated(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    turns = [("system", "S"), ("human", "U"), ("gpt", "A"), ("tool", "T"), ("gpt", "B")]
    record = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    [row], _ = rows_of(tmp_path, [record], tokenizer)
    roles = ["system\nS", "user\nU", "assistant\nA", "tool\nT", "assistant\nB"]
    assert shown(row, tokenizer) == (
        "".join(f"<|im_start|>{part}<|im_end|>\n" for part in roles),
        ["A<|im_end|>", "B<|im_end|>"],
    )


def test_ready_tokens(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    records: list[dict[str, Any]] = [
        {"input_ids": [7, 8, 9], "labels": [-100, -100, 9]},
        {"input_ids": [7, 8, 9], "loss_mask": [1, 1, 0]},
        {"input_ids": [0, 0, 7, 8], "labels": [-100, -100, 7, 8], "attention_mask": [0, 0, 1, 1]},
    ]
    rows, _ = rows_of(tmp_path, records, tokenizer)
    assert [(row.input_ids.tolist(), row.loss_mask.tolist()) for row in rows] == [
        ([7, 8, 9], [False, False, True]),
        ([7, 8, 9], [False, True, False]),
        ([7, 8], [False, True]),
    ]


def test_ready_tokens_without_mask_are_documents(tmp_path: Path) -> None:
    rows, _ = rows_of(tmp_path, [{"input_ids": [7, 8, 9, 10, 11]}], byte_tokenizer(), max_length=3)
    assert [row.input_ids.tolist() for row in rows] == [[7, 8, 9], [9, 10, 11]]
    assert [row.loss_mask.tolist() for row in rows] == [[False, True, True]] * 2


def test_tools_and_tool_calls(tmp_path: Path) -> None:
    """Tool descriptions come as objects, as JSON strings or as one JSON string; a call needs no content."""
    template = (
        "{{ tools[0]['name'] }}:" + CHATML[: CHATML.index("m['content'] +")] + "m['content'] + "
        "(m['tool_calls'][0]['name'] if m['tool_calls'] else '') +"
        + CHATML[CHATML.index("m['content'] +") + 14 :]
    )
    tokenizer = byte_tokenizer(template)
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    for tools in ([{"name": "T"}], ['{"name": "T"}'], '[{"name": "T"}]'):
        [row], _ = rows_of(tmp_path, [{"messages": [USER, call], "tools": tools}], tokenizer)
        assert shown(row, tokenizer) == (
            "T:<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nclock<|im_end|>\n",
            ["clock<|im_end|>"],
        )


def test_content_in_text_parts_and_null_fields(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    parts = [{"type": "text", "text": "Yo"}, {"type": "text", "text": "!"}]
    record = {
        "messages": [{**USER, "name": None}, {"role": "assistant", "content": parts, "tool_calls": None}]
    }
    [row], _ = rows_of(tmp_path, [record], tokenizer)
    assert targets_of(row, tokenizer) == ["Yo!<|im_end|>"]


def test_a_tokenizer_that_cannot_locate_its_tokens_is_refused_for_masks(tmp_path: Path) -> None:
    """Without offsets the boundary would be a guess; plain text needs none."""
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    rows, _ = rows_of(tmp_path, [{"text": "abc"}], tokenizer)
    assert len(rows[0]) == 4
    with pytest.raises(ConfigError, match=r"needs a fast tokenizer .*got ByT5Tokenizer"):
        rows_of(tmp_path, [{"prompt": "ab", "completion": "c"}], tokenizer)
