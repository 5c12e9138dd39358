"""What a long command says while it works: a bar on a terminal, plain lines elsewhere, nothing when imported.

Everything goes to stderr; stdout belongs to results.
"""

import sys
import time
from typing import Any, TextIO

PLAIN_INTERVAL_SECONDS = 10.0
FIRST_LINE_SECONDS = 2.0
"""After the start of the work the first line comes this early, if there is anything to tell."""


class Progress:
    """The silent progress: every method does nothing. Library callers may subclass it."""

    def note(self, text: str) -> None:
        """One line of information."""

    def start(self, what: str, total: int | None, done: int = 0, *, unit: str = "row") -> None:
        """Begin a phase of `total` rows (None: unknown), of which `done` were finished earlier.

        What is counted may be something else than rows: `unit` names one of it.
        """

    def running(self) -> None:
        """What the phase waited for is there, such as an engine: the clock of its rates starts now."""

    def advance(self, num_rows: int, num_tokens: int = 0) -> None:
        """Some rows passed through the engine or the tokeniser."""

    def wrote(self, num_bytes: int, num_tokens: int) -> None:
        """A shard was committed."""

    def clear(self) -> None:
        """Something else writes to the terminal now: what is drawn there goes, until the phase moves on."""

    def finish(self) -> None:
        """End the phase."""


class ConsoleProgress(Progress):
    """A tqdm bar on a terminal, a line every ten seconds otherwise."""

    def __init__(
        self, stream: TextIO | None = None, *, interval_seconds: float = PLAIN_INTERVAL_SECONDS
    ) -> None:
        self._stream = stream or sys.stderr
        self._interval = interval_seconds
        self._bar: Any = None
        self._what, self._unit, self._done = "", "row", 0
        self._total: int | None = None
        self._rows = self._tokens = self._bytes = self._written = 0
        self._first: tuple[float, int, int] | None = None
        self._printed = 0.0

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        print(text, file=self._stream, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def start(self, what: str, total: int | None, done: int = 0, *, unit: str = "row") -> None:
        self.finish()
        self._what, self._unit, self._total, self._done = what, unit, total, done
        self._rows = self._tokens = self._bytes = self._written = 0
        self._first = None
        self._printed = time.monotonic()
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                desc=what,
                total=total,
                initial=done,
                unit=unit,
                file=self._stream,
                dynamic_ncols=True,
                leave=False,
            )

    def running(self) -> None:
        now = time.monotonic()
        self._first = (now, self._rows, self._tokens)
        self._printed = now - self._interval + min(FIRST_LINE_SECONDS, self._interval)

    def advance(self, num_rows: int, num_tokens: int = 0) -> None:
        self._rows += num_rows
        self._tokens += num_tokens
        if self._first is None:
            # Nobody said when the work began: the clock of the rates starts with the first rows.
            self._first = (time.monotonic(), self._rows, self._tokens)
        if self._bar is not None:
            self._bar.update(num_rows)
            self._bar.set_postfix_str(self._rates(), refresh=False)
        elif time.monotonic() - self._printed >= self._interval:
            self._printed = time.monotonic()
            total = f" of {self._total}" if self._total is not None else ""
            rates = f", {self._rates()}{self._left()}" if self._rows > self._first[1] else ""  # not yet known
            self.note(f"{self._what}: {self._done + self._rows}{total} {self._unit}s{rates}")

    def wrote(self, num_bytes: int, num_tokens: int) -> None:
        self._bytes += num_bytes
        self._written += num_tokens

    def clear(self) -> None:
        if self._bar is not None:
            self._bar.clear()

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _rates(self) -> str:
        began, rows, tokens = self._first or (time.monotonic(), 0, 0)
        elapsed = max(time.monotonic() - began, 1e-3)
        rate = (self._rows - rows) / elapsed
        slow = 0 < rate < 0.1
        text = f"{format_seconds(1 / rate)} for each {self._unit}" if slow else f"{rate:.1f} {self._unit}s/s"
        if self._tokens:
            text += f", {(self._tokens - tokens) / elapsed:,.0f} tokens/s"
        return text + (f", {self._bytes / self._written:.1f} bytes/token" if self._written else "")

    def _left(self) -> str:
        began, rows, _ = self._first or (0.0, 0, 0)
        if self._total is None or self._rows == rows:
            return ""
        left = self._total - self._done - self._rows
        return f", {format_seconds((time.monotonic() - began) * left / (self._rows - rows))} left"


def format_seconds(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `5 h 12 min`."""
    seconds = max(round(seconds), 0)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def counted(count: int, noun: str) -> str:
    """`1 shard`, `2 shards`, `0 rows`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def format_bytes(num_bytes: float) -> str:
    """`812 B`, `4.1 kB`, `1.3 GB`: powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError
