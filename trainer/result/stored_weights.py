"""Tensors of models on the disk: read by name, one at a time; written in the layout of the initial model.

A result has the files of the initial model: the same names, tensors, dtypes and order, other bytes. So a
weight that is stored once stays stored once, whatever the model in memory calls it, and nothing is held in
memory but the tensor at hand. Weights that lie in `pytorch_model*.bin` are written as safetensors, file by
file. Training and `anneal merge` share this writer.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from formats.errors import ConfigError, one_line
from formats.identity.fingerprint import weight_files
from formats.identity.tensor_hash import read_header

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    **{"U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16},
    **{"U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
}
"""Names of dtypes in a safetensors header."""
INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what it is."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    def num_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Its size, in another dtype if one is given."""
        return math.prod(self.shape) * (dtype or self.dtype).itemsize


class StoredWeights:
    """The tensors of one model directory, of one file or many, in the order in which they are stored.

    Raises:
        ConfigError: there are no weights, or of a dtype that is not known here.
        FormatError: a file is torn.
    """

    def __init__(self, model_dir: Path) -> None:
        self.path = model_dir
        self.files = weight_files(model_dir)
        self.tensors: dict[str, StoredTensor] = {}
        self._open: dict[Path, Any] = {}
        for file in self.files:
            self.tensors |= self._table(file)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def float_dtypes(self) -> set[torch.dtype]:
        """The dtypes of the floating ones."""
        return {tensor.dtype for tensor in self.tensors.values() if tensor.dtype.is_floating_point}

    def __getitem__(self, name: str) -> torch.Tensor:
        file = self.tensors[name].file
        if file.suffix != ".safetensors":
            return self._pickled(file)[name]
        if file not in self._open:
            from safetensors import safe_open

            self._open[file] = safe_open(file, framework="pt")
        return self._open[file].get_tensor(name)

    def same(self, name: str, other: str) -> bool:
        """Whether two names have equal matrices: one weight, stored twice. Norms and biases, which may be
        equal by their initialisation, are never the same.
        """
        shape = self.shapes[name]
        return len(shape) > 1 and shape == self.shapes[other] and torch.equal(self[name], self[other])

    def num_bytes(self, dtype: torch.dtype | None = None) -> int:
        """The size of all tensors, floating ones in `dtype` if it is given."""
        return sum(
            tensor.num_bytes(dtype if tensor.dtype.is_floating_point else None)
            for tensor in self.tensors.values()
        )

    def _table(self, file: Path) -> dict[str, StoredTensor]:
        if file.suffix != ".safetensors":
            return self._table_of_pickled(file)
        header = read_header(file)[0]
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise ConfigError(
                    f"weights must be of a dtype that can be written back, got {entry['dtype']} for {name} "
                    f"in {file}; save the model in bfloat16 or float32"
                )
        order = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        return {
            name: StoredTensor(file, DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in order
        }

    def _table_of_pickled(self, file: Path) -> dict[str, StoredTensor]:
        """Tensors that share their memory are one weight, stored under its first name."""
        seen, table = set(), {}
        for name, tensor in self._pickled(file).items():
            place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            if place not in seen or not tensor.numel():
                table[name] = StoredTensor(file, tensor.dtype, tuple(tensor.shape))
            seen.add(place)
        return table

    def _pickled(self, file: Path) -> dict[str, torch.Tensor]:
        if file not in self._open:
            try:
                found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:
                raise ConfigError(
                    f"weights must be tensors under names, got {file}: {one_line(error)}"
                ) from None
            self._open[file] = {name: t for name, t in found.items() if isinstance(t, torch.Tensor)}
        return self._open[file]


def safetensors_name(file: Path) -> str:
    """The name under which a file of weights is written: its own, or that of its safetensors twin."""
    name = file.name.removeprefix("pytorch_") if file.suffix == ".bin" else file.name
    return name.replace(".bin", ".safetensors")


def write_like(
    initial: StoredWeights,
    target: Path,
    tensor_of: Callable[[str], torch.Tensor],
    dtype: torch.dtype | None = None,
) -> None:
    """Write weights with the layout of the initial model's, durably.

    Args:
        initial: whose files, names, dtypes and order are taken.
        target: an existing directory.
        tensor_of: gives the tensor of a name, of the dtype and shape that it is to have.
        dtype: of all floating tensors; None for what each of them is stored in.
    """
    for file in initial.files:
        entries = {name: tensor for name, tensor in initial.tensors.items() if tensor.file == file}
        dtypes = {
            name: dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype
            for name, tensor in entries.items()
        }
        unchanged = all(dtypes[name] == tensor.dtype for name, tensor in entries.items())
        with open(target / safetensors_name(file), "xb") as sink:
            if file.suffix == ".safetensors" and unchanged:
                with open(file, "rb") as source:
                    sink.write(source.read(read_header(file)[1]))
            else:
                sink.write(_header(entries, dtypes))
            for name, tensor in entries.items():
                data = tensor_of(name).contiguous().reshape(-1).view(torch.uint8)
                size = tensor.num_bytes(dtypes[name])
                assert len(data) == size, f"{name} has {len(data)} bytes, its place {size}"
                sink.write(data.numpy().data)
            sink.flush()
            os.fsync(sink.fileno())
    _write_index(initial, target, dtype)


def _header(entries: dict[str, StoredTensor], dtypes: dict[str, torch.dtype]) -> bytes:
    names = {dtype: name for name, dtype in DTYPES.items()}
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in entries.items():
        begin, end = end, end + tensor.num_bytes(dtypes[name])
        table[name] = {
            "dtype": names[dtypes[name]],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_index(initial: StoredWeights, target: Path, dtype: torch.dtype | None) -> None:
    """The index of sharded weights: the initial one where it still says the truth."""
    single = "model.safetensors" if initial.files[0].suffix == ".safetensors" else "pytorch_model.bin"
    source = initial.path / f"{single}{INDEX_SUFFIX}"
    if not source.is_file():
        return
    content = source.read_bytes()
    same_size = initial.num_bytes() == initial.num_bytes(dtype)
    if not (single == "model.safetensors" and same_size):
        index = json.loads(content)
        index["metadata"] = dict(index.get("metadata") or {}) | {"total_size": initial.num_bytes(dtype)}
        index["weight_map"] = {name: safetensors_name(t.file) for name, t in initial.tensors.items()}
        content = json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"
    (target / f"model.safetensors{INDEX_SUFFIX}").write_bytes(content)
