"""DistillKit's bytes, written here by an encoder from its specification: one Python number and one bit at a time."""

import itertools
import json
import math
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cache_builder.tools.convert_distillkit import convert_distillkit
from cache_builder.tools.distillkit import Compression
from cache_builder.tools.topk_table import PADDING_LOGPROB
from formats.errors import AnnealError, ConfigError, FormatError

RECOMMENDED = {
    "d": 300,
    "k": 24,
    "exact_k": 6,
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, 2, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
    "error_diffusion": False,
    "normalize_t": False,
}
BINS = [
    {"scale_dtype": "float16", "element_bits": 5, "num_elements": 7},
    {"scale_dtype": "bfloat16", "element_bits": 1, "num_elements": 3},
    {"scale_dtype": "float32", "element_bits": 11, "num_elements": 2},
]
CONFIGURATIONS = {
    "recommended": RECOMMENDED,
    "exact": RECOMMENDED | {"exact_k": 24, "exact_dtype": "float32", "polynomial_terms": None},
    "delta": RECOMMENDED | {"delta_encoding": True, "exact_dtype": "float32", "term_dtype": "float64"},
    "bins": RECOMMENDED | {"residual_bins": BINS, "exact_dtype": "float16", "normalize_t": True},
    "bins alone": RECOMMENDED
    | {"residual_bins": [{"scale_dtype": "float64", "element_bits": 9, "num_elements": 18}]}
    | {"polynomial_terms": None, "d": 513, "exact_k": 6, "delta_encoding": True, "exact_dtype": "float64"},
    "exponential": RECOMMENDED
    | {"polynomial_terms": ["exp", 0], "normalize_t": True, "exact_dtype": "float32"},
}


def number(value: float, dtype: str) -> tuple[bytes, float]:
    """Its bytes, and what they are read as."""
    if dtype == "bfloat16":
        high = struct.pack("<f", value)[2:]  # cut, not rounded: any bfloat16 will do
        return high, struct.unpack("<f", b"\0\0" + high)[0]
    code = {"float16": "<e", "float32": "<f", "float64": "<d"}[dtype]
    return struct.pack(code, value), struct.unpack(code, struct.pack(code, value))[0]


def pack(numbers: list[int], bits: int) -> bytes:
    text = "".join(format(value, f"0{bits}b") for value in numbers)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


def term(kind: int | str, t: float) -> float:
    return math.sqrt(t) if kind == "sqrt" else math.exp(t) if kind == "exp" else t**kind


def encode(logprobs: list[float], c: dict) -> tuple[bytes, list[float]]:
    """The bytes of one position, and the logprobs that they mean."""
    k, exact_k = c["k"], c["exact_k"]
    values = list(logprobs)
    if c["delta_encoding"]:
        values = [values[0], *(b - a for a, b in itertools.pairwise(values))]
    data, meant = b"", []
    for value in values[:exact_k]:
        raw, read = number(value, c["exact_dtype"])
        data += raw
        meant.append(read)
    count = k - exact_k
    points = [i / (count - 1) if c["normalize_t"] else float(i) for i in range(count)]
    rest, fitted = values[exact_k:], [0.0] * count
    if c["polynomial_terms"]:
        design = np.array([[term(kind, t) for kind in c["polynomial_terms"]] for t in points])
        for i, coefficient in enumerate(np.linalg.lstsq(design, np.array(rest), rcond=None)[0]):
            raw, read = number(coefficient, c["term_dtype"])
            data += raw
            fitted = [value + read * design[j][i] for j, value in enumerate(fitted)]
    start = 0
    for one in c["residual_bins"]:
        size, bits = one["num_elements"], one["element_bits"]
        residuals = [rest[start + j] - fitted[start + j] for j in range(size)]
        largest = max(map(abs, residuals)) or 1.0
        raw, scale = number(largest / 2 ** (bits - 1) if bits > 1 else largest, one["scale_dtype"])
        low = -(2 ** (bits - 1)) if bits > 1 else 0
        stored = []
        for j, residual in enumerate(residuals):
            step = min(max(round(residual / scale), low), low + 2**bits - 1)
            stored.append(step - low)
            fitted[start + j] += scale * (step if bits > 1 else 2 * step - 1)
        data += raw + pack(stored, bits)
        start += size
    meant += fitted
    if c["delta_encoding"]:
        meant = [math.fsum(meant[: i + 1]) for i in range(k)]
    return data, meant


