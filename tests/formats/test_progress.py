"""What is shown: a bar only on a terminal, rates from the first row on, units that people read."""

import io

import pytest

from formats import progress as progress_module
from formats.progress import ConsoleProgress, Progress, format_bytes, format_seconds


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def test_plain_lines_at_intervals_with_rates_and_time_left(clock: Clock) -> None:
    stream = io.StringIO()
    shown = ConsoleProgress(stream, interval_seconds=10)
    shown.start("capture", 100, done=20)
    clock.now += 300  # the engine starts: not the rows' fault
    shown.advance(10, 1000)
    for _ in range(4):
        clock.now += 5
        shown.advance(10, 1000)
    shown.wrote(5000, 2000)
    clock.now += 10
    shown.advance(1, 100)
    shown.finish()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "capture: 30 of 100 rows"
    assert "capture: 50 of 100 rows, 2.0 rows/s, 200 tokens/s, 25 s left" in lines
    assert "2.5 bytes/token" in lines[-1]
    assert len(lines) == 4


def test_the_clock_of_the_rates_starts_when_the_engine_is_up(clock: Clock) -> None:
    """Slow from the first row on: 216 tokens/s are shown as such, and the first rows bring the first line."""
    stream = io.StringIO()
    shown = ConsoleProgress(stream, interval_seconds=10)
    shown.start("capture", 100)
    clock.now += 60  # the engine starts
    shown.running()
    clock.now += 5
    shown.advance(4, 1080)
    clock.now += 5
    shown.advance(4, 1080)
    clock.now += 5
    shown.advance(4, 1080)
    assert stream.getvalue().splitlines() == [
        "capture: 4 of 100 rows, 0.8 rows/s, 216 tokens/s, 2 min 0 s left",
        "capture: 12 of 100 rows, 0.8 rows/s, 216 tokens/s, 1 min 50 s left",
    ]


def test_a_terminal_gets_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    shown = ConsoleProgress(stream)
    shown.start("capture", 10)
    shown.advance(5, 500)
    shown.note("a word in between")
    shown.finish()
    assert "a word in between\n" in stream.getvalue() and "capture" in stream.getvalue()


def test_the_default_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    silent = Progress()
    silent.start("x", 3)
    silent.advance(1)
    silent.note("y")
    silent.wrote(1, 1)
    silent.finish()
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59, "59 s"), (200, "3 min 20 s"), (18720, "5 h 12 min"), (-3, "0 s")],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (4100, "4.1 kB"), (1.3e9, "1.3 GB"), (5e15, "5000.0 TB")],
)
def test_bytes(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_what_takes_minutes_each_has_its_minutes_shown(clock: Clock) -> None:
    stream = io.StringIO()
    shown = ConsoleProgress(stream, interval_seconds=10)
    shown.start("sweep", 8, unit="run")
    shown.running()
    for _ in range(2):
        clock.now += 150
        shown.advance(1)
    assert stream.getvalue().splitlines() == [
        "sweep: 1 of 8 runs, 2 min 30 s for each run, 17 min 30 s left",
        "sweep: 2 of 8 runs, 2 min 30 s for each run, 15 min 0 s left",
    ]
