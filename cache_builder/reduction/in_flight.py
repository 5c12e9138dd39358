"""Work on a device in pieces that ask the host for sizes, several of them under way at a time.

A piece is a generator: it queues work on the device, yields a tensor of whole numbers that it needs on the host before
it can queue more, is sent them as a list, and returns its result. While the host waits for one piece's numbers and
prepares what follows, a GPU works on the pieces behind it; so it is idle neither while it is asked nor while the host
queues many small operations. All is queued on one stream, in the same order every time: the results do not depend on
how many pieces are under way.
"""

from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

import torch

GPU_PIECES = 3
"""One whose logits are being computed, one that picks, one that hands over."""
Result = TypeVar("Result")
Piece = Generator[torch.Tensor, list[int], Result]


class _Numbers:
    """Numbers on their way to the host, behind all that was queued before them and before what is queued later."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self._host, self._there = numbers, None
        if numbers.device.type == "cuda":
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._there = torch.cuda.current_stream(numbers.device).record_event()

    def wait(self) -> list[int]:
        """Until they are there."""
        if self._there is not None:
            self._there.synchronize()
        return self._host.tolist()


class _UnderWay(Generic[Result]):
    """A piece that has been started."""

    def __init__(self, piece: Piece[Result]) -> None:
        self._piece: Piece[Result] | None = piece
        self.result: list[Result] = []
        """One result once it is done."""
        self._numbers = _Numbers(next(piece))

    def advance(self) -> None:
        """Wait for its numbers and let it queue what follows, unless it is done."""
        if self._piece is not None:
            try:
                self._numbers = _Numbers(self._piece.send(self._numbers.wait()))
            except StopIteration as stop:
                self.result.append(stop.value)
                self._piece = None  # and with it what it held on the device

    def finish(self) -> Result:
        """Advance to the end."""
        while not self.result:
            self.advance()
        return self.result[0]


def run_in_order(pieces: Iterator[Piece[Result]], device_type: str) -> list[Result]:
    """The results of all pieces, in their order.

    Args:
        pieces: taken one at a time, so that each may compute what it works on when its turn comes.
        device_type: a CPU has one piece at a time.
    """
    most = 1 if device_type == "cpu" else GPU_PIECES
    results: list[Result] = []
    active: list[_UnderWay[Result]] = []
    while True:
        while len(active) >= most or (active and active[0].result):
            results.append(active.pop(0).finish())
        piece = next(pieces, None)
        if piece is None:
            return results + [each.finish() for each in active]
        active.append(_UnderWay(piece))
        del piece
        for each in active[:-1]:
            each.advance()