def teacher(num_positions: int, c: dict, seed: int = 0) -> tuple[list[list[int]], list[list[float]]]:
    """Ids and logprobs of the k likeliest tokens."""
    logits = np.random.default_rng(seed).normal(size=(num_positions, c["d"])) * 3
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    ids = np.argsort(-logprobs, axis=1)[:, : c["k"]]
    return ids.tolist(), np.take_along_axis(logprobs, ids, 1).tolist()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_bit_of_the_specification(name: str) -> None:
    c = CONFIGURATIONS[name]
    compression = Compression.of(c)
    ids, logprobs = teacher(40, c)
    bits = math.ceil(math.log2(c["d"]))
    packed = [pack(row, bits) for row in ids]
    encoded = [encode(row, c) for row in logprobs]
    assert {len(row) for row in packed} == {compression.id_bytes}
    assert {len(data) for data, _ in encoded} == {compression.logprob_bytes}
    as_bytes = np.frombuffer(b"".join(packed), np.uint8).reshape(40, -1)
    np.testing.assert_array_equal(compression.decode_ids(as_bytes), ids)
    decoded = compression.decode_logprobs(
        np.frombuffer(b"".join(data for data, _ in encoded), np.uint8).reshape(40, -1)
    )
    np.testing.assert_allclose(decoded, [meant for _, meant in encoded], rtol=1e-9, atol=1e-9)
    # The curve is of use: it follows the logprobs.
    assert np.abs(decoded - logprobs).mean() < 0.3


def test_the_sizes_that_its_data_sets_have() -> None:
    """428 bytes a token on the Hub; 344 in its recommended setting with 18 bits."""
    hub = RECOMMENDED | {"d": 151_936, "k": 128, "exact_k": 32, "exact_dtype": "float32"}
    for changes, size in (({"polynomial_terms": [0, 1, 2]}, 428),):
        compression = Compression.of(hub | changes)
        assert compression.id_bytes + compression.logprob_bytes == size
    six = {"exact_k": 16, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]}
    compression = Compression.of(hub | six)
    assert compression.id_bytes + compression.logprob_bytes == 344


def write(path: Path, lines: list[dict]) -> Path:
    byte_lists = pa.list_(pa.list_(pa.uint8()))
    columns = {}
    for name in lines[0]:
        kind = byte_lists if "compressed" in name or "bytepacked" in name else pa.list_(pa.uint64())
        columns[name] = pa.array([line[name] for line in lines], kind)
    pq.write_table(pa.table(columns), path)
    return path


def line_of(num_tokens: int, num_rows: int, seed: int, c: dict = RECOMMENDED, **more) -> dict:
    ids, logprobs = teacher(num_rows, c, seed)
    return {
        "input_ids": np.random.default_rng(seed).integers(0, c["d"], num_tokens).tolist(),
        "compressed_logprobs": [list(encode(row, c)[0]) for row in logprobs],
        "bytepacked_indices": [list(pack(row, math.ceil(math.log2(c["d"])))) for row in ids],
        **more,
    }


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    (tmp_path / "compression_config.yaml").write_text(yaml.safe_dump(RECOMMENDED))
    return tmp_path / "compression_config.yaml"


