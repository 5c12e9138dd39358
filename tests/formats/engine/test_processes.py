"""What ended a process, also while another thread collects its end."""

import multiprocessing
import os
import signal
import time

from formats.engine import processes


def _sleep() -> None:
    time.sleep(600)


def test_a_code_that_another_thread_collects_is_waited_for(monkeypatch) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_sleep)
    process.start()
    assert processes.exit_code(process) is None
    os.kill(process.pid, signal.SIGKILL)
    # The system tells the end of a process once; whoever was told writes it down a moment later.
    os.waitpid(process.pid, 0)
    assert process.exitcode is None, "what a second thread sees meanwhile"

    def a_moment(seconds: float) -> None:
        process._popen.returncode = -signal.SIGKILL

    monkeypatch.setattr(processes.time, "sleep", a_moment)
    assert processes.exit_code(process) == -signal.SIGKILL
