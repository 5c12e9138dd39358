"""Text becomes rows, worked out by hand, through files as a user has them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import rows_of
from corpus_tokenizers import CHATML, byte_tokenizer, merging_tokenizer, shown, text_of
from hypothesis import given
from hypothesis import strategies as st

import cache_builder.rows.encoding
import cache_builder.rows.tokenise
from cache_builder.corpus.corpus import CorpusConfig, open_corpus
from cache_builder.corpus.readers import Record
from cache_builder.rows.tokenise import batches, split_document, tokenise
from formats.errors import ConfigError, CorpusError

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
