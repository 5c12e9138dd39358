"""Processes for tests that kill, signal or join them, without paying for the imports every time.

A fork server imports torch and transformers once; each process is a fresh fork of it: its own Python, nothing
inherited from the test, killable like any other.
"""

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from warm_process import fork_server

HOUSE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass
class Started:
    """A process and what it writes."""

    process: BaseProcess
    directory: Path

    def text(self, stream: str) -> str:
        """What it wrote so far to `stdout` or `stderr`."""
        path = self.directory / stream
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, timeout: float = 300) -> int:
        """Its exit code; a process that hangs is killed and fails the test."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s: {self.text('stderr')[-2000:]}")
        return self.process.exitcode


def shard_on_cpus() -> None:
    """Let FSDP be FSDP: where there are no GPUs accelerate takes the plugin, says nothing, and runs DDP."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    on_gpus = AcceleratorState.__init__

    def __init__(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        on_gpus(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = __init__  # type: ignore[method-assign]


def _child(directory: str, environment: dict[str, str], function: Callable[..., Any], args: tuple) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        descriptor = os.open(Path(directory) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    code = 1
    try:
        if "RANK" in environment:
            shard_on_cpus()
        function(*args)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(Exception):
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        os._exit(code)


def start(directory: Path, function: Callable[..., Any], *args: Any, **environment: str) -> Started:
    """Run `function(*args)` in a new process; its output goes to files in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    settings: Mapping[str, str] = {**HOUSE, **environment}
    process = fork_server().Process(target=_child, args=(str(directory), dict(settings), function, args))
    process.start()
    return Started(process, directory)


def run_ranks(directory: Path, world_size: int, function: Callable[..., Any], *args: Any) -> list[Started]:
    """Run the function on several ranks, as torchrun would; fails unless all of them end well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in range(world_size):
        names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        names |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(start(directory / f"rank-{rank}", function, *args, **names))
    codes = [started.wait(400) for started in ranks]
    assert codes == [0] * world_size, "\n".join(started.text("stderr")[-3000:] for started in ranks)
    return ranks
