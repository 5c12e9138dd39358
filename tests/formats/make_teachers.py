"""Teacher distributions and small caches for the tests, computed densely and without the code under test."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from formats import CacheWriter, CodecConfig, TailDraws, TeacherCache, TokenRow, TopKLogprobs
from formats.logprobs.tail_draws import starts
from formats.logprobs.tail_function import TAIL_BETAS


def log_softmax(logits_PV: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits_PV, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def logsumexp(values: np.ndarray) -> float:
    if len(values) == 0 or np.isneginf(values).all():
        return -math.inf
    peak = values.max()
    return float(peak + np.log(np.exp(values - peak).sum()))


def dense_draws(rest_PV: np.ndarray, rate: int, starts_P: np.ndarray) -> TailDraws:
    """Draws among dense logprobs (-inf in the head): point after point, looked up in the running sum."""
    ids, values, counts = [np.zeros(0, np.int64)], [np.zeros(0)], []
    for row, start in zip(rest_PV, starts_P.tolist(), strict=True):
        ends = np.cumsum(rate * np.exp(0.75 * row))
        found = np.searchsorted(ends, np.arange(start, ends[-1]), side="right")
        ids.append(found)
        values.append(row[found])
        counts.append(len(found))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return TailDraws(offsets, np.concatenate(ids), np.concatenate(values), rate)


def labels_for(count: int, vocab_size: int) -> np.ndarray:
    """int64 [count]: next tokens of positions that belong to no row, from all over the vocabulary."""
    return (np.arange(count) * 7 + 3) % vocab_size


def labels_of(topk: TopKLogprobs) -> np.ndarray:
    """Those that `capture` took where it was told none."""
    return labels_for(len(topk), topk.vocab_size)


def capture(
    logits_PV: np.ndarray,
    min_prob: float = 1e-3,
    max_k: int = 128,
    draw_rate: int = 0,
    starts_P: np.ndarray | None = None,
    label_ids: np.ndarray | None = None,
) -> TopKLogprobs:
    """Heads, tails and labels (by default `labels_for`) of dense logits, position by position; with
    `draw_rate`, tail draws whose points begin at `starts_P`, by default evenly spread."""
    logprobs_PV = log_softmax(logits_PV)
    if label_ids is None:
        label_ids = labels_for(*logprobs_PV.shape)
    ids, values, counts = [], [], []
    rest_PV = logprobs_PV.copy()
    for p, row in enumerate(logprobs_PV):
        order = np.lexsort((np.arange(len(row)), -row))
        with np.errstate(divide="ignore"):
            keep = max(1, min(max_k, int((row >= np.log(min_prob)).sum())))
        head = order[:keep]
        rest_PV[p, head] = -np.inf
        ids.append(head)
        values.append(row[head])
        counts.append(keep)
    peak = rest_PV.max(-1, initial=-np.inf)
    peak = np.where(np.isfinite(peak), peak, 0.0)
    with np.errstate(divide="ignore"):
        nodes = [
            np.log(np.exp(beta * (rest_PV - peak[:, None])).sum(-1)) + beta * peak for beta in TAIL_BETAS
        ]
    return TopKLogprobs(
        np.concatenate([[0], np.cumsum(counts)]),
        np.concatenate(ids) if ids else np.zeros(0),
        np.concatenate(values) if values else np.zeros(0),
        np.stack(nodes, axis=1),
        logprobs_PV.shape[1],
        dense_draws(rest_PV, draw_rate, spread(len(counts)) if starts_P is None else starts_P)
        if draw_rate
        else TailDraws.none(len(counts)),
        logprobs_PV[np.arange(len(counts)), label_ids],
    )


def spread(count: int) -> np.ndarray:
    """So many different numbers in [0, 1)."""
    return (np.arange(count) + 0.5) * math.pi % 1.0


def random_row(rng: np.random.Generator, length: int, vocab_size: int) -> TokenRow:
    mask = rng.random(length) < 0.6
    mask[:1] = False
    # Every third token is one that `random_teacher` finds likely, so that labels are kept and not kept.
    likely = np.argsort(popularity(vocab_size))[rng.integers(0, min(3, vocab_size), length)]
    ids = np.where(rng.random(length) < 1 / 3, likely, rng.integers(0, vocab_size, length))
    return TokenRow(ids, mask)


def popularity(vocab_size: int) -> np.ndarray:
    """float64 [V]: a fixed order of tokens, so that heads share tokens as those of a language model do."""
    return np.random.default_rng(vocab_size).permutation(vocab_size) + 1.0


def random_teacher(
    rng: np.random.Generator,
    row: TokenRow,
    vocab_size: int,
    positions: str = "all",
    draw_rate: int = 0,
) -> TopKLogprobs:
    """Zipf-like logits whose sharpness varies from flat to one-hot."""
    count = len(row.positions(positions))
    if count == 0:
        return TopKLogprobs.empty(vocab_size, draw_rate)
    scale = rng.uniform(0.5, 6, (count, 1))
    logits = -scale * np.log(popularity(vocab_size)) + rng.normal(size=(count, vocab_size))
    begin = starts(row.key, row.positions(positions))
    labels = row.label_ids(positions)
    return capture(logits, draw_rate=draw_rate, starts_P=begin, label_ids=labels)


def keys_in_worker(task: tuple[TeacherCache, int]) -> list[bytes]:
    """Every third key of a cache that came through a pickle: what a data loader's worker does."""
    cache, start = task
    return [cache[index].key for index in range(start, len(cache), 3)]


def write_cache(
    directory: Path,
    *,
    lengths: list[int],
    vocab_size: int = 97,
    positions: str = "loss",
    codec: CodecConfig | None = None,
    seed: int = 0,
    rows_per_shard: int = 8,
    rows_per_batch: int = 3,
    min_prob: float = 1e-3,
    draw_rate: int = 0,
) -> list[tuple[TokenRow, TopKLogprobs]]:
    """A cache of rows of these lengths; returns what was written."""
    rng = np.random.default_rng(seed)
    written = []
    with CacheWriter(
        directory,
        identity={name: {} for name in ("teacher", "tokenizer", "corpus", "preprocessing")},
        vocab_size=vocab_size,
        positions=positions,
        min_prob=min_prob,
        max_k=min(64, vocab_size),
        codec=replace(codec or CodecConfig(), draw_rate=draw_rate),
        rows_per_shard=rows_per_shard,
        rows_per_batch=rows_per_batch,
    ) as writer:
        for length in lengths:
            row = random_row(rng, length, vocab_size)
            teacher = random_teacher(rng, row, vocab_size, positions, draw_rate)
            teacher = teacher.prune(min_prob, min(64, vocab_size))
            writer.append(row, teacher)
            written.append((row, teacher))
        writer.add_file("notes.txt", b"auxiliary")
    return written


def by_id(topk: TopKLogprobs | TailDraws) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(offsets, ids, logprobs) with entries, or draws, sorted by id, the order-free form."""
    order = np.lexsort((topk.token_ids, np.repeat(np.arange(len(topk)), topk.counts)))
    return topk.offsets, topk.token_ids[order], topk.logprobs[order]
