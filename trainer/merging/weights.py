"""Which stored tensor of a tuned model is which of the initial one."""

from pathlib import Path

import torch

from formats.errors import ConfigError
from formats.identity.fingerprint import weight_files
from trainer.result.stored_weights import StoredWeights


def open_safetensors(model_dir: Path) -> StoredWeights:
    """The stored tensors of a model.

    Raises:
        ConfigError: they are not safetensors.
        FormatError: a file is torn.
    """
    first = weight_files(model_dir)[0]
    if first.suffix != ".safetensors":
        raise ConfigError(
            f"a merge reads safetensors, got {first.name} in {model_dir}; save the model again with "
            "save_pretrained"
        )
    return StoredWeights(model_dir)


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


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """A floating tensor in the dtype in which merges compute: float32, or float64 where it is stored so."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
