"""Rows in, their payloads out in the same order: encoded a group at a time, and by several threads where a pool is
given.

Most of the work runs outside Python's lock (numpy, zstd), so threads do as processes would, and share the rows. A
group is large enough that a call costs little beside what it does, and small enough for a core's cache. In memory are
at most `MOST_GROUPS` groups per thread, and `MOST_NUMBERS` numbers or one group.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from formats.codec.encoder import Encoder, Labelled
from formats.disk.token_row import TokenRow
from formats.logprobs.topk import TopKLogprobs

GROUP_NUMBERS = 1 << 16
"""A group ends with the row that brings it to so many tokens, positions, kept entries and draws."""
MOST_GROUPS = 4
MOST_NUMBERS = 1 << 22
"""Some 40 MB."""
Encoded = tuple[TokenRow, bytes]


class EncoderThreads(ThreadPoolExecutor):
    """So many threads that encode; they start when there is work for them."""

    def __init__(self, number: int) -> None:
        super().__init__(number, thread_name_prefix="anneal-encoder")
        self.number = number


class RowEncoder:
    """Encodes the rows of one shard.

    Args:
        encoder: of the shard.
        positions: which positions of a row are captured.
        pool: encodes; None does it in the caller's thread.
    """

    def __init__(self, encoder: Encoder, positions: str, pool: EncoderThreads | None = None) -> None:
        self._encoder, self._positions, self._pool = encoder, positions, pool
        self._most = MOST_GROUPS * pool.number if pool is not None else 0
        self._group: list[tuple[TokenRow, Labelled]] = []
        self._size = self._total = 0
        self._running: deque[tuple[Future[list[bytes]] | list[bytes], list[TokenRow], int]] = deque()

    def add(self, row: TokenRow, teacher: TopKLogprobs) -> Iterator[Encoded]:
        """Take one row; whatever is done by now comes back.

        Raises:
            ValueError: see `Encoder.encode_all`; of this row or of one before it.
        """
        self._group.append((row, (teacher, row.label_ids(self._positions))))
        self._size += len(row) + len(teacher) + teacher.num_entries + len(teacher.draws.token_ids)
        if self._size >= GROUP_NUMBERS:
            self._start()
        while len(self._running) > self._most or (self._total > MOST_NUMBERS and len(self._running) > 1):
            yield from self._oldest()

    def rest(self) -> Iterator[Encoded]:
        """Everything that `add` has not given back. Errors as there."""
        self._start()
        while self._running:
            yield from self._oldest()

    def cancel(self) -> None:
        """Nobody wants the rest: begin nothing more."""
        for job, _, _ in self._running:
            if isinstance(job, Future):
                job.cancel()
        self._running.clear()
        self._group.clear()
        self._size = self._total = 0

    def _start(self) -> None:
        if not self._group:
            return
        rows, labelled = [row for row, _ in self._group], [teacher for _, teacher in self._group]
        self._group.clear()
        if self._pool is None:
            self._running.append((self._encoder.encode_all(labelled), rows, self._size))
        else:
            self._running.append((self._pool.submit(self._encoder.encode_all, labelled), rows, self._size))
        self._total += self._size
        self._size = 0

    def _oldest(self) -> Iterator[Encoded]:
        job, rows, size = self._running.popleft()
        self._total -= size
        payloads = job.result() if isinstance(job, Future) else job
        yield from zip(rows, payloads, strict=True)
