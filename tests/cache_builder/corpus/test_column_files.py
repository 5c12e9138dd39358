"""The same conversations in every kind of file give the same rows, byte for byte."""

import csv
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import ANSWER, USER, rows_of, rows_of_file, write_jsonl
from corpus_tokenizers import TOOLS, byte_tokenizer, targets_of, text_of

from cache_builder.corpus.column_values import plain, plain_untyped
from cache_builder.corpus.corpus import Corpus, CorpusConfig
from cache_builder.corpus.hub_data_set import HubSource
from cache_builder.rows.tokenise import tokenise
from formats.errors import CorpusError


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, **properties: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


# What column files disturb: other keys in every object, whole numbers beside fractions, text that looks like a date,
# fields that only some messages have, no content, no tools.
RECORDS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "Where?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [call("find", {"harbour": "Callao", "ships": 2})],
            },
            {"role": "tool", "content": "12 S", "name": "find"},
            {"role": "assistant", "content": "At 12 S.", "weight": 1},
        ],
        "tools": [tool("find", harbour="string", ships="number")],
        "system": "Use tools.",
    },
    {
        "messages": [
            {"role": "user", "content": "When?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    call("plan", {"ships": 2.5, "line": "A", "day": "2026-05-01", "deep": {"x": [1, 2]}})
                ],
            },
        ],
        "tools": [tool("plan", line="string"), tool("wait")],
        "system": None,
    },
    {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}],
        "tools": None,
        "system": "",
    },
]
EXPECTED_TARGETS = [
    [
        '<call>{"name": "find", "arguments": {"harbour": "Callao", "ships": 2}}<|im_end|>',
        "At 12 S.<|im_end|>",
    ],
    [
        '<call>{"name": "plan", "arguments": {"ships": 2.5, "line": "A", "day": "2026-05-01", '
        '"deep": {"x": [1, 2]}}}<|im_end|>'
    ],
    ["Yo<|im_end|>"],
]


def as_jsonl(directory: Path, records: list[dict[str, Any]]) -> Path:
    return write_jsonl(directory / "data.jsonl", records)


def as_json(directory: Path, records: list[dict[str, Any]]) -> Path:
    (directory / "data.json").write_text(json.dumps(records, indent=1))
    return directory / "data.json"


