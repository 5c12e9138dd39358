"""The Fisher information of a run that is under way, kept so that its continuation uses the very same.

    out/.ewc-fisher.staging/   being written
    out/ewc-fisher/            complete: complete.json names every file and its size, as in a checkpoint
        fisher.safetensors     plain parameter name -> F
        key.json               what F was estimated from

It goes when the run is finished.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from formats.errors import ConfigError
from trainer.checkpoint import commit_checkpoint, is_complete

DIRECTORY = "ewc-fisher"
STAGING = ".ewc-fisher.staging"
WEIGHTS = "fisher.safetensors"
KEY = "key.json"


def save_fisher(run_dir: Path, fisher: Mapping[str, torch.Tensor], key: Mapping[str, Any]) -> None:
    """Write whole CPU tensors and their key; complete or absent. One process of a run calls this.

    Raises:
        OSError: the disk is full or read-only.
    """
    from safetensors.torch import save_file

    staging = run_dir / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in fisher.items()}, staging / WEIGHTS)
    (staging / KEY).write_text(json.dumps(dict(key), indent=1, sort_keys=True), encoding="utf-8")
    commit_checkpoint(staging, run_dir / DIRECTORY, 0)


def load_fisher(run_dir: Path, key: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
    """The kept Fisher information on the CPU; None when there is none or it is torn.

    Raises:
        ConfigError: it was estimated from something else.
    """
    from safetensors.torch import load_file

    directory = run_dir / DIRECTORY
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


def remove_fisher(run_dir: Path) -> None:
    """Remove it, and what an interrupted save left."""
    for name in (DIRECTORY, STAGING):
        shutil.rmtree(run_dir / name, ignore_errors=True)
