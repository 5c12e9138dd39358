"""The second half of a capture: encode, write and commit shards in a thread, while the engine runs on.

On a machine with cores to spare the thread has others encode for it. The queue between engine and thread is bounded by
the bytes it holds, so memory does not grow when the disk is slower than the engine. If the thread fails, the error is
raised in the engine's thread at its next call, which never blocks on a thread that is gone; shards that were handed
over completely before are still committed.

Per shard: write `_build/partial/.../shard-N`, write its note, then `commit_exclusive` to `shard-N`.  The note
(counts and digest, named by the digest) comes first, so that a committed shard always has one.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from cache_builder import pace
from cache_builder.commit.build_directory import BuildDirectory
from cache_builder.commit.claims import Claims
from cache_builder.commit.plan import BuildSettings
from cache_builder.commit.signals import shielded
from formats.codec.config import CodecConfig
from formats.disk.manifest import ShardInfo
from formats.disk.row_encoder import EncoderThreads
from formats.disk.shard import ShardWriter
from formats.disk.token_row import TokenRow
from formats.errors import AnnealError
from formats.logprobs.topk import TopKLogprobs

QUEUE_BYTES = 256 << 20
"""What may wait for the writer: about ten thousand rows of the default settings."""
MOST_ENCODER_THREADS = 4
CORES_PER_ENCODER_THREAD = 4
Step = Callable[[str], None]


def encoder_threads(num_cores: int | None = None) -> int:
    """How many threads encode, given the cores that this process may use.

    One encodes what the fastest models deliver (docs/benchmarks.md); more are for captures with many draws, and start
    only when rows wait. 1 is the writing thread itself.
    """
    if num_cores is None:
        num_cores = pace.num_cores()
    return max(1, min(MOST_ENCODER_THREADS, num_cores // CORES_PER_ENCODER_THREAD))


def no_step(name: str) -> None:
    """The default `step`: fault tests put theirs here, to stop a process between any two operations."""


def claim_name(index: int) -> str:
    """Name of the claim on a shard."""
    return f"shard-{index:05d}"


class ShardCommitter:
    """Takes rows with their targets, in the order of the plan. Use as a context manager.

    Leaving it normally waits until everything is committed; leaving it with an exception drops the shard that
    was begun and not ended.
    """

    def __init__(
        self,
        directory: BuildDirectory,
        settings: BuildSettings,
        vocab_size: int,
        claims: Claims,
        *,
        step: Step = no_step,
        on_commit: Callable[[ShardInfo, bool], None] = lambda info, created: None,
        queue_bytes: int | None = None,
    ) -> None:
        self.directory, self._settings, self._vocab_size = directory, settings, vocab_size
        self._codec = CodecConfig(**settings.codec)
        self._claims, self._step, self._on_commit = claims, step, on_commit
        self._limit, self._weight = queue_bytes or QUEUE_BYTES, 0
        self._queue: deque[tuple[str, Any, int]] = deque()
        self._change = threading.Condition()
        self._error: BaseException | None = None
        self._in_flight: set[int] = set()
        self._thread = threading.Thread(target=self._run, name="anneal-writer", daemon=True)

    def __enter__(self) -> "ShardCommitter":
        with shielded():
            self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with shielded():
            with self._change:
                self._queue.append(("stop" if kind is None else "drop", None, 0))
                self._change.notify_all()
            self._thread.join()
        if kind is None:
            self._check()

    def in_flight(self) -> set[int]:
        """Shards handed over and not committed yet."""
        with shielded(), self._change:
            return set(self._in_flight)

    def begin(self, index: int) -> None:
        """Start shard number `index`."""
        self._put("begin", index)

    def row(self, row: TokenRow, topk: TopKLogprobs) -> None:
        """Append one row; blocks while the queue is full."""
        weight = (
            row.input_ids.nbytes
            + topk.token_ids.nbytes * 2
            + topk.log_tail_nodes.nbytes
            + topk.label_logprobs.nbytes
            + topk.draws.offsets.nbytes
            + topk.draws.token_ids.nbytes * 2
            + 512
        )
        self._put("row", (row, topk), weight)

    def end(self, index: int) -> None:
        """The shard begun last is complete: it will be committed even if the engine fails afterwards."""
        with shielded():
            with self._change:
                self._in_flight.add(index)
            self._put("end", index)

    # --- between the threads
    # ----------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if not self._thread.is_alive() and self._queue:
            raise AnnealError("the thread that writes shards is gone; run the same command again")

    def _put(self, kind: str, value: Any, weight: int = 0) -> None:
        while not self._put_within(kind, value, weight, seconds=1.0):
            pass  # a signal gets its turn here

    def _put_within(self, kind: str, value: Any, weight: int, seconds: float) -> bool:
        """Whether there was room."""

        def may_put() -> bool:
            return not self._weight or self._weight + weight <= self._limit or self._error is not None

        with shielded(), self._change:
            if not self._change.wait_for(may_put, seconds) and self._thread.is_alive():
                return False
            self._check()
            self._queue.append((kind, value, weight))
            self._weight += weight
            self._change.notify_all()
        return True

    def _get(self) -> tuple[str, Any]:
        with self._change:
            while not self._queue:
                self._change.wait()
            kind, value, weight = self._queue.popleft()
            self._weight -= weight
            self._change.notify_all()
            return kind, value

    def _run(self) -> None:
        number = encoder_threads()
        with EncoderThreads(number) if number > 1 else contextlib.nullcontext() as pool:
            self._write_shards(pool)

    def _write_shards(self, pool: EncoderThreads | None) -> None:
        shard: _OpenShard | None = None
        try:
            while True:
                kind, value = self._get()
                if kind == "begin":
                    shard = _OpenShard(self, value, pool)
                elif kind == "row":
                    assert shard is not None
                    shard.append(*value)
                elif kind == "end":
                    assert shard is not None
                    shard.commit()
                    shard = None
                    with self._change:
                        self._in_flight.discard(value)
                else:
                    break
        except BaseException as error:
            with self._change:
                self._error = error
        finally:
            if shard is not None:
                shard.drop()
            with self._change:
                if self._error is not None:
                    self._queue.clear()
                    self._weight = 0
                self._change.notify_all()


class _OpenShard:
    """One shard on its way to the disk."""

    def __init__(self, owner: ShardCommitter, index: int, pool: EncoderThreads | None) -> None:
        self._owner, self._index = owner, index
        self._path = owner.directory.new_partial(index)
        capture = owner._settings.capture
        self._which = capture.positions
        self._writer = ShardWriter(
            self._path,
            vocab_size=owner._vocab_size,
            positions=self._which,
            max_k=capture.max_k,
            codec=owner._codec,
            pool=pool,
        )

    def append(self, row: TokenRow, topk: TopKLogprobs) -> None:
        num_expected = len(row.positions(self._which))
        if len(topk) != num_expected:
            raise AnnealError(
                f"a teacher must return one distribution per position, got {len(topk)} for {num_expected} "
                f"in a row of {len(row)} tokens"
            )
        if not np.isfinite(topk.logprobs).all():
            raise AnnealError(
                f"a teacher must return finite logprobs, got NaN or infinity in shard {self._index}; "
                "try --dtype float32, or another engine"
            )
        self._writer.append(row, topk)

    def commit(self) -> None:
        owner, index = self._owner, self._index
        info = self._writer.close(self._path.name)
        owner._step(f"written {index}")
        owner.directory.write_note(index, info)
        owner._step(f"noted {index}")
        created = owner.directory.commit_shard(index, self._path)
        owner._step(f"committed {index}")
        owner._claims.release(claim_name(index))
        self.drop()
        owner._on_commit(info, created)

    def drop(self) -> None:
        """Remove what is left of the temporary file."""
        with contextlib.suppress(Exception):  # pyarrow may complain about a file it could not finish
            self._writer.abort()
        self._owner.directory.drop_partial(self._path)
