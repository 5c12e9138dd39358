"""The environment that an engine's processes inherit: how they start, whose they are, and what they keep quiet."""

import contextlib
import os
from collections.abc import Iterator

PARENT_VARIABLE = "ANNEAL_ENGINE_PARENT"
"""Set while an engine starts to the process id of its owner; inherited by the engine's processes."""

FEW_CORES = 4
"""vLLM on a CPU pins its worker and keeps a core free for the scheduler, which would halve two cores.  Up to
so many cores the worker is left unpinned and uses all of them; VLLM_CPU_OMP_THREADS_BIND overrides it."""


def quiet_environment(debug: bool, *, local: bool) -> None:
    """Defaults for what the user has not set: a quiet log, no network for a model that is a directory."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO" if debug else "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # On a GPU vLLM would fork: plugins that this process has loaded are not loaded again then, and the engine would
    # neither know our architectures for sure nor end with us.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if len(os.sched_getaffinity(0)) <= FEW_CORES:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if local:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


@contextlib.contextmanager
def child_environment(debug: bool) -> Iterator[None]:
    """What processes started inside inherit: whose they are, a last word of a process that crashes, and no warnings of
    other people's libraries.

    An engine whose processes know that ends when its owner does (`cache_builder.teachers.vllm_plugin`).
    """
    added = {PARENT_VARIABLE: str(os.getpid())}
    if "PYTHONFAULTHANDLER" not in os.environ:
        added["PYTHONFAULTHANDLER"] = "1"  # a process that crashes says by what (`EngineLog.cause`)
    if not debug and "PYTHONWARNINGS" not in os.environ:
        added["PYTHONWARNINGS"] = "ignore"
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