@pytest.mark.parametrize("k", [None, 5])
def test_a_packed_file(tmp_path: Path, settings: Path, k: int | None) -> None:
    """Sequences are taken apart, padding out; entries and tail sum to 1; a position predicts the next token."""
    c, width = RECOMMENDED, k or RECOMMENDED["k"]
    segments = [[1] * 9 + [2] * 4 + [3] * 7, [1] * 12 + [0] * 8]
    lines = [line_of(20, 20, seed, attention_mask=segments[seed]) for seed in (0, 1)]
    report = convert_distillkit([write(tmp_path / "a.parquet", lines)], settings, tmp_path / "x.parquet", k=k)
    rows = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert [len(row["input_ids"]) for row in rows] == [9, 4, 7, 12] and report.table.num_rows == 4
    places = [(0, 0, 9), (0, 9, 13), (0, 13, 20), (1, 0, 12)]
    for row, (line, start, stop) in zip(rows, places, strict=True):
        tokens = lines[line]["input_ids"][start:stop]
        assert row["input_ids"] == tokens and row["labels"] == [-100, *tokens[1:]]
        assert all(row["teacher_mask"])
        ids, logprobs = teacher(20, c, line)
        for t in range(start, stop):
            meant = encode(logprobs[t], c)[1]
            order = sorted(range(c["k"]), key=lambda j: -meant[j])
            assert row["teacher_ids"][t - start] == [ids[t][j] for j in order[:width]]
            got = row["teacher_logprobs"][t - start]
            total = math.fsum(map(math.exp, meant))
            expected = [meant[j] - math.log(max(total, 1.0)) for j in order[:width]]
            np.testing.assert_allclose(got, expected, atol=2e-6)
            tail = row["teacher_tail"][t - start]
            assert math.fsum(map(math.exp, [*got, tail])) == pytest.approx(1.0, abs=1e-6)
    metadata = pq.read_schema(tmp_path / "x.parquet").metadata
    assert json.loads(metadata[b"anneal_marks"]) == ["T = 1 only", "identity unverified"]


def test_a_row_less_than_tokens_and_several_files(tmp_path: Path, settings: Path) -> None:
    files = [write(tmp_path / f"{i}.parquet", [line_of(6, 5, i), line_of(4, 3, i + 9)]) for i in (0, 1)]
    report = convert_distillkit(files, settings, tmp_path / "x.parquet", limit=3)
    rows = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert [row["teacher_mask"] for row in rows] == [
        [True] * (size - 1) + [False] for size in (6, 4, 6)
    ] and report.table.num_positions == 13
    assert rows[0]["teacher_ids"][5] == [0] * 24 and rows[0]["teacher_tail"][5] == PADDING_LOGPROB


def test_entries_of_more_than_all_mass(tmp_path: Path, settings: Path) -> None:
    """The curve may lie too high: entries are scaled to 1, the position has no tail, and that is counted."""
    line = line_of(3, 3, 0)
    steep = [-0.01] * 6 + [-5.0] * 18
    line["compressed_logprobs"][1] = list(encode(steep, RECOMMENDED)[0])
    report = convert_distillkit([write(tmp_path / "a.parquet", [line])], settings, tmp_path / "x.parquet")
    (row,) = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert report.num_over == 1 and row["teacher_tail"][1] == PADDING_LOGPROB
    assert math.fsum(map(math.exp, row["teacher_logprobs"][1])) == pytest.approx(1.0, abs=1e-6)
    assert "1 positions had entries" in report.text() and "identity unverified" in report.text()


def test_another_configuration_is_noticed(tmp_path: Path, settings: Path) -> None:
    file = write(tmp_path / "a.parquet", [line_of(5, 5, 0)])
    for changes, message in (
        ({"d": 257}, "token ids must be below d = 257"),
        ({"d": 256}, "bytes a position in bytepacked_indices"),
        ({"d": 600}, "bytes a position in bytepacked_indices"),
        ({"exact_k": 7}, "bytes a position in compressed_logprobs"),
        ({"exact_dtype": "float32"}, "bytes a position in compressed_logprobs"),
        ({"term_dtype": "bfloat16"}, "term_dtype must be float32 or float64"),
        ({"k": 0}, "k must be a whole number from 1"),
        ({"residual_bins": [{"element_bits": 3}]}, "a residual bin has"),
        ({"polynomial_terms": ["log"]}, "polynomial_terms must be"),
        ({"bits": 3}, "got 'bits'"),
    ):
        settings.write_text(yaml.safe_dump(RECOMMENDED | changes))
        with pytest.raises(AnnealError, match=message) as refused:
            convert_distillkit([file], settings, tmp_path / "x.parquet")
        assert "\n" not in str(refused.value) and not (tmp_path / "x.parquet").exists()


