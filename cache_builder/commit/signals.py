"""Ctrl-C and SIGTERM stop a build in order: the running shard is dropped or committed whole, and the build
says so."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_depth = 0
_waiting: int | None = None


class BuildInterrupted(KeyboardInterrupt):
    """A signal ended the build; everything committed stays, and the same command resumes.

    A `KeyboardInterrupt`, so that no `except Exception` on the way swallows it. `str()` is a line for the
    user.
    """

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message)
        self.signum = signum
        self.message = message

    def __str__(self) -> str:
        return self.message

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM: what a shell expects."""
        return 128 + self.signum


@contextmanager
def interruptible() -> Iterator[None]:
    """Within this block SIGINT and SIGTERM raise `BuildInterrupted`; a second one kills the process as usual.

    They raise between two bytecodes, wherever the main thread is; `shielded` keeps them out of a block.
    Outside the main thread, where Python delivers no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(signum: int, frame: FrameType | None) -> None:
        global _waiting
        for number in before:
            signal.signal(number, signal.SIG_DFL)
        if _depth:
            _waiting = signum
        else:
            raise BuildInterrupted(signum)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


@contextmanager
def shielded() -> Iterator[None]:
    """Within this block of the main thread `BuildInterrupted` waits for the block's end.

    For what is shared with another thread. `Condition.__enter__` is Python code: an exception between its
    taking the lock and the `with` that will give it back leaves it taken for ever, and the other thread hangs.
    """
    global _depth, _waiting
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if not _depth and _waiting is not None:
            signum, _waiting = _waiting, None
            raise BuildInterrupted(signum)
