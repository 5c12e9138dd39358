"""Batches of real text for the fidelity report, from the text that every Python installation carries."""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))


def text_batches(
    tokenizer: Any, split: str, num_batches: int, *, rows: int, length: int
) -> list[torch.Tensor]:
    """[rows, length] batches of code, each row from a document of its own.

    Raises:
        ValueError: the split has too few documents of that length.
    """
    from stdlib_text import documents

    found: list[list[int]] = []
    for document in documents("code", split, max_bytes=4_000_000):
        ids = tokenizer(document.text[: 40 * length])["input_ids"]
        if len(ids) >= length:
            found.append(ids[:length])
        if len(found) == rows * num_batches:
            return list(torch.tensor(found).reshape(num_batches, rows, length).unbind(0))
    raise ValueError(
        f"{num_batches} batches need {rows * num_batches} documents of {length} tokens, got {len(found)}"
    )
