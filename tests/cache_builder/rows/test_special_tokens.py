"""Special tokens that the text brings along stand once, and answers of nothing else are no answers."""

from pathlib import Path
from typing import Any

import pytest
from corpora import ANSWER, USER, rows_of
from corpus_tokenizers import CHATML, byte_tokenizer, merging_tokenizer, targets_of, text_of

from cache_builder.rows.encoding import SpecialTokens

BOTH = {"adds_bos": True, "adds_eos": True}


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        (BOTH, "<s>ab</s>", "<s>ab</s>"),
        (BOTH, "<s>ab", "<s>ab</s>"),
        (BOTH, "ab</s>", "<s>ab</s>"),
        (BOTH, "<s>ab</s>\n", "<s>ab</s>\n"),
        (BOTH, " \n<s>ab</s> \n", " \n<s>ab</s> \n"),
        (BOTH, "a<s>b</s>c", "<s>a<s>b</s>c</s>"),  # within, they are the data's own
        ({"adds_bos": True}, "<s>[INST] a [/INST] b </s>", "<s>[INST] a [/INST] b </s>"),
        ({"adds_bos": True}, "<s>ab</s>\n", "<s>ab</s>\n"),
        ({}, "ab</s>\n", "ab</s>\n"),
        ({}, "<|im_start|>user\na<|im_end|>\n", "<|im_start|>user\na<|im_end|>\n</s>"),  # another token's end
        ({"adds_eos": True, "has_eos": False}, "ab</s>", "ab</s>"),
    ],
)
def test_text_that_went_through_the_template(
    tmp_path: Path, options: dict[str, bool], text: str, expected: str
) -> None:
    tokenizer = merging_tokenizer([], **options)
    [row], _ = rows_of(tmp_path, [{"text": text}], tokenizer)
    assert text_of(row, tokenizer) == expected
    assert row.loss_mask.tolist() == [False] + [True] * (len(row) - 1)


@pytest.mark.parametrize("options", [{}, {"adds_bos": True}, {"adds_eos": True}, BOTH])
def test_prompt_and_completion_that_went_through_the_template(
    tmp_path: Path, options: dict[str, bool]
) -> None:
    tokenizer = merging_tokenizer([], **options)
    record = {"prompt": "<s>[INST] a [/INST]", "completion": " b </s>"}
    [row], _ = rows_of(tmp_path, [record], tokenizer)
    assert text_of(row, tokenizer) == "<s>[INST] a [/INST] b </s>"
    assert targets_of(row, tokenizer) == [" b </s>"]


def test_a_row_of_a_split_text_starts_with_the_texts_own_bos(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(adds_bos=True)
    rows, _ = rows_of(tmp_path, [{"text": "<s>abcde</s>"}], tokenizer, max_length=4)
    assert [text_of(row, tokenizer) for row in rows] == ["<s>abc", "<s>cde", "<s>e</s>"]


def test_a_prefix_of_two_tokens_is_completed() -> None:
    special = SpecialTokens((3, 1), (4, 2), None, {1: "<s>", 2: "</s>", 3: "[g]", 4: "[e]"})
    assert special.around("ab", append_eos=True) == ((3, 1), (4, 2))
    assert special.around("[g]<s>ab[e]</s>", append_eos=True) == ((), ())
    assert special.around("<s>ab[e]", append_eos=True) == ((3,), (2,))


def test_chat_gets_none_of_the_tokenizers_own(tmp_path: Path) -> None:
    tokenizer = merging_tokenizer([], CHATML, **BOTH)
    [row], _ = rows_of(tmp_path, [{"messages": [USER, ANSWER]}], tokenizer)
    assert text_of(row, tokenizer) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"


BLANK = ["", " ", " \n\t", "</s>", " </s>\n"]


@pytest.mark.parametrize("blank", BLANK)
@pytest.mark.parametrize("options", [{}, {"adds_bos": True}, BOTH])
def test_an_empty_answer_is_skipped_and_counted(tmp_path: Path, blank: str, options: dict[str, bool]) -> None:
    for good, bad in (
        ({"prompt": "ab", "completion": "cd"}, {"prompt": "ab", "completion": blank}),
        ({"instruction": "ab", "output": "cd"}, {"instruction": "ab", "output": blank}),
        ({"text": "cd"}, {"text": blank}),
    ):
        rows, iterator = rows_of(tmp_path, [bad, good], merging_tokenizer([], **options))
        assert len(rows) == 1
        assert iterator.stats.notes() == ["1 record skipped: empty text or answer"]
        assert iterator.stats.num_records == 2


@pytest.mark.parametrize("blank", ["", " \n"])
@pytest.mark.parametrize("layout", ["messages", "pair", "alpaca", "sharegpt"])
def test_a_conversation_of_empty_answers_is_skipped(tmp_path: Path, blank: str, layout: str) -> None:
    def record(answer: str) -> dict[str, Any]:
        turn = {"role": "assistant", "content": answer}
        return {
            "messages": {"messages": [USER, turn]},
            "pair": {"prompt": [USER, ANSWER, USER], "completion": [turn]},
            "alpaca": {"instruction": "Hi", "output": answer},
            "sharegpt": {
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": answer}]
            },
        }[layout]

    tokenizer = byte_tokenizer(CHATML)
    rows, iterator = rows_of(tmp_path, [record(blank), record("Yo")], tokenizer)
    assert [targets_of(row, tokenizer) for row in rows] == [["Yo<|im_end|>"]]
    assert iterator.stats.notes() == ["1 record skipped: empty text or answer"]


def test_one_empty_turn_beside_others_is_context(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    silent = {"role": "assistant", "content": " "}
    [row], iterator = rows_of(tmp_path, [{"messages": [USER, silent, USER, ANSWER]}], tokenizer)
    assert text_of(row, tokenizer) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n <|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
    )
    assert targets_of(row, tokenizer) == ["Yo<|im_end|>"]
    assert iterator.stats.notes() == ["1 empty assistant turn without loss"]


def test_an_answer_that_the_data_excepts_and_an_empty_one(tmp_path: Path) -> None:
    """Nothing is left to train; an empty answer is among the reasons."""
    tokenizer = byte_tokenizer(CHATML)
    records = [
        {"messages": [USER, {**ANSWER, "weight": 0}, USER, {"role": "assistant", "content": ""}]},
        {"messages": [USER, ANSWER]},
    ]
    rows, iterator = rows_of(tmp_path, records, tokenizer)
    assert len(rows) == 1
    assert iterator.stats.notes() == ["1 record skipped: empty text or answer"]
