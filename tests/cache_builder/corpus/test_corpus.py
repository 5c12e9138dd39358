"""Opening every kind of corpus: files, directories, a part of them, and what they are known by."""

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from corpus_files import RECORDS, TEXTS, lines_of, refusal, texts, write

from cache_builder.corpus.corpus import CorpusConfig, open_corpus

# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.parquet", "a.arrow", "A.JSONL"]
)
def test_every_file_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name.lower()).rename(tmp_path / name)
    corpus = open_corpus(CorpusConfig(source=str(path)))
    assert (corpus.format, corpus.columns) == ("text", ("text", "id"))
    for _ in range(2):  # iterating starts over
        assert [record.values["text"] for record in corpus] == TEXTS


def test_arrow_streams_as_datasets_writes_them(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(RECORDS)
    path = tmp_path / "data.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    assert texts(path) == TEXTS


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    for name, content in (("b.txt", "second\n\nfile"), ("a.txt", "\ufefffirst\r\n")):
        (tmp_path / name).write_bytes(content.encode())
    assert texts(tmp_path) == ["first\r\n", "second\n\nfile"]
    assert texts(tmp_path / "b.txt") == ["second\n\nfile"]


def test_several_compressed_frames_in_one_file(tmp_path: Path) -> None:
    """As `cat a.zst b.zst` makes them; also one large frame that arrives in many pieces."""
    first, second = lines_of(RECORDS[:3]).encode(), lines_of(RECORDS[3:]).encode()
    for name, compress in (("a.jsonl.zst", zstandard.compress), ("a.jsonl.gz", gzip.compress)):
        (tmp_path / name).write_bytes(compress(first) + compress(second))
        assert texts(tmp_path / name) == TEXTS
    noise = [{"text": os.urandom(50_000).hex()} for _ in range(10)]
    assert texts(write(tmp_path / "b.jsonl.zst", noise)) == [record["text"] for record in noise]


def test_a_frame_with_a_large_window(tmp_path: Path) -> None:
    """What `zstd --long=30` writes; a decoder refuses more than 128 MiB unless it is told."""
    parameters = zstandard.ZstdCompressionParameters(window_log=30)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(writer.compress(lines_of(RECORDS).encode()) + writer.flush())
    assert texts(tmp_path / "a.jsonl.zst") == TEXTS


def test_json_lines_under_a_json_suffix_with_bom_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(b"\xef\xbb\xbf" + lines_of(RECORDS).replace("\n", "\r\n\n").encode())
    assert texts(path) == TEXTS


def test_csv_keeps_numbers_and_blanks_as_text(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('prompt,completion\n"6, 7",42\nx,\n', encoding="utf-8")
    records = [record.values for record in open_corpus(CorpusConfig(source=str(path)))]
    assert records == [{"prompt": "6, 7", "completion": "42"}, {"prompt": "x", "completion": ""}]


def test_chat_in_a_csv_cell(tmp_path: Path) -> None:
    from corpus_tokenizers import CHATML, byte_tokenizer, targets_of

    from cache_builder.rows.tokenise import tokenise

    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    path = write(tmp_path / "data.csv", [{"messages": json.dumps(turns)}])
    tokenizer = byte_tokenizer(CHATML)
    [row] = tokenise(open_corpus(CorpusConfig(source=str(path))), tokenizer)
    assert targets_of(row, tokenizer) == ["Yo<|im_end|>"]


def test_a_parquet_file_gives_up_only_the_columns_that_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet")
    corpus = open_corpus(CorpusConfig(source=str(path)))
    assert corpus.columns == ("text", "id")
    assert [dict(record.values) for record in corpus] == [{"text": text} for text in TEXTS]


def test_records_know_their_place(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('\n{"text": "a"}\n\n{"text": "b"}\n')
    places = [record.where for record in open_corpus(CorpusConfig(source=str(path)))]
    assert places == ["data.jsonl, line 2", "data.jsonl, line 4"]
    parquet = write(tmp_path / "data.parquet")
    assert [record.where for record in open_corpus(CorpusConfig(source=str(parquet)))][
        -1
    ] == "data.parquet, row 7"


# --- directories and globs ----------------------------------------------------------------------------------


def test_a_directory_is_read_in_the_order_of_its_relative_paths(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/2.jsonl", "a/10.jsonl", ".hidden/x.jsonl", "a/.y.jsonl"):
        write(tmp_path / name, [{"text": name}])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert texts(tmp_path) == ["a/10.jsonl", "a/2.jsonl", "b.jsonl"]


def test_a_glob_is_read_in_order(tmp_path: Path) -> None:
    for name in ("c.jsonl", "a.jsonl", "b.txt", "d/a.jsonl"):
        write(tmp_path / name, [{"text": name}]) if name.endswith("l") else (tmp_path / name).write_text(name)
    assert texts(f"{tmp_path}/*.jsonl") == ["a.jsonl", "c.jsonl"]
    for pattern in ("**", "**/**"):  # the second matches a file once for every way to it
        assert texts(f"{tmp_path}/{pattern}/*.jsonl") == ["a.jsonl", "c.jsonl", "d/a.jsonl"]


def test_files_of_the_asked_split_are_read_and_the_others_held_out(tmp_path: Path) -> None:
    for name in ("train-00000.jsonl", "train-00001.jsonl", "test.jsonl", "dev/part.jsonl"):
        write(tmp_path / name, [{"text": name}])
    assert texts(tmp_path) == ["train-00000.jsonl", "train-00001.jsonl"]
    told = open_corpus(CorpusConfig(source=str(tmp_path))).announcement()
    assert told == f"corpus: 2 files of {tmp_path}, split train"
    assert texts(tmp_path, split="test") == ["test.jsonl"]
    assert texts(tmp_path, split="validation") == ["dev/part.jsonl"]
    assert refusal(tmp_path, split="extra") == (
        f"split must be one of test, train, validation in {tmp_path}, got extra; pass --split NAME or a "
        "glob of the "
        "files to read"
    )


def test_a_directory_that_names_splits_only_in_part_is_not_guessed_at(tmp_path: Path) -> None:
    write(tmp_path / "more.jsonl", [{"text": "more"}])
    write(tmp_path / "test.jsonl", [{"text": "held out"}])
    assert refusal(tmp_path) == (
        f"either all files of a directory name a split or none does, got more.jsonl beside files of test "
        f"in {tmp_path}; "
        "pass --split NAME or a glob of the files to read"
    )
    assert texts(tmp_path, split="test") == ["held out"]
    assert texts(f"{tmp_path}/m*.jsonl") == ["more"]


def test_a_saved_dataset_is_read_without_the_caches_beside_it(tmp_path: Path) -> None:
    import datasets

    saved = datasets.DatasetDict(
        {name: datasets.Dataset.from_list([{"text": name}] * 3) for name in ("train", "test")}
    )
    saved.save_to_disk(tmp_path / "saved")
    data = next((tmp_path / "saved" / "train").glob("*.arrow"))
    shutil.copy(data, data.with_name("cache-0123.arrow"))  # what `map` leaves behind
    assert texts(tmp_path / "saved") == ["train"] * 3
    assert texts(tmp_path / "saved", split="test") == ["test"] * 3


def save_splits(directory: Path, *names: str) -> None:
    import datasets

    splits = {name: datasets.Dataset.from_list([{"text": name}]) for name in names}
    datasets.DatasetDict(splits).save_to_disk(directory)


def test_a_saved_dataset_has_the_splits_that_it_lists(tmp_path: Path) -> None:
    save_splits(tmp_path / "a", "corpus", "heldout")
    assert refusal(tmp_path / "a") == (
        f"split must be one of corpus, heldout in {tmp_path}/a, got train (the default); pass --split NAME or a "
        "glob of the files to read"
    )
    assert texts(tmp_path / "a", split="heldout") == ["heldout"]
    told = open_corpus(CorpusConfig(source=str(tmp_path / "a"), split="corpus")).announcement()
    assert told == f"corpus: {tmp_path}/a, split corpus"
    save_splits(tmp_path / "b", "train_sft", "test_sft", "train_gen")
    assert texts(tmp_path / "b", split="train_gen") == ["train_gen"]
    assert refusal(tmp_path / "b").startswith("split must be one of test_sft, train_gen, train_sft in ")
    save_splits(tmp_path / "c", "training", "dev")
    assert texts(tmp_path / "c") == ["training"]
    assert texts(tmp_path / "c", split="validation") == ["dev"]
    save_splits(tmp_path / "d", "everything")
    assert texts(tmp_path / "d") == ["everything"]


def test_links_below_a_directory_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "c" / "a.jsonl", [{"text": "a"}])
    write(tmp_path / "other" / "b.jsonl", [{"text": "b"}])
    (tmp_path / "c" / "sub").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "circle").symlink_to(tmp_path / "c")
    assert texts(tmp_path / "c") == ["a", "b"]


# --- limit, sample, fingerprint -----------------------------------------------------------------------------


def test_limit_takes_the_first_records(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl")
    assert texts(path, limit=3) == TEXTS[:3]
    assert texts(path, limit=99) == TEXTS


def test_a_seeded_limit_is_a_sample_in_order_and_the_same_each_time(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"text": str(index)} for index in range(1000)])
    first = texts(path, limit=50, seed=1)
    assert first == texts(path, limit=50, seed=1) != texts(path, limit=50, seed=2)
    assert len(set(first)) == 50
    assert [int(text) for text in first] == sorted(int(text) for text in first)
    assert texts(path, limit=2000, seed=1) == [str(index) for index in range(1000)]


def test_a_seeded_sample_is_uniform(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"text": str(index)} for index in range(10)])
    counts = [0] * 10
    for seed in range(400):
        for text in texts(path, limit=3, seed=seed):
            counts[int(text)] += 1
    # binomial(400, 0.3): mean 120, standard deviation 9.2
    assert all(abs(count - 120) < 46 for count in counts), counts


