"""A signal stops a build between two of its operations with other threads, never within one."""

import os
import signal
import threading
import time

import pytest

from cache_builder.commit import signals
from cache_builder.commit.signals import BuildInterrupted, interruptible, shielded


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_a_shielded_block(number: signal.Signals) -> None:
    reached = []
    with pytest.raises(BuildInterrupted) as error, interruptible():
        with shielded():
            with shielded():
                os.kill(os.getpid(), number)
                reached.append("inner")
            reached.append("outer")
        reached.append("after")
    assert reached == ["inner", "outer"]
    assert error.value.exit_code == 128 + number


def test_outside_of_it_a_signal_raises_at_once() -> None:
    reached = []
    with pytest.raises(BuildInterrupted), interruptible():
        with shielded():
            reached.append("shielded")
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("after")
    assert reached == ["shielded"]


def test_a_shield_is_let_down_by_an_error_and_spent_by_its_signal() -> None:
    with interruptible(), pytest.raises(ValueError, match="inside"), shielded():
        raise ValueError("inside")
    with pytest.raises(BuildInterrupted), interruptible(), shielded():
        os.kill(os.getpid(), signal.SIGTERM)
    with interruptible(), shielded():
        pass  # the signal before is not raised a second time


def test_other_threads_shield_nothing() -> None:
    """Only the main thread is given signals: a block that another one is in must not keep them away."""
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with shielded():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    try:
        with pytest.raises(BuildInterrupted), interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the signal must raise at once")
    finally:
        leave.set()
        thread.join()


def test_what_swallows_a_signal_gets_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare `except:` of some library that an engine imports: the build waited for its engine ten minutes."""
    monkeypatch.setattr(signals, "REPEAT_SECONDS", 0.05)
    swallowed = []
    with pytest.raises(BuildInterrupted) as error, interruptible():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as found:
            swallowed.append(found)
        threading.Event().wait(60)
        pytest.fail("the signal must be raised again")
    assert len(swallowed) == 1 and error.value.exit_code == 143


def test_what_tidies_up_after_a_signal_is_left_in_peace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "REPEAT_SECONDS", 0.02)
    seen: list[int] = []
    real = signal.pthread_kill

    def counted(thread: int, number: int) -> None:
        real(thread, number)
        seen.append(number)

    monkeypatch.setattr(signal, "pthread_kill", counted)
    tidied = []
    with pytest.raises(BuildInterrupted), interruptible():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            try:
                raise ValueError("on the way out")
            except ValueError:
                while len(seen) < 3:
                    time.sleep(0.001)
            tidied.append("all")
    assert tidied == ["all"]
    with interruptible():
        pass  # and nothing of it is left
    assert signal.getsignal(signal.SIGURG) == signal.SIG_DFL
