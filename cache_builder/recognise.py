"""From the columns of the first record to a layout: what the records are, and which tokens carry the loss.

The first layout of `LAYOUTS` whose columns are all there wins, richest first: a data set with `messages` and a
derived `text` column is a chat data set. `--text-column` overrules. Optional columns (`input`, `system`, `tools`,
`labels`) are looked up in every record.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from formats.errors import CorpusError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A recognised way of storing training examples."""

    name: str
    """Announced name."""
    columns: tuple[str, ...]
    """The columns that are read, required ones first."""
    loss: str
    """Which tokens carry cross-entropy, as a phrase."""


def _is_list(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip()[:1] == "[")


def _is_sharegpt(values: Mapping[str, Any]) -> bool:
    turns = values["conversations"]
    if isinstance(turns, str):
        return '"from"' in turns
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]


# Name, required columns, optional columns, condition on the first record's values, phrase for the loss, example.
_Condition = Callable[[Mapping[str, Any]], bool]
_LAYOUTS: tuple[tuple[str, tuple[str, ...], tuple[str, ...], _Condition | None, str], ...] = (
    (
        "input_ids",
        ("input_ids",),
        ("labels", "loss_mask", "attention_mask"),
        None,
        "as labels or loss_mask say",
    ),
    ("messages", ("messages",), ("tools",), None, "assistant turns"),
    ("ShareGPT", ("conversations",), ("system", "tools"), _is_sharegpt, "assistant turns"),
    ("messages", ("conversations",), ("tools",), None, "assistant turns"),
    (
        "prompt + completion (chat)",
        ("prompt", "completion"),
        ("tools",),
        lambda values: _is_list(values["prompt"]) and _is_list(values["completion"]),
        "assistant turns of the completion",
    ),
    ("prompt + completion", ("prompt", "completion"), (), None, "completion"),
    ("Alpaca", ("instruction", "output"), ("input", "system"), None, "output"),
    ("text", ("text",), (), None, "every token but the first"),
)
RECOGNISED = "text; prompt, completion; messages; conversations; instruction, output [, input]; input_ids [, labels | loss_mask]"


def recognise(values: Mapping[str, Any], text_column: str | None = None) -> Layout:
    """The layout of a corpus whose first record is `values`.

    Raises:
        CorpusError: no layout fits, or `text_column` is not a column; the message lists the columns.
    """
    found = ", ".join(values) or "none"
    if text_column is not None:
        if text_column not in values:
            raise CorpusError(
                f"--text-column must name a column of the corpus ({found}), got {text_column!r}"
            )
        return Layout(name="text", columns=(text_column,), loss="every token but the first")
    for name, required, optional, condition, loss in _LAYOUTS:
        if all(column in values for column in required) and (condition is None or condition(values)):
            present = tuple(column for column in optional if column in values)
            if name == "input_ids" and not set(present) & {"labels", "loss_mask"}:
                loss = "every token but the first"
            return Layout(name=name, columns=required + present, loss=loss)
    raise CorpusError(
        f"the corpus must have the columns of a known layout ({RECOGNISED}), got columns: {found}; "
        "rename them, or pass --text-column NAME"
    )
