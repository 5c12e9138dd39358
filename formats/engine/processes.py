"""The processes of a running engine (`vllm.LLMEngine`): which they are, what ended them, and their end."""

import contextlib
import signal
import threading
import time
from multiprocessing import connection
from typing import Any

SHUTDOWN_SECONDS = 2.0
"""Then the engine is killed: its workers would take six, and by now nothing in it is worth waiting for."""

COLLECTING_CHECKS = 200
"""Of an ended process's code, a hundredth of a second apart: then nobody is collecting it."""


def processes_of(engine: Any) -> list[Any]:
    """The engine's own processes (`multiprocessing.Process`); none where Ray or this process runs it."""
    manager = getattr(getattr(engine.engine_core, "resources", None), "engine_manager", None)
    return list(getattr(manager, "processes", ()))


def wake_when_killed(engine: Any) -> None:
    """Have `step` raise when a process of the engine is gone without a word, as one that is killed.

    vLLM 0.32 notices that and closes its sockets, but tells nobody who waits for an output: that would wait for ever.
    """
    client, processes = engine.engine_core, processes_of(engine)
    outputs = getattr(client, "outputs_queue", None)
    if outputs is None or not processes:
        return

    def watch() -> None:
        connection.wait([process.sentinel for process in processes])
        outputs.put_nowait(RuntimeError("a process of the engine has ended"))  # read by nobody after its end

    threading.Thread(target=watch, name="anneal-engine-watch", daemon=True).start()


def killed_by(engine: Any) -> str:
    """Which signal ended a process of the engine, in a line for the user; empty if none did."""
    for process in processes_of(engine):
        code = exit_code(process)
        if code is not None and code < 0:
            line = f"its process was ended by {signal.Signals(-code).name}"
            return line + (", as the system does where memory runs out" if -code == signal.SIGKILL else "")
    return ""


def exit_code(process: Any) -> int | None:
    """`process.exitcode`, also in the moment in which another thread collects it; None while the process runs.

    vLLM waits for its processes in a thread of its own. The system tells a process's end once, so whoever asks
    between that and the other thread's taking note of it would be told None, as of a process that runs.
    """
    code: int | None = process.exitcode
    for _ in range(COLLECTING_CHECKS):
        if code is not None or not connection.wait([process.sentinel], 0):
            break
        time.sleep(0.01)
        code = process.exitcode
    return code


def shut_down(engine: Any) -> None:
    """Stop the engine's processes."""
    with contextlib.suppress(Exception):
        engine.engine_core.shutdown(timeout=SHUTDOWN_SECONDS)
