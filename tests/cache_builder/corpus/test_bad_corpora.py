"""A corpus that cannot be read is one clear line."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_files import TEXTS, refusal, texts, write

from cache_builder.corpus.corpus import CorpusConfig, open_corpus
from formats.errors import ConfigError, CorpusError

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
        "a record must be flat JSON, got deep nesting in {path}, line 2; mend or drop it",
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
