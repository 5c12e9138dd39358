"""Columns to layouts, and what is said when there is none."""

import json
from typing import Any

import pytest

from cache_builder.corpus.layouts import recognise
from formats.errors import CorpusError

TURN = {"role": "user", "content": "Hi"}
CASES: list[tuple[dict[str, Any], str, str, bool]] = [
    ({"text": "x"}, "text", "every token but the first", True),
    ({"text": None}, "text", "every token but the first", True),
    ({"prompt": "x", "completion": "y"}, "prompt + completion", "completion", False),
    ({"prompt": "[1] is a citation", "completion": "[2] too"}, "prompt + completion", "completion", False),
    (
        {"prompt": [TURN], "completion": [TURN]},
        "prompt + completion (chat)",
        "assistant turns of the completion",
        False,
    ),
    (
        {"prompt": '[\n  {\n    "role": "user"', "completion": '[ {"role": "assistant"'},
        "prompt + completion (chat)",
        "assistant turns of the completion",
        False,
    ),
    ({"messages": [TURN]}, "messages", "assistant turns", False),
    ({"conversations": [TURN]}, "messages", "assistant turns", False),
    ({"conversations": [{"from": "human", "value": "x"}]}, "ShareGPT", "assistant turns", False),
    ({"conversations": '[{"from": "human", "value": "x"}]'}, "ShareGPT", "assistant turns", False),
    ({"instruction": "x", "output": "y"}, "Alpaca", "output", False),
    ({"instruction": "x", "input": "", "output": "y"}, "Alpaca", "output", False),
    ({"input_ids": [1, 2]}, "input_ids", "every token but the first", True),
    ({"input_ids": [1, 2], "labels": [1, 2]}, "input_ids", "as labels and masks say", False),
    ({"input_ids": [1, 2], "loss_mask": [0, 1]}, "input_ids", "as labels and masks say", False),
    # several fit: the richest wins
    ({"text": "x", "messages": [TURN]}, "messages", "assistant turns", False),
    ({"text": "x", "instruction": "x", "input": "", "output": "y"}, "Alpaca", "output", False),
    ({"prompt": "x", "messages": [TURN]}, "messages", "assistant turns", False),
]


@pytest.mark.parametrize(("values", "name", "loss", "splits"), CASES)
def test_layouts(values: dict[str, Any], name: str, loss: str, splits: bool) -> None:
    layout = recognise(values)
    assert (layout.name, layout.loss, layout.splits) == (name, loss, splits)
    assert set(layout.required) <= set(values)


def test_a_null_column_does_not_decide() -> None:
    turns = [{"from": "human", "value": "a"}]
    assert recognise({"messages": None, "conversations": turns}).name == "ShareGPT"
    assert recognise({"conversations": None, "text": "a"}).name == "text"
    assert recognise({"text": None, "id": 3}).name == "text"


def test_sharegpt_is_told_by_its_first_turn() -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "find", "arguments": {"from": "Lima"}}]}
    turns = [{"role": "user", "content": "a"}, call]
    for value in (turns, json.dumps(turns), [json.dumps(turn) for turn in turns]):
        assert recognise({"conversations": value}).name == "messages"
    shared = [{"from": "human", "value": "a"}]
    for value in (shared, json.dumps(shared), [json.dumps(turn) for turn in shared]):
        assert recognise({"conversations": value}).name == "ShareGPT"


def test_text_column_overrules() -> None:
    layout = recognise({"messages": [TURN], "body": "x"}, text_column="body")
    assert (layout.name, layout.required) == ("text", ("body",))


def test_an_unknown_layout_lists_columns_and_layouts() -> None:
    with pytest.raises(CorpusError) as caught:
        recognise({"question": "x", "answer": "y"})
    assert str(caught.value) == (
        "the corpus must have the columns of a known layout (text; prompt + completion; messages; "
        "conversations; "
        "instruction + output (+ input); input_ids (+ labels or loss_mask)), got columns: question, answer; "
        "rename them, or pass --text-column NAME"
    )


def test_half_a_layout_is_none() -> None:
    with pytest.raises(CorpusError, match=r"known layout .* got columns: prompt, label;"):
        recognise({"prompt": "x", "label": True})


@pytest.mark.parametrize(
    "columns", [("prompt", "chosen", "rejected"), ("input", "preferred_output"), ("prompt", "completions")]
)
def test_a_layout_of_other_methods_is_named(columns: tuple[str, ...]) -> None:
    with pytest.raises(CorpusError) as caught:
        recognise(dict.fromkeys(columns, "x"))
    assert str(caught.value).startswith("a record holds one answer")
    assert f"got columns: {', '.join(columns)}; keep the answer to train on" in str(caught.value)


def test_a_missing_text_column_lists_the_columns() -> None:
    with pytest.raises(CorpusError) as caught:
        recognise({"text": "x", "id": 1}, text_column="body")
    assert str(caught.value) == "text_column must be a column of the corpus, got body; columns: text, id"


@pytest.mark.parametrize(
    ("column", "name"),
    [([0, 0, 1], "loss_mask"), ("[false, true, true]", "loss_mask"), ([-100, -100, 7], "labels")],
)
def test_a_mask_by_an_unknown_name_is_refused(column: Any, name: str) -> None:
    """All tokens would be trained otherwise."""
    for beside in ({}, {"labels": [-100, 6, 7]}):
        with pytest.raises(CorpusError) as caught:
            recognise({"input_ids": [5, 6, 7], **beside, "response_mask": column})
        assert str(caught.value) == (
            "beside input_ids targets are chosen by labels, loss_mask, assistant_masks, assistant_mask, "
            "completion_mask, loss_weights, token_weights, got a column response_mask that looks like one; "
            f"rename it to {name}, or drop the column"
        )


def test_other_lists_beside_input_ids_are_no_masks() -> None:
    others = {
        "source": [0, 1],
        "words": ["a", "b", "c"],
        "scores": [3, 4, 5],
        "special_tokens_mask": [1, 0, 0],
    }
    assert recognise({"input_ids": [5, 6, 7], **others}).splits
    assert recognise({"text": "x", "flags": [0, 1, 1]}).name == "text"