def test_files_that_cannot_be_read(tmp_path: Path, settings: Path) -> None:
    good = line_of(5, 5, 0)
    legacy = {"input_ids": [1, 2], "packed_indices": [3, 4]}
    twice = good | {"bytepacked_indices": [[0] * 27] * 5}
    for line, message in (
        (legacy, "it is the legacy format of DistillKit"),
        (twice, "a position's token ids must be distinct"),
        (good | {"input_ids": good["input_ids"] * 2}, "a distribution for every token"),
        (good | {"labels": [1, 2, 3, 4, 5]}, "labels that are its tokens"),
        (good | {"attention_mask": [1, 1]}, "5 numbers in attention_mask"),
        (good | {"input_ids": []}, "empty or has nulls"),
    ):
        with pytest.raises(FormatError, match=message) as refused:
            convert_distillkit([write(tmp_path / "a.parquet", [line])], settings, tmp_path / "x.parquet")
        assert "\n" not in str(refused.value)
        assert {path.name for path in tmp_path.iterdir()} == {"a.parquet", settings.name}
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(FormatError, match="must be a Parquet file"):
        convert_distillkit([tmp_path / "a.parquet"], settings, tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match="at least one Parquet file"):
        convert_distillkit([], settings, tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match="k must be from 1 to 24"):
        convert_distillkit([tmp_path / "a.parquet"], settings, tmp_path / "x.parquet", k=25)


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.uint8()), pa.list_(pa.int64()), pa.large_list(pa.uint8()), pa.binary(), "fixed"]
)
def test_bytes_in_whatever_column_holds_them(tmp_path: Path, settings: Path, kind) -> None:
    """`datasets` and other writers change the types of columns, and write row groups of a few lines."""
    lines = [line_of(6, 5, seed) for seed in range(3)]
    convert_distillkit([write(tmp_path / "a.parquet", lines)], settings, tmp_path / "x.parquet")
    columns = {"input_ids": pa.array([line["input_ids"] for line in lines], pa.list_(pa.int32()))}
    for name in ("compressed_logprobs", "bytepacked_indices"):
        inner = pa.list_(pa.uint8(), len(lines[0][name][0])) if kind == "fixed" else kind
        values = [[bytes(one) if kind == pa.binary() else one for one in line[name]] for line in lines]
        columns[name] = pa.array(values, pa.list_(inner))
    pq.write_table(pa.table(columns), tmp_path / "b.parquet", row_group_size=2)
    convert_distillkit([tmp_path / "b.parquet"], settings, tmp_path / "y.parquet")
    assert pq.read_table(tmp_path / "y.parquet").equals(pq.read_table(tmp_path / "x.parquet"))


def test_columns_of_other_kinds(tmp_path: Path, settings: Path) -> None:
    good = line_of(6, 5, 0)
    width = len(good["compressed_logprobs"][0])
    for name, value, message in (
        ("input_ids", 7, "lists of whole numbers"),
        ("input_ids", "7", "lists of whole numbers"),
        ("input_ids", None, "lists of whole numbers"),
        ("input_ids", [1, 2, 3, 4, 5, 300], "input_ids below d = 300, got 300"),
        ("input_ids", [1, -100, 3, 4, 5, 6], "input_ids below d = 300, got -100"),
        ("compressed_logprobs", "no", "lists of bytes in compressed_logprobs"),
        ("compressed_logprobs", [1, 2], "lists of bytes in compressed_logprobs"),
        ("compressed_logprobs", None, "lists of bytes in compressed_logprobs"),
        ("compressed_logprobs", [[0.5] * width] * 5, "must have bytes in compressed_logprobs"),
        ("compressed_logprobs", [[256] * width] * 5, "must have bytes in compressed_logprobs"),
        ("compressed_logprobs", [None, *good["compressed_logprobs"][1:]], "bytes a position"),
    ):
        line = good | {name: value}
        pq.write_table(
            pa.table({key: pa.array([item]) for key, item in line.items()}), tmp_path / "a.parquet"
        )
        with pytest.raises(FormatError, match=message) as refused:
            convert_distillkit([tmp_path / "a.parquet"], settings, tmp_path / "x.parquet")
        assert "\n" not in str(refused.value)


def test_the_command(tmp_path: Path, settings: Path, anneal) -> None:
    file = write(tmp_path / "a.parquet", [line_of(5, 5, 0)])
    words = [
        "cache",
        "convert",
        file,
        "--compression",
        settings,
        "--parquet",
        tmp_path / "x.parquet",
        "--k",
        4,
    ]
    for code, found in ((0, "identity unverified"), (1, "which exists")):
        exit_code, out, err = anneal(*words)
        assert exit_code == code and found in (err if code else out)
