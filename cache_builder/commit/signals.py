"""Ctrl-C and SIGTERM stop a build in order: the running shard is dropped or committed whole, and the build
says so."""

import _thread
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from formats.interruption import Interrupted

REPEAT_SECONDS = 2.0
"""How long after a signal it is raised again, if nothing is being unwound."""

_depth = 0
_waiting: int | None = None


class BuildInterrupted(Interrupted):
    """A signal ended the build; everything committed stays, and the same command resumes."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Within this block SIGINT and SIGTERM raise `BuildInterrupted`; a second one kills the process as usual.

    They raise between two bytecodes, wherever the main thread is; `shielded` keeps them out of a block. What
    swallows the exception there (a bare `except:`, a destructor) gets it again every `REPEAT_SECONDS`: an engine
    that starts imports a great deal of other people's code, and would be waited for as if nothing had been said.
    Outside the main thread, where Python delivers no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGURG, signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    main = threading.get_ident()
    first: int | None = None
    over = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal first
        first = signum
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGURG, again)  # ignored by default, so that one too many does no harm
        _thread.start_new_thread(repeat, ())  # takes no lock, which the main thread may hold just now
        _raise(signum)

    def again(signum: int, frame: FrameType | None) -> None:
        if first is not None and not _unwinding():
            _raise(first)

    def repeat() -> None:
        while True:
            time.sleep(REPEAT_SECONDS)
            if over:
                return
            signal.pthread_kill(main, signal.SIGURG)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        over = True
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _raise(signum: int) -> None:
    """Or let it wait for the end of the shielded block."""
    global _waiting
    if _depth:
        _waiting = signum
    else:
        raise BuildInterrupted(signum)


def _unwinding() -> bool:
    """Is `BuildInterrupted` on its way out, that is in a `finally`, an `except` or an `__exit__` just now?"""
    found: BaseException | None = sys.exception()
    while found is not None and not isinstance(found, BuildInterrupted):
        found = found.__context__
    return found is not None


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
