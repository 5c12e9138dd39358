"""What an engine's processes print, kept in a file instead of on the user's screen.

The processes inherit the standard output and error of the moment they start in. Their warnings are about
things a user of this program cannot change, and what they print to standard output would mix with ours; but
where an engine fails, the cause stands there and nowhere else.
"""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

TAIL_BYTES = 1 << 20
ERROR_LINE = re.compile(r"\b([A-Z]\w*(?:Error|Exception|Interrupt)): +(\S.*)")
CONSEQUENCES = (
    "initialization failed",
    "EngineDeadError",
    "died unexpectedly",
    "See root cause",
    ": cancelled",
)
"""Parts of errors that only report another one."""
CRASH = re.compile(r"^Fatal Python error: (\w.*)", re.MULTILINE)
"""What Python's fault handler prints where a signal such as SIGILL or SIGSEGV ends a process."""
NO_WORD = "one of its processes ended without a word, as when the system kills it because memory runs out"


class EngineLog:
    """A temporary file for what processes print; `shown` leaves everything on the screen."""

    def __init__(self, *, shown: bool) -> None:
        self._file = None if shown else tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the engine)

    @contextlib.contextmanager
    def inherited(self) -> Iterator[None]:
        """Processes started inside write to the file for as long as they live; so does this one, inside."""
        if self._file is None:
            yield
            return
        kept = [(number, os.dup(number)) for number in (1, 2)]
        _flush()
        try:
            for number, _ in kept:
                os.dup2(self._file.fileno(), number)
            yield
        finally:
            _flush()
            for number, copy in kept:
                os.dup2(copy, number)
                os.close(copy)

    def text(self) -> str:
        """The end of what was printed."""
        if self._file is None:
            return ""
        descriptor = self._file.fileno()
        size = os.fstat(descriptor).st_size
        # pread: the processes share the file's position.
        return os.pread(descriptor, TAIL_BYTES, max(0, size - TAIL_BYTES)).decode(errors="replace")

    def cause(self) -> str:
        """A crash, or else the last error that is no consequence of another, in one line; empty if there is none."""
        text = self.text()
        if crash := CRASH.search(text):
            return f"one of its processes crashed: {crash[1].strip()}"[:300]
        found = [match for line in text.splitlines() if (match := ERROR_LINE.search(line))]
        causes = [m for m in found if not any(part in m[0] for part in CONSEQUENCES)]
        return f"{causes[-1][1]}: {causes[-1][2].strip()}"[:300] if causes else ""

    def explain(self, otherwise: str) -> str:
        """The cause, or `otherwise` where the log names none, and where to see more if it is hidden."""
        if any(part in otherwise for part in CONSEQUENCES):  # of something that left no line
            otherwise = NO_WORD
        return (self.cause() or otherwise) + (
            "; --debug shows its whole log" if self._file is not None else ""
        )


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
