"""SIGTERM as an exception, as Ctrl-C is one: what is tidied up after the one is tidied up after the other."""

import os
import signal
import threading
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A signal ended the command. A `KeyboardInterrupt`, so that no `except Exception` on the way swallows it.

    Args:
        number: of the signal.
        message: a line for the user, which `str()` gives.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = 128 + number
        """What a shell expects: 130 for Ctrl-C, 143 for SIGTERM."""

    def __str__(self) -> str:
        return self.message


def raise_on_sigterm() -> None:
    """From here on the first SIGTERM raises `Interrupted` in the main thread, and a second one kills as usual.

    Nothing changes outside the main thread, or where SIGTERM is handled or ignored already. Blocks with a handler of
    their own (training, a build, the runs of a sweep) put this one back when they end.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != owner:  # a forked child, such as a loader's worker, ends as if this were not here
            os.kill(os.getpid(), number)
            return
        raise Interrupted(number)

    signal.signal(signal.SIGTERM, stop)