def test_fingerprint_is_of_the_contents_not_of_the_place(tmp_path: Path) -> None:
    def fingerprint(source: Path | str, **options: Any) -> str:
        return open_corpus(CorpusConfig(source=str(source), **options)).fingerprint

    a = write(tmp_path / "one" / "a.jsonl", [{"text": "a"}])
    b = write(tmp_path / "one" / "b.jsonl", [{"text": "b"}])
    reference = fingerprint(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "b.jsonl").rename(tmp_path / "two" / "c.jsonl")
    os.utime(tmp_path / "two" / "a.jsonl", (1, 1))
    assert fingerprint(tmp_path / "two") == reference == fingerprint(f"{tmp_path}/one/*.jsonl", limit=1)
    assert len({reference, fingerprint(a), fingerprint(b)}) == 3
    b.write_text('{"text": "B"}\n')
    assert fingerprint(tmp_path / "one") != reference


def test_description_for_the_identity(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl")
    corpus = open_corpus(CorpusConfig(source=str(path), limit=3))
    assert corpus.describe() == {
        "source": str(path),
        "fingerprint": corpus.fingerprint,
        "format": "text",
        "columns": ["text"],
        "split": None,
        "limit": 3,
        "seed": None,
    }
    json.dumps(corpus.describe())


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Peak of Python's own allocations while 40 MB of records stream by."""
    import tracemalloc

    path = tmp_path / "data.jsonl"
    line = json.dumps({"text": "x" * 10_000}) + "\n"
    with path.open("w") as file:
        for _ in range(4000):
            file.write(line)
    corpus = open_corpus(CorpusConfig(source=str(path)))
    tracemalloc.start()
    try:
        assert sum(1 for _ in corpus) == 4000
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
