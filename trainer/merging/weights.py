"""Tensors of models on the disk: read by name, one at a time; written in the layout of the initial model.

A merged model has the files of the initial one: the same names, the same headers (so the same tensors, dtypes
and order), other bytes. So nothing is held in memory but the tensor at hand, of every model.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from formats.errors import ConfigError
from formats.identity.fingerprint import weight_files
from formats.identity.tensor_hash import read_header


class StoredWeights:
    """The tensors of one model directory, of one file or many.

    Raises:
        ConfigError: the weights are not safetensors.
        FormatError: a file is torn.
    """

    def __init__(self, model_dir: Path) -> None:
        self.path = model_dir
        self.files = weight_files(model_dir)
        if self.files[0].suffix != ".safetensors":
            raise ConfigError(
                f"a merge reads safetensors, got {self.files[0].name} in {model_dir}; save the model again "
                "with save_pretrained"
            )
        self._home: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in self.files:
            for name, entry in read_header(file)[0].items():
                self._home[name] = file
                self.shapes[name] = tuple(entry["shape"])
        self._open: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        file = self._home[name]
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file].get_tensor(name)

    def same(self, name: str, other: str) -> bool:
        """Whether two names have equal matrices: one weight, stored twice. Norms and biases, which may be
        equal by their initialisation, are never the same.
        """
        shape = self.shapes[name]
        return len(shape) > 1 and shape == self.shapes[other] and torch.equal(self[name], self[other])


def tied_names(initial: StoredWeights, tuned: StoredWeights) -> dict[str, str]:
    """Name in the initial model -> name of the same weight in the tuned one.

    Names may differ by tied weights alone, which some savers write once and others twice.

    Raises:
        ConfigError: a tensor is missing, or there is one too many, or a shape differs.
    """
    found = {}
    for name, shape in initial.shapes.items():
        choices = [name] if name in tuned.shapes else [n for n in tuned.shapes if n in initial.shapes]
        for choice in choices:
            if choice == name or initial.same(name, choice):
                found[name] = choice
                break
        else:
            raise ConfigError(
                f"tuned models must have the tensors of the initial one, got {tuned.path} without {name}; "
                "merge models that were fine-tuned from --initial"
            )
        if tuned.shapes[found[name]] != shape:
            raise ConfigError(
                f"tuned models must have the shapes of the initial one, got "
                f"{list(tuned.shapes[found[name]])} for {name} in {tuned.path}, where it has {list(shape)}; "
                "merge models that were fine-tuned from --initial"
            )
    for name in tuned.shapes.keys() - initial.shapes.keys():
        if not any(tuned.same(name, known) for known in initial.shapes if known in tuned.shapes):
            raise ConfigError(
                f"tuned models must have the tensors of the initial one, got {name} in {tuned.path} beside "
                "them; merge models that were fine-tuned from --initial"
            )
    return found


def write_like(template: Path, target: Path, tensor_of: Callable[[str], torch.Tensor]) -> None:
    """Write a safetensors file with the header of `template` and the tensors of `tensor_of`, durably.

    Args:
        template: an existing file.
        target: a new one.
        tensor_of: gives the tensor of a name, of the dtype and shape that the template has.
    """
    header, start = read_header(template)
    with open(template, "rb") as source, open(target, "xb") as sink:
        sink.write(source.read(start))
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            data = tensor_of(name).contiguous().reshape(-1).view(torch.uint8)
            assert len(data) == end - begin, f"{name} has {len(data)} bytes, its place {end - begin}"
            sink.seek(start + begin)
            sink.write(data.numpy().data)
        sink.flush()
        os.fsync(sink.fileno())
