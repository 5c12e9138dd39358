"""Batches of real text for the fidelity report, from the text that every Python installation carries."""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))


WINDOWS = 3


def text_batches(
    tokenizer: Any, split: str, num_batches: int, *, rows: int, length: int
) -> list[torch.Tensor]:
    """[rows, length] batches of code, at most `WINDOWS` rows of a document.

    Raises:
        ValueError: the split has too little text.
    """
    from stdlib_text import documents

    found: list[list[int]] = []
    for document in documents("code", split, max_bytes=4_000_000):
        ids = tokenizer(document.text[: 40 * length])["input_ids"]
        starts = range(0, min(len(ids) // length, WINDOWS) * length, length)
        found += [ids[start : start + length] for start in starts]
        if len(found) >= rows * num_batches:
            wanted = torch.tensor(found[: rows * num_batches])
            return list(wanted.reshape(num_batches, rows, length).unbind(0))
    raise ValueError(f"{num_batches} batches need {rows * num_batches} rows of text, got {len(found)}")
