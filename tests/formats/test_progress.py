"""What is shown: a bar only on a terminal, rates from the first row on, units that people read."""

import io

import pytest

from cache_builder.report import rough_bytes
from formats.capture_settings import CaptureSettings
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


def test_the_rough_size_falls_with_the_threshold() -> None:
    captures = [CaptureSettings(min_prob=p, draw_rate=0) for p in (0.0, 1e-3, 3e-3, 1e-2)]
    sizes = [rough_bytes(1000, 1000, capture) for capture in captures]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] > 5000
    assert rough_bytes(1000, 0, captures[1]) == 5000
