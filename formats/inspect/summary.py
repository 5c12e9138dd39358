"""What `anneal cache inspect` prints, as one JSON-ready dictionary; docs/inspect.md describes its keys.

Counts and bytes by column are exact and come from the manifest alone. Everything about distributions needs
decoding, so a large cache is sampled: rows evenly spread, up to `SAMPLE_POSITIONS` positions; `full=True`
reads all.
"""

from typing import Any

import numpy as np

from formats.cache_row import ReadableCache
from formats.codec.payload import section_bytes
from formats.disk.manifest import VERSION
from formats.disk.token_row import KEY_BYTES
from formats.logprobs.entropy import entropy
from formats.logprobs.topk import TopKLogprobs

PERCENTILES = (5, 25, 50, 75, 95)
SAMPLE_POSITIONS = 100_000
SAMPLE_ROWS = 1_000
PARTS_ROWS = 64
NUM_UNCERTAIN = 10
COUNTS = ("num_rows", "num_tokens", "num_positions", "num_entries", "num_bytes", "num_payload_bytes")


def summarise(cache: ReadableCache, *, full: bool = False) -> dict[str, Any]:
    """Identity, settings, counts, bytes and distributions of a cache.

    Args:
        cache: an open cache.
        full: decode every row for the distributions instead of a sample.

    Raises:
        FormatError: a row that is read is damaged.
    """
    manifest = cache.manifest
    totals = {name: sum(getattr(shard, name) for shard in manifest.shards) for name in COUNTS}
    rows = sampled_rows(cache, full)
    summary: dict[str, Any] = {
        "path": cache.path,
        "format_version": VERSION,
        "identity": manifest.identity,
        "settings": {
            "codec": manifest.codec.to_dict(),
            "positions": manifest.positions,
            "min_prob": manifest.min_prob,
            "max_k": manifest.max_k,
            "vocab_size": manifest.vocab_size,
        },
        "num_shards": len(manifest.shards),
        **totals,
        "bytes_per_token": totals["num_bytes"] / max(1, totals["num_tokens"]),
        "payload_bytes_per_position": totals["num_payload_bytes"] / max(1, totals["num_positions"]),
        "columns": _columns(totals, manifest.num_rows),
    }
    return summary | _distributions(cache, rows, totals["num_positions"])


def _columns(totals: dict[str, int], num_rows: int) -> dict[str, dict[str, float]]:
    sizes = {
        "key": KEY_BYTES * num_rows,
        "input_ids": 4 * totals["num_tokens"],
        "loss_mask": (totals["num_tokens"] + 7) // 8,
        "payload": totals["num_payload_bytes"],
    }
    sizes["container"] = totals["num_bytes"] - sum(sizes.values())
    tokens = max(1, totals["num_tokens"])
    return {name: {"bytes": size, "bytes_per_token": size / tokens} for name, size in sizes.items()}


def sampled_rows(cache: ReadableCache, full: bool) -> np.ndarray:
    """Row indices to decode, ascending and evenly spread."""
    count = len(cache)
    if full:
        for number in range(len(cache.manifest.shards)):
            cache.shard(number)  # holds as many rows as the manifest says: nothing is allocated on its word
    if full or count == 0:
        return np.arange(count)
    wanted = min(SAMPLE_ROWS, max(1, round(count * SAMPLE_POSITIONS / max(1, cache.manifest.num_positions))))
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64))


def distribution(values: np.ndarray) -> dict[str, float]:
    """Mean, extremes and percentiles of a sample; empty for no values."""
    if len(values) == 0:
        return {}
    found = {"mean": float(np.mean(values)), "min": float(np.min(values))}
    for percent, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True):
        found[f"p{percent}"] = float(value)
    return found | {"max": float(np.max(values))}


def head_size_histogram(counts: np.ndarray) -> list[dict[str, Any]]:
    """Positions per head size, in bins 1, 2, 3-4, 5-8, ...: `{"from", "to", "positions"}`."""
    bins: list[dict[str, Any]] = []
    low, high = 1, 1
    while len(counts) and low <= counts.max():
        inside = int(((counts >= low) & (counts <= high)).sum())
        bins.append({"from": low, "to": high, "positions": inside})
        low, high = high + 1, 2 * high
    return bins


def _distributions(cache: ReadableCache, rows: np.ndarray, num_positions: int) -> dict[str, Any]:
    counts, drawn, masses, entropies, uncertain, labels = [], [], [], [], [], []
    # Spread over the sample, so that the parts are not those of the first rows only.
    for_parts = set(rows[np.linspace(0, len(rows) - 1, min(PARTS_ROWS, len(rows))).astype(int)].tolist())
    parts: list[tuple[TopKLogprobs, np.ndarray]] = []
    for index in rows.tolist():
        row = cache[index]
        teacher = row.teacher
        if index in for_parts:
            parts.append((teacher, row.label_ids))
        nats = entropy(teacher)
        counts.append(teacher.counts)
        drawn.append(teacher.draws.counts)
        masses.append(teacher.head_mass(1.0))
        entropies.append(nats)
        labels.append(teacher.label_logprobs[row.loss_mask[row.positions + 1]])
        for p in np.argsort(-nats, kind="stable")[:NUM_UNCERTAIN].tolist():
            uncertain.append((float(nats[p]), index, int(row.positions[p]), float(masses[-1][p])))
    flat_counts = np.concatenate(counts) if counts else np.zeros(0, np.int64)
    uncertain.sort(key=lambda item: (-item[0], item[1:3]))
    return {
        "sample": {
            "rows": len(rows),
            "positions": len(flat_counts),
            "complete": len(flat_counts) == num_positions,
        },
        "payload_parts": _parts(cache, parts),
        "head_size": distribution(flat_counts) | {"histogram": head_size_histogram(flat_counts)},
        "num_draws": distribution(np.concatenate(drawn)) if drawn and cache.manifest.codec.draw_rate else {},
        "head_mass": distribution(np.concatenate(masses) if masses else np.zeros(0)),
        "entropy": distribution(np.concatenate(entropies) if entropies else np.zeros(0)),
        "label_nll": _label_nll(np.concatenate(labels) if labels else np.zeros(0)),
        "most_uncertain": [
            {"row": row, "position": position, "entropy": nats, "head_mass": mass}
            for nats, row, position, mass in uncertain[:NUM_UNCERTAIN]
        ],
    }


def _label_nll(logprobs: np.ndarray) -> dict[str, Any]:
    """Mean NLL in nats and perplexity of the teacher on these next tokens; None where one is impossible."""
    if len(logprobs) == 0:
        return {}
    mean = float(-logprobs.astype(np.float64).mean()) + 0.0  # a certain token has no -0.0 nats
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(mean))
    return {
        "positions": len(logprobs),
        "mean": mean if np.isfinite(mean) else None,
        "perplexity": perplexity if np.isfinite(perplexity) else None,
    }


def _parts(cache: ReadableCache, rows: list[tuple[TopKLogprobs, np.ndarray]]) -> dict[str, Any]:
    """Bytes per position of each payload section, over some rows; estimated by compressing each section
    alone."""
    positions = sum(len(row) for row, _ in rows)
    if positions == 0:
        return {}
    sizes = section_bytes(cache.shard(0).codec, rows)
    return {name: {"bytes_per_position": size / positions} for name, size in sizes.items()}
