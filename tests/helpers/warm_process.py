"""`anneal` typed in a process of its own that finds torch and transformers imported.

An interpreter that imports them takes ten seconds on a small machine. A server (multiprocessing's *forkserver*) does
it once per test process, computes nothing, and is forked for every command: what is tested is a whole process, with
its arguments, its streams, its exit code and the signals it gets. What needs the interpreter's own start (an
argument of Python, another sys.path) uses subprocess.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = (
    "cli",
    "cache_builder.build",
    "cache_builder.teachers.transformers_teacher",
    "trainer.run",
    "trainer.loop.label_annealing_trainer",
    "trainer.evaluation.evaluate",
    "torch._dynamo",
    "accelerate",
    "peft",
    "safetensors.torch",
    "transformers.trainer",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
)
"""The packages themselves import lazily, so what a command needs is named."""


def fork_server() -> ForkServerContext:
    """The one server of this test process, which the first process that is asked for starts."""
    context = multiprocessing.get_context("forkserver")
    # the server reads its path from the environment it is started in
    os.environ["PYTHONPATH"] = os.pathsep.join(
        dict.fromkeys([str(ROOT), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    )
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _run(words: list[str], directory: str, environment: dict[str, str], out: str, err: str) -> None:
    """In the forked process: become the command, then run it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for path, stream in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, stream)
        os.close(file)
    sys.stdout, sys.stderr = (open(stream, "w", encoding="utf-8", closefd=False) for stream in (1, 2))  # noqa: SIM115
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["anneal", *words]
    import cli

    cli.main()


class Command:
    """A started command; `communicate` waits for its end."""

    def __init__(self, *words: str | Path, cwd: Path | None = None) -> None:
        self._files = tempfile.TemporaryDirectory()
        self._paths = [str(Path(self._files.name) / name) for name in ("out", "err")]
        self.words = [str(word) for word in words]
        directory = str(cwd or ROOT)
        self._process: ForkServerProcess = fork_server().Process(
            target=_run, args=(self.words, directory, dict(os.environ), *self._paths)
        )
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def communicate(self, timeout: float = 500) -> subprocess.CompletedProcess[str]:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self.words, timeout)
        texts = (Path(path).read_text(encoding="utf-8") for path in self._paths)
        return subprocess.CompletedProcess(self.words, code, *texts)


def anneal(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, whatever its exit code is."""
    return Command(*words, cwd=cwd).communicate()
