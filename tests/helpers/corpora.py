"""Corpora as a user writes them, and what becomes of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from corpus_tokenizers import CHATML, byte_tokenizer

from cache_builder.corpus.corpus import CorpusConfig, open_corpus
from cache_builder.rows.tokenise import TokenisedRows, tokenise
from formats.disk.token_row import TokenRow
from formats.errors import CorpusError

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Yo"}
IDS = {"input_ids": [7, 8, 9]}


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    """One record per line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def rows_of_file(path: Path, tokenizer: Any, **options: Any) -> tuple[list[TokenRow], TokenisedRows]:
    """All rows of a corpus, and the iterator with its counts."""
    iterator = tokenise(open_corpus(CorpusConfig(source=str(path), **options)), tokenizer)
    return list(iterator), iterator


def rows_of(
    tmp_path: Path, records: list[dict[str, Any]], tokenizer: Any, **options: Any
) -> tuple[list[TokenRow], TokenisedRows]:
    """The same, of records."""
    return rows_of_file(write_jsonl(tmp_path / "data.jsonl", records), tokenizer, **options)


def refusal(tmp_path: Path, good: dict[str, Any], bad: dict[str, Any], template: str = CHATML) -> str:
    """What a corpus of a good record and a bad one is refused with: one line."""
    with pytest.raises(CorpusError) as caught:
        rows_of(tmp_path, [good, bad], byte_tokenizer(template))
    assert "\n" not in str(caught.value)
    return str(caught.value)
