"""What may stand beside `input_ids`: masks, positions and lengths that agree, or a refusal."""

from pathlib import Path
from typing import Any

import pytest
from corpora import IDS, refusal, rows_of
from corpus_tokenizers import byte_tokenizer

from cache_builder.corpus.fields import names

ONE_SEQUENCE: list[tuple[str, Any, Any]] = [
    *((name, [0, 1, 2], [0, 1, 0]) for name in names("position_ids")),
    *((name, [3], [2, 1]) for name in names("sequence lengths")),
    *((name, [4, 4, 4], [1, 1, 2]) for name in names("segment ids")),
    *((name, [0, 3], [0, 2, 3]) for name in names("cumulative lengths")),
]


@pytest.mark.parametrize(("name", "one", "several"), ONE_SEQUENCE)
def test_packed_sequences_are_refused(tmp_path: Path, name: str, one: Any, several: Any) -> None:
    [row], _ = rows_of(tmp_path, [{**IDS, name: one}], byte_tokenizer())
    assert row.loss_mask.tolist() == [False, True, True]
    assert refusal(tmp_path, IDS, {**IDS, name: several}) == (
        f"a record must be one sequence, got {name} of several (or shifted) ones in data.jsonl, line 2; "
        "write one record per sequence"
    )


def test_positions_are_those_of_the_tokens_without_padding(tmp_path: Path) -> None:
    record = {
        "input_ids": [0, 7, 8, 9],
        "attention_mask": [0, 1, 1, 1],
        "position_ids": [1, 0, 1, 2],
        "seq_lengths": [3],
    }
    [row], _ = rows_of(tmp_path, [record], byte_tokenizer())
    assert row.input_ids.tolist() == [7, 8, 9]


@pytest.mark.parametrize("name", names("masks", "token weights"))
def test_every_mask_is_a_mask(tmp_path: Path, name: str) -> None:
    [row], _ = rows_of(tmp_path, [{**IDS, name: [1, 0, 1]}], byte_tokenizer())
    assert row.loss_mask.tolist() == [False, False, True]
    assert f"got {'others' if 'weights' in name else 'other values'} in data.jsonl, line 2" in refusal(
        tmp_path, IDS, {**IDS, name: [1, 0, 2]}
    )


def test_of_several_masks_all_must_agree(tmp_path: Path) -> None:
    record = {
        "input_ids": [6, 7, 8, 9],
        "labels": [-100, 7, 8, 9],
        "completion_mask": [0, 0, 1, 1],
        "assistant_masks": [1, 1, 0, 1],
    }
    [row], _ = rows_of(tmp_path, [record], byte_tokenizer())
    assert row.loss_mask.tolist() == [False, False, False, True]


def test_targets_in_the_padding_are_refused(tmp_path: Path) -> None:
    """An end token that is padding as well: `transformers` would train the first one, so it is not to be dropped."""
    padded = {"input_ids": [7, 8, 2, 2], "attention_mask": [1, 1, 0, 0]}
    for extra in ({"labels": [7, 8, 2, 2]}, {"loss_mask": [0, 1, 1, 0]}):
        assert refusal(tmp_path, IDS, {**padded, **extra}) == (
            "padding carries no loss, got targets where attention_mask is 0 in data.jsonl, line 2; give them the label "
            "-100 (in a mask 0), or drop the padding"
        )
    [row], _ = rows_of(
        tmp_path, [{**padded, "labels": [7, 8, 2, 2], "loss_mask": [1, 1, 0, 0]}], byte_tokenizer()
    )
    assert (row.input_ids.tolist(), row.loss_mask.tolist()) == ([7, 8], [False, True])


def test_weights_of_several_lengths_are_none(tmp_path: Path) -> None:
    assert "loss_weights must be 3 zeros and ones, got others in data.jsonl, line 2" in refusal(
        tmp_path, IDS, {**IDS, "loss_weights": [[1], [1, 2], [0]]}
    )


def test_a_weight_between_zero_and_one_is_no_mask(tmp_path: Path) -> None:
    assert refusal(tmp_path, IDS, {**IDS, "loss_weights": [0, 0.5, 1]}) == (
        "loss_weights must be 3 zeros and ones, got others in data.jsonl, line 2; a token is trained or it is not"
    )


@pytest.mark.parametrize("name", names("token_type_ids"))
def test_token_types_are_zeros(tmp_path: Path, name: str) -> None:
    [row], _ = rows_of(tmp_path, [{**IDS, name: [0, 0, 0]}], byte_tokenizer())
    assert len(row) == 3
    assert f"{name} must be zeros, got others in data.jsonl, line 2" in refusal(
        tmp_path, IDS, {**IDS, name: [0, 1, 0]}
    )


def test_an_empty_list_of_labels_is_too_short(tmp_path: Path) -> None:
    assert refusal(tmp_path, IDS, {**IDS, "labels": []}) == (
        "labels must be as long as input_ids (3), got 0 in data.jsonl, line 2"
    )
