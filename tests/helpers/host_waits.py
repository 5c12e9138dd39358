"""Where the host would wait for a GPU, told on a CPU: every operation whose result, or its size, the host has to see.

What of this a CPU cannot show: copies from the host's memory that do not go on by themselves (`torch.tensor(...,
device=...)`, `.to(device)` without `non_blocking`). benchmarks/gpu counts on a GPU.
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
SEEN_BY_THE_HOST = {"item", "tolist", "__int__", "__float__", "__bool__", "__index__", "numpy", "cpu"}
SIZED_BY_ITS_VALUES = {
    aten.nonzero.default,
    aten.nonzero_numpy.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        waits = func in SIZED_BY_ITS_VALUES and kwargs.get("output_size") is None
        if func in INDEXED:
            waits = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if waits:
            self.found.append(str(func))
        return func(*args, **kwargs)


class HostWaits(TorchFunctionMode):
    """Counts while it is entered; `found` names them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._operations = _Operations(self.found)

    def __enter__(self) -> "HostWaits":
        super().__enter__()
        self._operations.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._operations.__exit__(*error)
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := getattr(func, "__name__", "")) in SEEN_BY_THE_HOST:
            self.found.append(name)
        return func(*args, **(kwargs or {}))
