"""Rows and masks worked out by hand, through files as a user has them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import rows_of
from corpus_tokenizers import CHATML, byte_tokenizer, merging_tokenizer, targets_of, text_of
from hypothesis import given
from hypothesis import strategies as st

import cache_builder.rows.encoding
import cache_builder.rows.tokenise
from cache_builder.corpus.corpus import CorpusConfig, open_corpus
from cache_builder.corpus.readers import Record
from cache_builder.rows.tokenise import batches, split_document, tokenise
from formats.disk.token_row import TokenRow
from formats.errors import ConfigError, CorpusError


def shown(row: TokenRow, tokenizer: Any) -> tuple[str, list[str]]:
    return text_of(row, tokenizer), targets_of(row, tokenizer)


# --- text ---------------------------------------------------------------------------------------------------


def test_text_has_loss_everywhere_but_on_its_first_token(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    [row], _ = rows_of(tmp_path, [{"text": "abc"}], tokenizer)
    assert shown(row, tokenizer) == ("abc</s>", ["bc</s>"])
    assert row.loss_mask.tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    ("options", "config", "text", "expected"),
    [
        ({}, {}, "ab", "ab</s>"),
        ({}, {}, "ab</s>", "ab</s>"),  # already there
        ({}, {"append_eos": False}, "ab", "ab"),
        ({"has_eos": False}, {}, "ab", "ab"),
        ({"adds_bos": True}, {}, "ab", "<s>ab</s>"),
        ({"adds_bos": True, "adds_eos": True}, {}, "ab", "<s>ab</s>"),  # the tokenizer's own is enough
        ({"adds_eos": True}, {"append_eos": False}, "ab", "ab</s>"),
    ],
)
def test_end_of_sequence_stands_once(
    tmp_path: Path, options: dict[str, bool], config: dict[str, bool], text: str, expected: str
) -> None:
    tokenizer = merging_tokenizer([], **options)
    [row], _ = rows_of(tmp_path, [{"text": text}], tokenizer, **config)
    assert text_of(row, tokenizer) == expected


def test_long_text_is_split_with_one_token_of_context(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    rows, iterator = rows_of(tmp_path, [{"text": "abcdefghi"}], tokenizer, max_length=4)
    assert [shown(row, tokenizer) for row in rows] == [
        ("abcd", ["bcd"]),
        ("defg", ["efg"]),
        ("ghi</s>", ["hi</s>"]),
    ]
    stats = iterator.stats
    assert (stats.num_split, stats.num_rows, stats.num_tokens, stats.num_targets) == (1, 3, 12, 9)
    assert stats.num_truncated == 0


def test_every_row_of_a_split_document_starts_with_bos(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(adds_bos=True)
    rows, _ = rows_of(tmp_path, [{"text": "abcdefg"}], tokenizer, max_length=4)
    assert [shown(row, tokenizer) for row in rows] == [
        ("<s>abc", ["abc"]),
        ("<s>cde", ["de"]),
        ("<s>efg", ["fg"]),
        ("<s>g</s>", ["</s>"]),
    ]


@given(
    length=st.integers(2, 60),
    max_length=st.integers(4, 20),
    prefix=st.sampled_from([(), (1,), (1, 2)]),
    starts_with_prefix=st.booleans(),
    seed=st.integers(0, 10),
)
def test_splitting_makes_every_target_a_target_exactly_once(
    length: int, max_length: int, prefix: tuple[int, ...], starts_with_prefix: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    ids = np.arange(100, 100 + length)  # all different: a token is its own position
    if starts_with_prefix:
        ids[: len(prefix)] = prefix[:length]
    mask = generator.random(length) < 0.7
    mask[0] = False
    rows = list(split_document(ids, mask, max_length, prefix))
    targets = [int(token) for row in rows for token in row.input_ids[row.loss_mask]]
    assert targets == ids[mask].tolist()
    assert all(len(row) <= max_length for row in rows)
    for row in rows:  # each target is predicted from the token that precedes it in the document
        for index in np.flatnonzero(row.loss_mask):
            place = int(np.flatnonzero(ids == row.input_ids[index])[0])
            assert row.input_ids[index - 1] == ids[place - 1]


def test_a_very_long_document_is_tokenised_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_builder.rows.encoding, "PIECE_CHARS", 10)
    tokenizer = byte_tokenizer(adds_bos=True)
    text = "one two\nthree\nfour\n" + "x" * 25 + "\nend"
    rows, _ = rows_of(tmp_path, [{"text": "short"}, {"text": text}, {"text": "last"}], tokenizer)
    assert [text_of(row, tokenizer) for row in rows] == ["<s>short</s>", f"<s>{text}</s>", "<s>last</s>"]


@pytest.mark.parametrize("adds_blank", ["always", "first", "normalizer", "never"])
def test_pieces_of_a_document_bring_no_blanks_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adds_blank: str
) -> None:
    """SentencePiece's tokenizers begin every text with a blank; in the middle of a document it would be trained."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [*map(chr, range(33, 127)), "\n", "\u2581"]
    pieces = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    if adds_blank == "normalizer":
        pieces.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=adds_blank)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces)
    monkeypatch.setattr(cache_builder.rows.encoding, "PIECE_CHARS", 10)
    text = "first line\nsecond\n\n  third line of it without a break\nend\n"
    [row], _ = rows_of(tmp_path, [{"text": text}], tokenizer)
    assert row.input_ids.tolist() == tokenizer(text)["input_ids"]