def as_csv(directory: Path, records: list[dict[str, Any]]) -> Path:
    with open(directory / "data.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(records[0])
        for record in records:
            cells = (record[name] for name in records[0])
            writer.writerow("" if c is None else c if isinstance(c, str) else json.dumps(c) for c in cells)
    return directory / "data.csv"


def as_parquet(directory: Path, records: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(records), directory / "data.parquet")
    return directory / "data.parquet"


def _write_arrow(path: Path, table: pa.Table, new: Any) -> Path:
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def as_arrow_file(directory: Path, records: list[dict[str, Any]]) -> Path:
    return _write_arrow(directory / "data.arrow", pa.Table.from_pylist(records), pa.ipc.new_file)


def as_arrow_stream(directory: Path, records: list[dict[str, Any]]) -> Path:
    return _write_arrow(directory / "data.arrow", pa.Table.from_pylist(records), pa.ipc.new_stream)


def as_large_parquet(directory: Path, records: list[dict[str, Any]]) -> Path:
    """Types with 64-bit offsets, as Polars and DuckDB write them."""

    def large(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_string(kind):
            return pa.large_string()
        if pa.types.is_list(kind):
            return pa.large_list(large(kind.value_type))
        if pa.types.is_struct(kind):
            return pa.struct(
                [(kind.field(i).name, large(kind.field(i).type)) for i in range(kind.num_fields)]
            )
        return kind

    table = pa.Table.from_pylist(records)
    schema = pa.schema([(field.name, large(field.type)) for field in table.schema])
    pq.write_table(pa.Table.from_pylist(records, schema), directory / "data.parquet")
    return directory / "data.parquet"


def as_saved_data_set(directory: Path, records: list[dict[str, Any]]) -> Path:
    datasets.Dataset.from_list(records).save_to_disk(str(directory / "saved"))
    return directory / "saved"


def as_loaded_then_saved(directory: Path, records: list[dict[str, Any]]) -> Path:
    """The JSON loader keeps what differs between records as JSON text of the type arrow.json."""
    data = datasets.load_dataset(
        "json",
        data_files=str(as_jsonl(directory, records)),
        split="train",
        cache_dir=str(directory / "cache"),
    )
    assert "Json" in str(data.features)
    data.save_to_disk(str(directory / "saved"))
    return directory / "saved"


def as_loaded_then_parquet(directory: Path, records: list[dict[str, Any]]) -> Path:
    data = datasets.load_dataset(
        "json",
        data_files=str(as_jsonl(directory, records)),
        split="train",
        cache_dir=str(directory / "cache"),
    )
    (directory / "parquet").mkdir()
    data.to_parquet(str(directory / "parquet" / "data.parquet"))
    return directory / "parquet" / "data.parquet"


WRITERS = [
    as_jsonl,
    as_json,
    as_csv,
    as_parquet,
    as_arrow_file,
    as_arrow_stream,
    as_large_parquet,
    as_saved_data_set,
    as_loaded_then_saved,
    as_loaded_then_parquet,
]


def content_keys(path: Path, tokenizer: Any) -> list[bytes]:
    return [bytes(row.key) for row in rows_of_file(path, tokenizer)[0]]


@pytest.fixture
def expected_keys(tmp_path: Path) -> list[bytes]:
    """Of the JSON Lines, whose rows are written out above."""
    tokenizer = byte_tokenizer(TOOLS)
    rows, _ = rows_of(tmp_path, RECORDS, tokenizer)
    assert [targets_of(row, tokenizer) for row in rows] == EXPECTED_TARGETS
    assert text_of(rows[1], tokenizer).startswith(
        '<tools>[{"type": "function", "function": {"name": "plan", "parameters": {"type": "object", "properties": '
        '{"line": {"type": "string"}}}}}, {"type": "function", "function": {"name": "wait", "parameters": '
    )
    return [bytes(row.key) for row in rows]


@pytest.mark.parametrize("write", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(
    tmp_path: Path, write: Callable[[Path, list[dict[str, Any]]], Path], expected_keys: list[bytes]
) -> None:
    (tmp_path / "other").mkdir()
    assert content_keys(write(tmp_path / "other", RECORDS), byte_tokenizer(TOOLS)) == expected_keys


@pytest.mark.parametrize("write", [as_jsonl, as_parquet, as_loaded_then_parquet])
@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_data_set_gives_the_same_rows(
    tmp_path: Path, write: Any, streaming: bool, expected_keys: list[bytes]
) -> None:
    (tmp_path / "other").mkdir()
    path = write(tmp_path / "other", RECORDS)
    data = datasets.load_dataset(
        "parquet" if path.suffix == ".parquet" else "json",
        data_files=str(path),
        split="train",
        streaming=streaming,
        cache_dir=str(tmp_path / "hub"),
    )
    tokenizer = byte_tokenizer(TOOLS)
    corpus = Corpus(CorpusConfig(source="owner/name"), HubSource("owner/name", "0" * 64, data))
    assert [bytes(row.key) for row in tokenise(corpus, tokenizer)] == expected_keys


@pytest.mark.parametrize("write", WRITERS)
def test_arguments_as_json_text_keep_nulls_numbers_and_order(tmp_path: Path, write: Any) -> None:
    """The one form that every kind of file keeps, and what a user is told to write."""
    texts = ['{"line": null, "n": 2.0}', '{"n": 1, "line": "B"}']
    records = [
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call("f", text)]}]}
        for text in texts
    ]
    tokenizer = byte_tokenizer(TOOLS)
    if write in (as_loaded_then_saved, as_loaded_then_parquet):
        records[0]["other"] = {"a": 1}  # else there is nothing that differs, and no arrow.json
        records[1]["other"] = {"b": 1}
    rows, _ = rows_of_file(write(tmp_path, records), tokenizer)
    assert [targets_of(row, tokenizer) for row in rows] == [
        [f'<call>{{"name": "f", "arguments": {text}}}<|im_end|>'] for text in texts
    ]


