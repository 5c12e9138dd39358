"""Data sets of the Hub, with the real `datasets` library and no network: streams, and its offline cache."""

import json
from pathlib import Path

import datasets
import pytest
from corpus_tokenizers import byte_tokenizer, text_of

from cache_builder.corpus.corpus import Corpus, CorpusConfig, open_corpus
from cache_builder.corpus.hub_data_set import HubName, HubSource, parse_hub_name
from cache_builder.rows.tokenise import tokenise
from formats.errors import CorpusError


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("squad", ("squad", None, None)),
        ("owner/name", ("owner/name", None, None)),
        ("owner/name:wikitext-2-raw-v1", ("owner/name", "wikitext-2-raw-v1", None)),
        ("owner/name@refs/pr/1", ("owner/name", None, "refs/pr/1")),
        ("owner/na.me:20220301.en@0123abc", ("owner/na.me", "20220301.en", "0123abc")),
    ],
)
def test_names(source: str, parts: tuple[str, str | None, str | None]) -> None:
    assert parse_hub_name(source) == HubName(*parts)


@pytest.mark.parametrize(
    "source", ["./data", "/data", "a/b/c", "data.jsonl", "owner/data.csv", "a b", "", "~/x"]
)
def test_paths_are_no_names(source: str) -> None:
    assert parse_hub_name(source) is None


def streamed(tmp_path: Path, files: dict[str, str]) -> HubSource:
    """What `HubSource.open` makes online: an iterable data set that has read nothing yet."""
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    dataset = datasets.load_dataset(
        "json", data_files=[str(tmp_path / name) for name in files], split="train", streaming=True
    )
    return HubSource("owner/name", "0" * 64, dataset)


def test_a_stream_is_tokenised_and_can_be_read_again(tmp_path: Path) -> None:
    files = {f"{part}.jsonl": json.dumps({"text": part, "id": 1}) + "\n" for part in ("ab", "cd")}
    corpus = Corpus(CorpusConfig(source="owner/name"), streamed(tmp_path, files))
    tokenizer = byte_tokenizer()
    for _ in range(2):
        assert [text_of(row, tokenizer) for row in tokenise(corpus, tokenizer)] == ["ab</s>", "cd</s>"]
    assert [record.where for record in corpus] == ["owner/name, row 1", "owner/name, row 2"]
    assert corpus.fingerprint == "0" * 64


def test_a_stream_that_breaks_off_says_where(tmp_path: Path) -> None:
    source = streamed(tmp_path, {"a.jsonl": '{"text": "ab"}\n' * 3, "b.jsonl": '{"text": "ab"}\n{broken\n'})
    with pytest.raises(CorpusError) as caught:
        list(Corpus(CorpusConfig(source="owner/name"), source))
    message = str(caught.value)
    assert message.startswith("the data set must be readable to its end, got owner/name after row 3: ")
    assert message.endswith("; run the same command again")
    assert "\n" not in message


@pytest.fixture
def cached_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache that `datasets` leaves behind after a download of owner/name."""
    cache = tmp_path / "cache"
    data = tmp_path / "name"
    data.mkdir()
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("".join(f'{{"text": "{split}{n}"}}\n' for n in range(3)))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    datasets.load_dataset(str(data))
    (cache / "name").rename(cache / "owner___name")
    return cache


def test_offline_a_downloaded_data_set_is_read_from_its_cache(cached_dataset: Path) -> None:
    corpus = open_corpus(CorpusConfig(source="owner/name"))
    assert [record.values["text"] for record in corpus] == ["train0", "train1", "train2"]
    held_out = open_corpus(CorpusConfig(source="owner/name", split="test"))
    assert [record.values["text"] for record in held_out] == ["test0", "test1", "test2"]
    again = open_corpus(CorpusConfig(source="owner/name"))
    assert corpus.fingerprint == again.fingerprint != held_out.fingerprint


def test_offline_an_unknown_split_is_one_line(cached_dataset: Path) -> None:
    with pytest.raises(CorpusError, match=r"got owner/name \(split extra\): ") as caught:
        open_corpus(CorpusConfig(source="owner/name", split="extra"))
    assert "\n" not in str(caught.value)
