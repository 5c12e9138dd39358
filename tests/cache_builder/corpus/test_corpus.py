"""Opening every kind of corpus, and the one clear line when that fails."""

import csv
import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from cache_builder.corpus.corpus import CorpusConfig, open_corpus
from formats.errors import ConfigError, CorpusError

RECORDS = [{"text": f"document {index}\nwith 漢字", "id": index} for index in range(7)]
TEXTS = [record["text"] for record in RECORDS]


def lines_of(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write(path: Path, records: list[dict[str, Any]] = RECORDS) -> Path:
    """Write the records in the format of the suffix, as other programs do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(records)
    match "".join(path.suffixes):
        case ".jsonl":
            path.write_text(lines_of(records), encoding="utf-8")
        case ".json":
            path.write_text(json.dumps(records, indent=1), encoding="utf-8")
        case ".jsonl.gz":
            path.write_bytes(gzip.compress(lines_of(records).encode()))
        case ".jsonl.zst":
            path.write_bytes(zstandard.compress(lines_of(records).encode()))
        case ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(records[0]))
                writer.writeheader()
                writer.writerows(records)
        case ".parquet":
            pq.write_table(table, path, row_group_size=3)
        case ".arrow":
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
                file.write_table(table, max_chunksize=2)
        case other:
            raise AssertionError(other)
    return path


def texts(source: Path | str, **options: Any) -> list[str]:
    return [record.values["text"] for record in open_corpus(CorpusConfig(source=str(source), **options))]


def refusal(source: Path | str, **options: Any) -> str:
    """The message of the error that opening or reading raises."""
    with pytest.raises((CorpusError, ConfigError)) as caught:
        list(open_corpus(CorpusConfig(source=str(source), **options)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    assert texts(f"{tmp_path}/**/*.jsonl") == ["a.jsonl", "c.jsonl", "d/a.jsonl"]


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


# --- bad corpora --------------------------------------------------------------------------------------------

SUFFIXES = ".jsonl, .json, .jsonl.gz, .json.gz, .jsonl.zst, .json.zst, .csv, .parquet, .arrow, .txt"


def test_a_missing_corpus_is_refused(tmp_path: Path) -> None:
    for missing in (f"{tmp_path}/none", "none.jsonl", "./none"):
        assert refusal(missing) == (
            "the corpus must be an existing file or directory, a glob, or a data set name, "
            f"got {missing}, which does not exist"
        )
    assert refusal("x" * 300).startswith("a corpus must be readable, got xxx")
    with pytest.raises(ConfigError, match="got an empty string"):
        CorpusConfig(source="")


def test_a_hub_name_offline_is_one_line() -> None:
    message = refusal("nobody/nothing:small", split="test")
    assert message.startswith(
        "the corpus must be an existing file or directory, a glob, or a data set name, "
        "got nobody/nothing (split test): "
    )
    assert message.endswith("; unset HF_HUB_OFFLINE, or pass a file")


def test_paths_without_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    assert refusal(tmp_path / "notes.md") == f"a corpus file must end in {SUFFIXES}, got {tmp_path}/notes.md"
    assert (
        refusal(tmp_path)
        == f"a corpus directory must hold files that end in {SUFFIXES}, got none in {tmp_path}"
    )
    assert (
        refusal(f"{tmp_path}/*")
        == f"a glob must match files that end in {SUFFIXES}, got none for {tmp_path}/*"
    )


def test_empty_corpora_are_refused(tmp_path: Path) -> None:
    for name, content in (
        ("a.jsonl", ""),
        ("b.json", "[]"),
        ("c.csv", "text,id\n"),
        ("d.txt", ""),
        ("e.jsonl", "\n\n"),
    ):
        path = tmp_path / name
        path.write_text(content)
        assert refusal(path) == f"the corpus must hold at least one record, got one without records: {path}"
    empty = pa.table({"text": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "f.parquet")
    assert "got one without records" in refusal(tmp_path / "f.parquet")
    assert "got 2 files without records" in refusal(f"{tmp_path}/[ae].jsonl")


def test_a_directory_of_several_kinds_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    write(tmp_path / "b.csv")
    assert refusal(tmp_path) == (
        f"the files of a corpus must be of one kind, got csv and json files in {tmp_path}; name one kind "
        "with a glob "
        "such as 'folder/*.jsonl'"
    )


def test_split_is_refused_where_there_are_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    assert refusal(path, split="test") == (
        f"split applies to data set names and directories, got split test for {path}; leave it out"
    )
    assert refusal(tmp_path, split="test") == (
        f"split must be one of train in {tmp_path}, got test; pass --split NAME or a glob of the files to "
        "read"
    )
    assert texts(tmp_path, split="train") == TEXTS


BAD_FILES: list[tuple[str, bytes, str]] = [
    (
        "a.jsonl",
        b'{"text": "a"}\n{"text": b}\n',
        "every line must be one JSON object, got bad JSON in {path}, line 2: Expecting value at character "
        "10; "
        "mend or delete the line",
    ),
    (
        "a.jsonl",
        b'{"text": "a"}\n["b"]\n',
        'every line must be a JSON object such as {{"text": "..."}}, got list in {path}, line 2',
    ),
    (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "\xff"}\n',
        "a corpus must be UTF-8 text, got other bytes in {path}, line 2; convert it",
    ),
    (
        "a.jsonl",
        b'{"text": "a"}\n{"text": ' + b"[" * 200_000 + b"\n",
        "every line must be one flat JSON object, got deep nesting in {path}, line 2",
    ),
    (
        "a.json",
        b'{\n "text": "a"\n}\n',
        "a .json corpus must be an array of records or one record per line, got one object over several "
        "lines in "
        "{path}",
    ),
    (
        "a.json",
        b'[{"text": "a"},\n {"text": }]',
        "a .json corpus must be an array of records or one record per line, got bad JSON in {path}, line 2: "
        "Expecting value; mend the file",
    ),
    (
        "a.json",
        b'[{"text": "a"}, 7]',
        'every record must be a JSON object such as {{"text": "..."}}, got int in {path}, row 2',
    ),
    (
        "a.csv",
        b"text,id\na,1\nb,2,3\n",
        "every row must have the 2 columns of the header, got 3 in {path}, row 2 (line 3); quote cells "
        "with commas or "
        "new lines",
    ),
    (
        "a.csv",
        b'text,id\n"a,1\n',
        "a .csv corpus must be valid CSV, got {path}, line 2: unexpected end of data",
    ),
    (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "b", "text": "c"}\n',
        "an object must have every name once, got 'text' twice in {path}, line 2; keep one of them",
    ),
    (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "b", "id": ' + b"9" * 5000 + b"}\n",
        "a number must be readable, got one of thousands of digits in {path}, line 2; write it as text",
    ),
    (
        "a.json",
        b'[{"text": "a", "meta": {"x": 1, "x": 1}}]',
        "an object must have every name once, got 'x' twice in {path}; keep one of them",
    ),
    (
        "a.csv",
        b"text,id,text\na,1,b\n",
        "every column must have a name of its own, got text twice in {path}; rename or drop one",
    ),
    ("a.csv", b"text\na\n\xff\n", "a corpus must be UTF-8 text, got other bytes in {path}; convert it"),
    ("a.txt", b"\xff\xfe", "a corpus must be UTF-8 text, got other bytes in {path}; convert it"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_malformed_files_name_the_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert refusal(path) == message.format(path=path)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_name_that_two_columns_have_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    if suffix == "parquet":
        pa.parquet.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
    rule = "every column must have a name of its own, got text twice in"
    assert refusal(path) == f"{rule} {path}; rename or drop one"


def test_columns_of_a_csv_file_may_lack_a_name(tmp_path: Path) -> None:
    """Spreadsheets leave some at the end of every row."""
    (tmp_path / "a.csv").write_text("text,,\na,,\n")
    assert texts(tmp_path / "a.csv") == ["a"]


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("a.parquet", "a .parquet corpus must be a Parquet file, got "),
        ("a.arrow", "an .arrow corpus must be an Arrow IPC file, got "),
        ("a.jsonl.gz", "a compressed corpus must be whole, got "),
        ("a.jsonl.zst", "a compressed corpus must be whole, got "),
    ],
)
def test_torn_and_foreign_binary_files_are_refused(tmp_path: Path, name: str, rule: str) -> None:
    whole = write(tmp_path / name).read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-1], b"not such a file at all"):
        (tmp_path / name).write_bytes(content)
        assert refusal(tmp_path / name).startswith(f"{rule}{tmp_path / name}")


def test_a_file_that_vanishes_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    corpus = open_corpus(CorpusConfig(source=str(path)))
    path.unlink()
    with pytest.raises(
        CorpusError, match=f"a corpus must be readable, got {path}: No such file or directory"
    ):
        list(corpus)
    with pytest.raises(CorpusError, match="No such file or directory"):
        _ = corpus.fingerprint


@pytest.mark.parametrize("options", [{}, {"limit": 2}, {"limit": 2, "seed": 0}])
def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path, options: dict[str, int]) -> None:
    """The fingerprint would be that of another text than the rows."""
    first, path = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl")
    corpus = open_corpus(CorpusConfig(source=str(tmp_path), **options))
    _ = corpus.fingerprint
    records = iter(corpus)
    next(records)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(
        CorpusError, match=f"must stay as it is while it is read, got other contents of {path};"
    ):
        list(records)
    assert list(open_corpus(CorpusConfig(source=str(first))))


def test_an_overlong_text_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "big.txt"
    with path.open("wb") as file:
        file.truncate(300 * 2**20)  # sparse
    assert refusal(path) == (
        f"a .txt file is one document of at most 256 MiB, got 300 MiB in {path}; write .jsonl with one "
        '{"text": ...} per document'
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"limit": 0}, "limit must be at least 1, got 0; leave it out to read the whole corpus"),
    ],
)
def test_settings_out_of_range(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CorpusConfig(source="x.jsonl", **options)
    assert str(caught.value) == message