def test_json_keeps_a_null_that_is_meant(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(TOOLS)
    turn = {"role": "assistant", "content": "", "tool_calls": [call("f", {"line": None, "n": 2.0})]}
    [row], _ = rows_of(tmp_path, [{"messages": [USER, turn]}], tokenizer)
    assert targets_of(row, tokenizer) == [
        '<call>{"name": "f", "arguments": {"line": null, "n": 2.0}}<|im_end|>'
    ]


def test_a_date_that_some_library_made_of_a_text_is_refused(tmp_path: Path) -> None:
    good = {"messages": [USER, ANSWER]}
    turn = {"role": "assistant", "content": "", "tool_calls": [call("f", {"day": datetime(2026, 5, 1)})]}
    path = as_parquet(tmp_path, [good, {"messages": [USER, turn]}])
    with pytest.raises(CorpusError) as caught:
        rows_of_file(path, byte_tokenizer(TOOLS))
    assert str(caught.value) == (
        "a tool call must hold JSON values, got datetime in message 2 of data.parquet, row 2; write them as JSON text"
    )


def test_columns_keep_their_values_and_objects_lose_what_was_added() -> None:
    number, text = pa.float64(), pa.string()
    kind = pa.struct([("a", number), ("b", text), ("c", pa.map_(text, number)), ("d", pa.list_(number))])
    value = {"a": 1.0, "b": None, "c": [("x", 2.0)], "d": [1.0, 2.5, None]}
    expected = {"a": 1, "c": {"x": 2}, "d": [1, 2.5, None]}
    assert plain(value, kind) == expected
    assert repr(plain(value, kind)) == repr(expected)  # 1 == 1.0, but they print differently
    assert repr(plain([value, None], pa.list_(kind))) == repr([expected, None])
    untyped = {**value, "c": {"x": 2.0}}
    assert repr(plain_untyped([untyped])) == repr([expected])
    assert repr(plain(1.0, number)) == repr(plain_untyped(1.0)) == "1.0"
    assert repr(plain([1.0, 2.0], pa.list_(number))) == repr(plain_untyped([1.0, 2.0])) == "[1.0, 2.0]"
    assert repr(plain({"a": -0.0}, pa.struct([("a", number)]))) == "{'a': -0.0}"
    assert plain('{"a": null, "b": 1.0}', pa.json_()) == {"a": None, "b": 1.0}


def test_lists_by_views_lose_what_was_added_too() -> None:
    item = pa.struct({"a": pa.float64(), "b": pa.string()})
    for kind in (pa.list_(item), pa.list_view(item), pa.large_list_view(item)):
        assert plain([{"a": 1.0, "b": None}], kind) == [{"a": 1}]


def test_columns_of_later_files_are_counted(tmp_path: Path) -> None:
    """As those of later records are: column files hand over the columns that are read, and no others."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["abc"], "id": [1]}), folder / "a.parquet")
    pq.write_table(pa.table({"text": ["def", "ghi"], "id": [2, 3], "note": ["x", "y"]}), folder / "b.parquet")
    rows, iterator = rows_of_file(folder, byte_tokenizer())
    assert len(rows) == 3
    assert iterator.stats.notes() == ["columns not read, of later records than the first: note (2)"]


def test_a_saved_data_set_of_messages_as_json_text(tmp_path: Path) -> None:
    """Whole messages as text, one by one or all in one, as some exports have them."""
    tokenizer = byte_tokenizer(TOOLS)
    for messages in ([json.dumps(USER), json.dumps(ANSWER)], json.dumps([USER, ANSWER])):
        path = as_parquet(tmp_path, [{"messages": messages}])
        [row], _ = rows_of_file(path, tokenizer)
        assert targets_of(row, tokenizer) == ["Yo<|im_end|>"]
