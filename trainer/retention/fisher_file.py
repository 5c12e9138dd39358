"""The Fisher information of a run that is under way, kept so that its continuation uses the very same.

    out/.ewc-fisher.staging/   being written
    out/ewc-fisher/            complete: complete.json names every file and its size, as in a checkpoint
        fisher.safetensors     plain parameter name -> F
        key.json               what F was estimated from
    out/ewc-fisher-1/          that of the second task, and so on

It goes when the run is finished, unless `ewc.keep_fisher` asks for it.
"""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from formats.errors import ConfigError
from trainer.checkpoint import commit_checkpoint, is_complete, writing_to

DIRECTORY = "ewc-fisher"
WEIGHTS = "fisher.safetensors"
KEY = "key.json"


def directory_name(task: int) -> str:
    """Of the task of this number, counted from 0."""
    return DIRECTORY if task == 0 else f"{DIRECTORY}-{task}"


def save_fisher(
    run_dir: Path, fisher: Mapping[str, torch.Tensor], key: Mapping[str, Any], task: int = 0
) -> None:
    """Write whole CPU tensors and their key; complete or absent. One process of a run calls this.

    Raises:
        OSError: the disk is full or read-only.
    """
    staging = run_dir / f".{directory_name(task)}.staging"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    save_tensors({name: tensor.contiguous() for name, tensor in fisher.items()}, staging / WEIGHTS)
    (staging / KEY).write_text(json.dumps(dict(key), indent=1, sort_keys=True), encoding="utf-8")
    commit_checkpoint(staging, run_dir / directory_name(task), 0)


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the disk is full or read-only.
    """
    from safetensors.torch import save_file

    with writing_to(path.parent):
        save_file(dict(tensors), path)


def load_fisher(run_dir: Path, key: Mapping[str, Any], task: int = 0) -> dict[str, torch.Tensor] | None:
    """The kept Fisher information on the CPU; None when there is none or it is torn.

    Raises:
        ConfigError: it was estimated from something else.
    """
    from safetensors.torch import load_file

    directory = run_dir / directory_name(task)
    if not is_complete(directory):
        return None
    kept = json.loads((directory / KEY).read_text(encoding="utf-8"))
    for name, value in key.items():
        if kept.get(name) != value:
            raise ConfigError(
                f"an interrupted run continues with its own Fisher information, but its {name} was "
                f"{str(kept.get(name))[:12]} and is {str(value)[:12]}; use the same cache or another --out"
            )
    return load_file(directory / WEIGHTS)


def remove_fisher(run_dir: Path, kept: Collection[int] = ()) -> None:
    """Remove it, that of all tasks but those `kept`, and what interrupted saves left."""
    names = {directory_name(task) for task in kept}
    for path in [*run_dir.glob(f"{DIRECTORY}*"), *run_dir.glob(f".{DIRECTORY}*.staging")]:
        if path.name not in names:
            shutil.rmtree(path, ignore_errors=True)
