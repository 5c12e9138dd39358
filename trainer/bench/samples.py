"""The items of one task as a Parquet file: what was asked, what was answered, whether it was right.

One row per item and filter, in order of the items (docs/bench.md has the columns). DuckDB, Polars and pandas read
it as it is; `read_samples` gives numpy arrays.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from formats.errors import FormatError
from trainer.bench.task_identity import document_hash

FIXED = {
    "item": pa.int32(),
    "doc_hash": pa.string(),
    "prompt_hash": pa.string(),
    "filter": pa.string(),
    "target": pa.string(),
    "prediction": pa.string(),
    "choice_logprobs": pa.list_(pa.float64()),
    "correct": pa.int8(),
    "truncated": pa.bool_(),
}
"""Columns of every task; a column per metric follows."""

RIGHT_OR_WRONG = ("acc", "exact_match", "pass@1", "prompt_level_strict_acc", "acc_norm")
"""Metrics that say of an item whether it is right, in order of preference."""


@dataclass(frozen=True)
class Samples:
    """The columns of a file for one filter. N items."""

    items: np.ndarray
    """[N] int32: number of the item within the task."""
    doc_hashes: list[str]
    num_choices: np.ndarray
    """[N] int32: choices to pick from; 0 where the model writes its answer."""
    metrics: dict[str, np.ndarray]
    """Metric -> [N] float64, not-a-number where it has none."""
    weights: dict[str, np.ndarray]
    """Metric -> [N] float64: words, bytes or tokens of the item, for metrics that are sums of log-likelihoods."""


def samples_table(samples: Sequence[Mapping[str, Any]], truncated: Sequence[bool]) -> tuple[pa.Table, str]:
    """The harness's samples as a table, and the metric that `correct` is taken from (empty if none can be).

    Args:
        samples: `results["samples"][task]` of lm_eval.
        truncated: for every sample, whether its prompt was cut.
    """
    primary = _primary(samples)
    rows: dict[str, list[Any]] = {name: [] for name in FIXED}
    metrics: dict[str, list[float | None]] = {}
    for number, (sample, cut) in enumerate(zip(samples, truncated, strict=True)):
        logprobs = _logprobs(sample["resps"])
        rows["item"].append(int(sample["doc_id"]))
        rows["doc_hash"].append(document_hash(sample["doc"]))
        rows["prompt_hash"].append(str(sample["prompt_hash"]))
        rows["filter"].append(str(sample["filter"]))
        rows["target"].append(_text(sample["target"]))
        answer = str(int(np.argmax(logprobs))) if len(logprobs) > 1 else ""
        rows["prediction"].append(answer if logprobs else _text(sample["filtered_resps"]))
        rows["choice_logprobs"].append(logprobs)
        rows["correct"].append(int(sample[primary]) if primary else None)
        rows["truncated"].append(bool(cut))
        for name in sample["metrics"]:
            for column, value in _numbers(str(name), sample[name]):
                metrics.setdefault(column, [None] * number).append(value)
        for values in metrics.values():
            values.extend([None] * (number + 1 - len(values)))
    arrays = [pa.array(rows[name], kind) for name, kind in FIXED.items()]
    arrays += [pa.array(values, pa.float64()) for values in metrics.values()]
    return pa.table(arrays, names=[*FIXED, *metrics]), primary


def table_bytes(table: pa.Table) -> bytes:
    """The table as a Parquet file, compressed with zstandard."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_samples(path: Path, filter_name: str) -> Samples:
    """Read one filter's rows.

    Raises:
        FormatError: no such file, not Parquet, or not ours.
    """
    try:
        table = pq.read_table(path)
        missing = [name for name in FIXED if name not in table.column_names]
    except (OSError, pa.ArrowException) as error:
        raise FormatError(
            f"samples must be a Parquet file, got {path}: {error}; run anneal bench again"
        ) from None
    if missing:
        raise FormatError(
            f"samples must have a column {missing[0]}, got none in {path}; run anneal bench again"
        )
    keep = np.array([name == filter_name for name in table["filter"].to_pylist()], bool)
    table = table.filter(pa.array(keep))
    columns = {
        name: table[name].to_numpy(zero_copy_only=False).astype(np.float64)
        for name in table.column_names
        if name not in FIXED
    }
    return Samples(
        items=table["item"].to_numpy().astype(np.int32),
        doc_hashes=table["doc_hash"].to_pylist(),
        num_choices=np.array(
            [len(values) if len(values) > 1 else 0 for values in table["choice_logprobs"].to_pylist()],
            np.int32,
        ),
        metrics={name: values for name, values in columns.items() if not name.endswith(WEIGHT)},
        weights={name.removesuffix(WEIGHT): v for name, v in columns.items() if name.endswith(WEIGHT)},
    )


WEIGHT = ":weight"
"""Suffix of the column that a sum is divided by."""


def _primary(samples: Sequence[Mapping[str, Any]]) -> str:
    first = samples[0]
    names = [name for name in RIGHT_OR_WRONG if name in first["metrics"]]
    names += [name for name in first["metrics"] if name not in names]
    for name in names:
        if all(_is_flag(sample.get(name)) for sample in samples):
            return str(name)
    return ""


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number | np.bool_) and float(value) in (0.0, 1.0)


def _logprobs(responses: Sequence[Any]) -> list[float]:
    """Natural log-likelihood of each request: a choice each, or one document; none for written answers."""
    found = []
    for repeats in responses:
        first = repeats[0]
        if isinstance(first, tuple | list) and len(first) == 2 and not isinstance(first[0], str):
            found.append(float(first[0]))
        elif isinstance(first, float):
            found.append(first)
    return found


def _numbers(name: str, value: Any) -> list[tuple[str, float | None]]:
    """Columns of one metric: a number, or a sum and what it is divided by; anything else has no column."""
    if isinstance(value, bool | int | float | np.number | np.bool_):
        return [(name, finite(float(value)))]
    if isinstance(value, tuple | list) and len(value) == 2:
        total, weight = value
        if isinstance(total, float) and isinstance(weight, int | float):
            return [(name, finite(total)), (name + WEIGHT, finite(float(weight)))]
    return []


def finite(value: Any) -> float | None:
    """A plain finite number, else None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _text(value: Any) -> str:
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
