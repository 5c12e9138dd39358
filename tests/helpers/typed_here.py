"""`anneal` typed in the test's own process: quick, and with what the test has patched."""

import sys
from collections.abc import Callable

import pytest

Run = Callable[..., tuple[int, str, str]]
"""Words -> exit code, stdout, stderr."""


def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    """Run `anneal WORDS...`; what was printed before does not count."""
    import cli

    monkeypatch.setattr(sys, "argv", ["anneal", *map(str, words)])
    capsys.readouterr()
    code: int | str | None = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    return int(code or 0), printed.out, printed.err


def one_line(err: str) -> str:
    """The error message, after progress lines; fails unless it is exactly one line without a traceback."""
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    return errors[0]
