"""What torch.compile writes for a GPU that is not there: Inductor's source for an H100 (sm_90), made on a CPU.

Only the questions it asks of the device are answered for it; lowering, scheduling and code generation are its own. Run
it in a process of its own: the answers are patched into torch.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._inductor import compile_fx, decomposition, graph
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Properties(NamedTuple):
    """Of an H100, as `torch.cuda.get_device_properties` names them."""

    name: str = "NVIDIA H100"
    major: int = 9
    minor: int = 0
    total_memory: int = 80 << 30
    multi_processor_count: int = 132
    warp_size: int = 32
    regs_per_multiprocessor: int = 65536
    max_threads_per_multi_processor: int = 2048
    max_threads_per_block: int = 1024
    shared_memory_per_block: int = 49152
    shared_memory_per_multiprocessor: int = 233472
    shared_memory_per_block_optin: int = 232448
    L2_cache_size: int = 50 << 20
    gcnArchName: str = ""


class _Driver:
    """Triton's, of no device."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0


class _Written(Exception):
    """The source is there; nothing is compiled."""


@contextlib.contextmanager
def _answers(sources: list[str]) -> Iterator[None]:
    real = graph.GraphLowering.codegen

    def codegen(self: Any, *args: Any, **kwargs: Any) -> Any:
        written = real(self, *args, **kwargs)[0]
        sources.append(getattr(written, "value", written))
        raise _Written

    answers: dict[str, Any] = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.get_device_capability": lambda device=None: (9, 0),
        "torch.cuda.get_device_properties": lambda device=None: Properties(),
        "torch.cuda._get_device_properties": lambda device: Properties(),
        "torch.cuda._exchange_device": lambda device: 0,
        "torch.cuda._maybe_exchange_device": lambda device: 0,
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.synchronize": lambda *_: None,
        "torch.cuda.get_arch_list": lambda: ["sm_90"],
        "torch.cuda.get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "torch.cuda.set_rng_state": lambda *_: None,
        "torch.version.cuda": "13.0",
        "torch._inductor.graph.GraphLowering.codegen": codegen,
    }
    driver.set_active(_Driver())
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, answer, create=True))
        yield


def source_of(function: Callable[..., Any], *inputs: torch.Tensor) -> str:
    """Python source with Triton kernels in it.

    Args:
        inputs: CPU tensors of the shapes it is wanted for.
    """
    traced = make_fx(function, decomposition_table=decomposition.select_decomp_table())(*inputs)
    sources: list[str] = []
    with FakeTensorMode(), _answers(sources):
        for node in traced.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                node.meta["val"] = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device="cuda"
                )
        there = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in inputs]
        try:
            compile_fx.compile_fx_inner(traced, there)
        except Exception:
            if not sources:
                raise
    assert len(sources) == 1, "nothing was written"
    return sources[0]


def kernels(source: str) -> dict[str, str]:
    """The body of every Triton kernel, by name."""
    parts = re.split(r"^def (triton_\w+)\(", source, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))
