"""A cache with made-up teacher distributions, for timings: the cost of a step is the same for any values."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from formats.capture_settings import CaptureSettings
from formats.codec.config import CodecConfig
from formats.disk.token_row import TokenRow
from formats.logprobs.tail_draws import POWER, TailDraws
from formats.logprobs.topk import TAIL_BETAS, TopKLogprobs
from formats.writer import CacheWriter


def random_teacher(num_positions: int, vocab_size: int, num_kept: int, *, seed: int) -> TopKLogprobs:
    """`num_kept` distinct tokens per position, probabilities falling like 1/rank, 6 % left to the tail; as
    many draws from it as the default rate makes."""
    generator = np.random.default_rng(seed)
    stride = vocab_size // num_kept
    lattice = np.arange(num_kept) * stride
    ids = (lattice + generator.integers(0, stride, (num_positions, num_kept))) % vocab_size
    weights = 1.0 / np.arange(1, num_kept + 1)
    logprobs = np.log(0.94 * weights / weights.sum()).astype(np.float32)
    # The tail as if its tokens were equally likely: A(beta) = log(n) + beta log(0.06 / n).
    num_tail = vocab_size - num_kept
    log_each = np.log(0.06 / num_tail)
    num_draws = round(CaptureSettings.draw_rate * num_tail * np.exp(POWER * log_each))
    # Beside a kept token, in its own part of the lattice: surely no other one that is kept.
    cell = generator.integers(0, num_kept, (num_positions, num_draws))
    beside = np.take_along_axis(ids, cell, 1)
    drawn = np.where(beside % stride < stride - 1, beside + 1, beside - 1)
    nodes = [np.log(num_tail) + beta * np.log(0.06 / num_tail) for beta in TAIL_BETAS]
    return TopKLogprobs(
        offsets=np.arange(num_positions + 1) * num_kept,
        token_ids=ids.reshape(-1).astype(np.int32),
        logprobs=np.tile(logprobs, num_positions),
        log_tail_nodes=np.tile(np.array(nodes, dtype=np.float32), (num_positions, 1)),
        vocab_size=vocab_size,
        draws=TailDraws(
            np.arange(num_positions + 1) * num_draws,
            drawn.reshape(-1),
            np.full(drawn.size, log_each),
            CaptureSettings.draw_rate,
        ),
        label_logprobs=np.full(num_positions, np.nan),
    )


def write_cache(path: Path, *, num_rows: int, length: int, vocab_size: int, num_kept: int) -> None:
    """Rows of `length` random tokens, all of which carry loss."""
    generator = np.random.default_rng(1)
    codec = CodecConfig(draw_rate=CaptureSettings.draw_rate)
    with CacheWriter(path, identity={}, vocab_size=vocab_size, max_k=num_kept, codec=codec) as writer:
        for row in range(num_rows):
            mask = np.ones(length, dtype=bool)
            mask[0] = False
            token_row = TokenRow(generator.integers(0, vocab_size, length), mask)
            topk = random_teacher(length - 1, vocab_size, num_kept, seed=row)
            labels = np.full(len(topk), np.log(0.06 / vocab_size), np.float32)
            positions, entries = topk.kept_labels(token_row.label_ids())
            labels[positions] = topk.logprobs[entries]
            writer.append(token_row, replace(topk, label_logprobs=labels))