def test_trained_tokenizer_gives_its_own_ids(tmp_path: Path, tiny_tokenizer: Any) -> None:
    text = "def greet(name):\n    return f'hello {name} 漢字 é'\n" * 5
    [row], _ = rows_of(tmp_path, [{"text": text}], tiny_tokenizer)
    assert row.input_ids.tolist() == [*tiny_tokenizer(text)["input_ids"], tiny_tokenizer.eos_token_id]


# --- prompt + completion ------------------------------------------------------------------------------------


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


# --- the stream ---------------------------------------------------------------------------------------------


def test_batch_size_never_changes_the_rows(tmp_path: Path, tiny_tokenizer: Any) -> None:
    records = [{"prompt": f"{i} plus {i} is ", "completion": str(2 * i)} for i in range(23)]
    reference, _ = rows_of(tmp_path, records, tiny_tokenizer)
    for batch_size in (1, 7, 23):
        rows, _ = rows_of(tmp_path, records, tiny_tokenizer, batch_size=batch_size)
        assert [row.key for row in rows] == [row.key for row in reference]


def test_long_records_make_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_builder.rows.tokenise, "MAX_BATCH_CHARS", 10)
    lengths = [1, 1, 1, 1, 9, 3, 30, 2, 2]
    records = [Record({"text": "x" * length, "id": 1}, "data", 1) for length in lengths]
    batched = [[len(record.values["text"]) for record in batch] for batch in batches(records, 3)]
    assert batched == [[1, 1, 1], [1, 9], [3, 30], [2, 2]]


def test_records_are_read_as_rows_are_asked_for(tmp_path: Path) -> None:
    """A corpus larger than memory: an error on line 100 does not hinder the rows before it."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "abc"}\n' * 99 + "{broken\n")
    iterator = tokenise(open_corpus(CorpusConfig(source=str(path), batch_size=10)), byte_tokenizer())
    assert [len(next(iterator)) for _ in range(90)] == [4] * 90
    with pytest.raises(CorpusError, match="line 100"):
        list(iterator)


def test_short_records_are_skipped_and_counted(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(has_eos=False)
    rows, iterator = rows_of(tmp_path, [{"text": ""}, {"text": "a"}, {"text": "ab"}], tokenizer)
    assert [text_of(row, tokenizer) for row in rows] == ["ab"]
    stats = iterator.stats
    assert (stats.num_records, stats.num_too_short, stats.num_empty) == (3, 1, 1)
    assert stats.notes() == [
        "1 record skipped: fewer than two tokens",
        "1 record skipped: empty text or answer",
    ]


@pytest.mark.parametrize("adds_eos", [False, True])
def test_an_empty_document_is_no_row_of_special_tokens(tmp_path: Path, adds_eos: bool) -> None:
    tokenizer = merging_tokenizer([], adds_bos=True, adds_eos=adds_eos)
    rows, iterator = rows_of(tmp_path, [{"text": ""}, {"text": "a"}], tokenizer)
    assert [text_of(row, tokenizer) for row in rows] == ["<s>a</s>"]
    assert iterator.stats.num_empty == 1


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CorpusError) as caught:
        rows_of(tmp_path, [{"text": "a"}, {"text": ""}], byte_tokenizer(has_eos=False))
    assert str(caught.value) == (
        "the corpus must give at least one row of two tokens with a loss, got none from 2 records "
        "(1 record skipped: fewer than two tokens; 1 record skipped: empty text or answer)"
    )


def test_a_chat_without_answers_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        CorpusError, match=r"got none from 1 record \(1 record skipped: no token carries loss\)"
    ):
        rows_of(tmp_path, [{"messages": [{"role": "user", "content": "Hi"}]}], byte_tokenizer(CHATML))


def test_max_length_must_leave_room_for_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        rows_of(tmp_path, [{"text": "abc"}], byte_tokenizer(adds_bos=True), max_length=2)
    assert str(caught.value) == (
        "max_length must be at least 3 (the tokenizer's leading tokens and two more), got 2"
    )


def test_description_says_how_records_become_rows(tmp_path: Path) -> None:
    _, text = rows_of(tmp_path, [{"text": "abc", "id": 1}], byte_tokenizer(), max_length=64)
    source = tmp_path / "data.jsonl"
    assert text.describe() == [
        f"corpus: {source}",
        "format: text (columns text), loss on every token but the first",
        "columns not read: id",
        "end: </s> appended",
        "longer than 64 tokens: split",
    ]
    for tokenizer, line in (
        (merging_tokenizer([], adds_eos=True), "end: the tokenizer's own appended"),
        (byte_tokenizer(has_eos=False), "end: nothing appended"),
    ):
        assert line in rows_of(tmp_path, [{"text": "abc"}], tokenizer)[1].describe()
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    _, chat = rows_of(tmp_path, [{"messages": messages}], byte_tokenizer(CHATML), max_length=64)
    assert chat.describe()[1:] == [
        "format: messages (columns messages), loss on assistant turns",
        "chat template: assistant turns found by incremental rendering",
        "longer than 64 tokens: truncated",
    ]


# --- bad records --------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "Hi"}
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
