"""A build whose every number follows from a seed: a teacher, a corpus, and helpers to compare the results.

The teacher is a real implementation of the `Teacher` protocol. Its logits are a fixed function of a row's
tokens, its heads, tails and draws are reduced here in float64, independently of the engines' code.
`seconds_per_row` makes it slow enough to be killed at interesting moments.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cache_builder.build import build_cache
from cache_builder.commit.plan import BuildSettings
from cache_builder.config import BuildConfig
from cache_builder.source import BuildSource
from formats.capture_settings import CaptureSettings
from formats.codec.config import CodecConfig
from formats.disk.token_row import TokenRow
from formats.identity.teacher_identity import TeacherIdentity
from formats.logprobs import tail_draws
from formats.logprobs.ragged import offsets_of
from formats.logprobs.topk import TAIL_BETAS, TopKLogprobs

VOCAB_SIZE = 53


def logits_of(input_ids: np.ndarray) -> np.ndarray:
    """float64 [L, V]: the logits at i depend on all tokens up to i."""
    table = np.random.default_rng(7).normal(size=(101, VOCAB_SIZE)) * 3
    state = np.cumsum((input_ids.astype(np.int64) + 1) * (np.arange(len(input_ids)) + 3)) % 101
    return table[state]


def reduce_exactly(
    logits: np.ndarray,
    min_prob: float,
    max_k: int,
    label_ids: np.ndarray | None = None,
    draw_rate: int = 0,
    starts: np.ndarray | None = None,
) -> TopKLogprobs:
    """The head, tail nodes, label and tail draws of [P, V] logits, one position after the other, in float64;
    without `label_ids` the labels are unknown."""
    offsets, ids, values = [0], [], []
    tails: list[np.ndarray] = []
    nodes = np.zeros((len(logits), len(TAIL_BETAS)))
    labels = np.full(len(logits), np.nan)
    for p, row in enumerate(logits):
        logprobs = row - np.logaddexp.reduce(row)
        order = np.argsort(-logprobs, kind="stable")
        size = max(1, min(max_k, int((np.exp(logprobs) >= min_prob).sum())))
        head, rest = order[:size], order[size:]
        if label_ids is not None:
            labels[p] = logprobs[label_ids[p]]
        ids.append(head)
        values.append(logprobs[head])
        offsets.append(offsets[-1] + size)
        for b, beta in enumerate(TAIL_BETAS):
            nodes[p, b] = np.logaddexp.reduce(beta * logprobs[rest]) if len(rest) else -np.inf
        tails.append(np.stack([rest, logprobs[rest]]))
    if not ids:
        return TopKLogprobs.empty(VOCAB_SIZE, draw_rate)
    drawn = tail_draws.TailDraws.none(len(logits))
    if draw_rate:
        assert starts is not None
        rest_offsets = offsets_of(np.array([tail.shape[1] for tail in tails]))
        rest_ids, rest_values = np.concatenate(tails, 1)
        drawn = tail_draws.draw(rest_offsets, rest_ids.astype(np.int32), rest_values, draw_rate, starts)
    return TopKLogprobs(
        np.array(offsets), np.concatenate(ids), np.concatenate(values), nodes, VOCAB_SIZE, drawn, labels
    )


class SeededTeacher:
    """See the module's docstring."""

    vocab_size = VOCAB_SIZE

    def __init__(
        self,
        *,
        min_prob: float = 1e-2,
        max_k: int = 8,
        positions: str = "loss",
        seconds_per_row: float = 0.0,
        version: str = "1",
        draw_rate: int = 0,
    ) -> None:
        self._min_prob, self._max_k, self._positions = min_prob, max_k, positions
        self._seconds, self._version = seconds_per_row, version
        self._draw_rate = draw_rate
        self.closed = False

    def prefill(self, rows: Iterable[TokenRow]) -> Iterator[TopKLogprobs]:
        for row in rows:
            if self._seconds:
                time.sleep(self._seconds)
            at = row.positions(self._positions)
            begin = tail_draws.starts(row.key, at)
            yield reduce_exactly(
                logits_of(row.input_ids)[at],
                self._min_prob,
                self._max_k,
                row.label_ids(self._positions),
                self._draw_rate,
                begin,
            )

    def describe(self) -> dict[str, Any]:
        return {"engine": "seeded", "engine_version": self._version, "dtype": "float64"}

    def close(self) -> None:
        self.closed = True


def make_rows(num_rows: int, seed: int = 0, max_length: int = 24) -> Iterator[TokenRow]:
    """Rows of 2 to `max_length` tokens with random masks."""
    generator = np.random.default_rng(seed)
    for _ in range(num_rows):
        length = int(generator.integers(2, max_length + 1))
        mask = generator.random(length) < 0.7
        mask[0] = False
        mask[-1] = True
        yield TokenRow(generator.integers(0, VOCAB_SIZE, length), mask)


def make_source(
    num_rows: int = 60,
    *,
    seed: int = 0,
    rows_per_shard: int = 10,
    draw_rate: int = 0,
    **preprocessing: Any,
) -> BuildSource:
    """A corpus of seeded rows, as `open_source` would describe it."""
    settings = {"max_length": 24, "positions": "loss", "min_prob": 1e-2, "max_k": 8, **preprocessing}
    identity = TeacherIdentity(
        teacher={"weights": "a" * 64, "config": "b" * 64, "engine": "seeded", "engine_args": {}},
        tokenizer={"vocabulary": "c" * 64},
        corpus={"source": f"seed {seed}", "fingerprint": hashlib.sha256(b"%d" % seed).hexdigest()},
        preprocessing=settings,
    )
    return BuildSource(
        settings=BuildSettings(
            identity=identity,
            capture=CaptureSettings(
                **{name: settings[name] for name in ("positions", "min_prob", "max_k")}, draw_rate=draw_rate
            ),
            codec=CodecConfig(draw_rate=draw_rate).to_dict(),
            rows_per_shard=rows_per_shard,
            tokens_per_shard=1 << 20,
        ),
        model_dir=Path("."),
        max_length=24,
        open_rows=lambda: make_rows(num_rows, seed),
        describe=lambda rows: {"num_rows": num_rows},
        tokenizer_json=b'{"version": "1.0"}',
        announcements=("format: seeded",),
    )


def make_config(out: Path, **changes: Any) -> BuildConfig:
    """Settings that go with `make_source`."""
    values: dict[str, Any] = {
        "corpus": "seeded",
        "model": "seeded",
        "out": str(out),
        "heartbeat_seconds": 0.2,
        "draw_rate": 0,
    }
    return BuildConfig(**{**values, **changes})


def contents(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below `directory`."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def kill_self_at(name: str, count: int = 1):
    """A `step` that ends this process, as SIGKILL does, when `name` comes up for the `count`-th time."""
    import signal

    seen = 0

    def step(current: str) -> None:
        nonlocal seen
        if current == name:
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    return step


class Stop(Exception):
    """Raised by a step of `stop_at`."""


def stop_at(name: str) -> Callable[[str], None]:
    """A `step` for `build_cache` that ends the build there."""

    def step(current: str) -> None:
        if current == name:
            raise Stop

    return step


def build(
    out: Path, num_rows: int = 60, *, teacher=SeededTeacher, source=None, step=lambda name: None, **changes
):
    """`build_cache` of these rows by this teacher."""
    return build_cache(
        make_config(out, **changes),
        source=source or make_source(num_rows),
        make_teacher=lambda config, source: teacher(),
        step=step,
    )
