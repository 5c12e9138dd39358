"""docs/corpora.md and the example data say what the code does."""

import re
from pathlib import Path
from typing import Any

import pytest
from corpus_tokenizers import CHATML, byte_tokenizer, targets_of

from cache_builder.corpus.corpus import CorpusConfig, open_corpus
from cache_builder.corpus.layouts import LAYOUTS
from cache_builder.corpus.readers import FAMILIES
from cache_builder.rows.tokenise import tokenise

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "corpora.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^### ([^\n]+)\n\n```json\n(.+?)```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_every_layout_is_documented_in_the_order_of_precedence() -> None:
    names = list(dict.fromkeys(layout.name for layout, _ in LAYOUTS))
    assert [name for name, _ in EXAMPLES] == names


def test_every_suffix_is_documented() -> None:
    assert [suffix for suffix in FAMILIES if suffix not in PAGE and not suffix.startswith(".json.")] == []


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_documented_examples_are_recognised_as_documented(tmp_path: Path, name: str, example: str) -> None:
    path = tmp_path / "example.jsonl"
    path.write_text(re.sub(r"29871|529", "99", example), encoding="utf-8")  # ids of the small vocabulary here
    tokenizer = byte_tokenizer(CHATML)
    corpus = open_corpus(CorpusConfig(source=str(path)))
    assert corpus.format == name
    assert len(list(tokenise(corpus, tokenizer))) == len(example.splitlines())


def test_the_example_data_trains_on_the_answers_only() -> None:
    tokenizer: Any = byte_tokenizer(CHATML)
    corpus = open_corpus(CorpusConfig(source=str(ROOT / "examples" / "own-data.jsonl")))
    assert corpus.format == "messages"
    for record, row in zip(corpus, tokenise(corpus, tokenizer), strict=True):
        answers = [m["content"] for m in record.values["messages"] if m["role"] == "assistant"]
        assert targets_of(row, tokenizer) == [f"{answer}<|im_end|>" for answer in answers]
