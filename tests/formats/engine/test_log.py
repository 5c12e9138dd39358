"""What child processes print goes to the log, ours to the screen, and the cause of a failure is found."""

import os
import signal
import subprocess
import sys

from formats.engine.environment import child_environment
from formats.engine.log import EngineLog

TALK = "import sys; print('to out'); print('to err', file=sys.stderr)"


def test_processes_started_inside_print_to_the_log(capfd):
    log = EngineLog(shown=False)
    with log.inherited():
        child = subprocess.Popen([sys.executable, "-c", f"import sys; sys.stdin.read(); {TALK}"], stdin=-1)
        os.write(1, b"ours, inside\n")
    os.write(1, b"ours, outside\n")
    child.communicate()
    assert sorted(log.text().split("\n")) == ["", "ours, inside", "to err", "to out"]
    assert capfd.readouterr() == ("ours, outside\n", "")


def test_the_screen_comes_back_after_an_error(capfd):
    before = len(os.listdir("/proc/self/fd"))
    log = EngineLog(shown=False)
    try:
        with log.inherited():
            raise ValueError
    except ValueError:
        os.write(2, b"visible")
    assert capfd.readouterr().err == "visible"
    del log
    assert len(os.listdir("/proc/self/fd")) == before


def test_shown_leaves_everything_on_the_screen(capfd):
    log = EngineLog(shown=True)
    with log.inherited():
        subprocess.run([sys.executable, "-c", TALK], check=True)
    assert capfd.readouterr() == ("to out\n", "to err\n") and log.text() == log.cause() == ""


def test_the_cause_is_the_last_error_that_is_not_a_consequence():
    log = EngineLog(shown=False)
    with log.inherited():
        os.write(2, b"(Worker pid=7) ERROR 11-22 [multiproc.py:1] ValueError: head_dim must be even\n")
        os.write(1, b"RuntimeError: Engine core initialization failed. See root cause above.\n\xff\n")
    assert log.cause() == "ValueError: head_dim must be even"
    assert EngineLog(shown=False).cause() == ""


def test_a_process_that_left_no_line_is_no_root_cause_above():
    log = EngineLog(shown=False)
    with log.inherited():
        os.write(2, b"ERROR 11-27 [multiproc.py:1] Worker proc VllmWorker-0 died unexpectedly\n")
        os.write(2, b"ERROR 11-27 [core.py:1] RuntimeError: cancelled\n")
    for said in ("RuntimeError: cancelled", "Engine core initialization failed. See root cause above."):
        assert log.explain(said).startswith(
            "one of its processes ended without a word, as when the system kills"
        )
    assert log.explain("ValueError: odd").startswith("ValueError: odd; --debug")


def test_a_process_that_crashes_is_named(monkeypatch):
    """By the signal's name, as Python's fault handler writes it, although another error follows from it."""
    monkeypatch.delenv("PYTHONFAULTHANDLER", raising=False)
    log = EngineLog(shown=False)
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
    with child_environment(debug=False), log.inherited():
        assert subprocess.run([sys.executable, "-c", crash]).returncode == -signal.SIGILL
        os.write(2, b"ERROR 11-27 [core.py:1] RuntimeError: cancelled\n")
    assert log.explain("RuntimeError: cancelled") == (
        "one of its processes crashed: Illegal instruction; --debug shows its whole log"
    )
