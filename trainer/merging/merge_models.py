"""`merge`: from an initial model and tuned ones to a model directory that transformers and vLLM load.

Everything is checked before anything is written. The result grows in a hidden directory beside its place and
gets its name in one rename, so there is a whole model or none. Time: two reads of every model, the
first for its fingerprint, and one write.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from formats.disk.durable import atomic_write_bytes, fsync_directory, fsync_file
from formats.errors import ConfigError
from formats.identity.fingerprint import ModelFingerprint
from trainer.loading import load_tokenizer, quiet_transformers
from trainer.merging.card import merge_card
from trainer.merging.checks import find_model, identity_of, require_descendant
from trainer.merging.methods import Merge, merge_of
from trainer.merging.settings import MergeConfig
from trainer.merging.weights import StoredWeights, tied_names, write_like
from trainer.result.run_directory import RECORD_NAME
from trainer.result.saving import copy_companions

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge did."""

    out: Path
    """The model directory."""
    num_models: int
    """Tuned models that were merged."""
    num_tensors: int
    """Tensors of the result."""
    seconds: float
    """Wall time."""

    def line(self) -> str:
        """The last line for the user."""
        models = "1 model" if self.num_models == 1 else f"{self.num_models} models"
        return f"merged {models}, {self.num_tensors} tensors in {self.seconds:.0f} s; model in {self.out}"


def merge(config: MergeConfig, progress: Progress = lambda done, total: None) -> MergeReport:
    """Merge `config.tuned` with `config.initial` and write the result to `config.out`.

    Args:
        config: models, method, strengths.
        progress: called with (tensors done, tensors in all).

    Raises:
        ConfigError: a model, its tensors or the output directory do not fit.
        FormatError: a weight file is torn.
        IdentityMismatchError: a tuned model comes from another initial model, or has another tokenizer.
    """
    started = time.perf_counter()
    quiet_transformers()
    function = merge_of(config)
    out = Path(config.out)
    require_empty(out)
    initial_dir = find_model(config.initial, "--initial")
    tuned_dirs = [find_model(name, "TUNED") for name in config.tuned]
    initial, tuned = StoredWeights(initial_dir), [StoredWeights(path) for path in tuned_dirs]
    identity = identity_of(initial_dir, config.initial, load_tokenizer(initial_dir))
    for path in tuned_dirs:
        require_descendant(path, identity)
    names = [tied_names(initial, weights) for weights in tuned]
    done = 0

    def tensor_of(name: str) -> torch.Tensor:
        nonlocal done
        others = [weights[known[name]] for weights, known in zip(tuned, names, strict=True)]
        merged = merge_tensor(name, function, initial[name], others)
        done += 1
        progress(done, len(initial.shapes))
        return merged

    record = {
        "status": "complete",
        "identity": identity,
        "merge": {
            "method": config.method,
            **config.strengths(),
            "tuned": [
                {"name": name, "weights": ModelFingerprint.of(path).weights}
                for name, path in zip(config.tuned, tuned_dirs, strict=True)
            ],
        },
    }
    with staged(out) as staging:
        for file in initial.files:
            write_like(file, staging / file.name, tensor_of)
        for index in initial_dir.glob("*.safetensors.index.json"):
            shutil.copyfile(index, staging / index.name)
        copy_companions(initial_dir, staging)
        shutil.copyfile(initial_dir / "config.json", staging / "config.json")
        (staging / "README.md").write_text(merge_card(config, identity), encoding="utf-8")
        text = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False)
        atomic_write_bytes(staging / RECORD_NAME, text.encode())
    return MergeReport(
        out=out, num_models=len(tuned), num_tensors=done, seconds=time.perf_counter() - started
    )


def merge_tensor(
    name: str, function: Merge, initial: torch.Tensor, tuned: list[torch.Tensor]
) -> torch.Tensor:
    """The merged tensor in the dtype in which the initial one is stored.

    Raises:
        ConfigError: integers differ, of which there is no in-between, or the result is not finite.
    """
    if not initial.is_floating_point():
        if all(torch.equal(initial, other) for other in tuned):
            return initial
        raise ConfigError(
            f"only floating-point tensors can be merged, got {name} of {initial.dtype}, which differs "
            "between the models; merge before quantising"
        )
    dtype = torch.promote_types(initial.dtype, torch.float32)
    merged = function(initial.to(dtype), [other.to(dtype) for other in tuned]).to(initial.dtype)
    if not bool(torch.isfinite(merged).all()):
        raise ConfigError(
            f"merged weights must be finite, got infinity or NaN in {name}; use a smaller --scale, and check "
            "the tuned models"
        )
    return merged


def require_empty(out: Path) -> None:
    """Refuse an output directory that holds something.

    Raises:
        ConfigError: it is not new or empty.
    """
    contents = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
    if contents or (out.exists() and not out.is_dir()):
        what = f"which holds {contents[0]}" if contents else "which is a file"
        raise ConfigError(f"--out must be new or empty, got {out} {what}; choose another directory")


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A hidden directory that becomes `out` when the block ends well, and is removed when it does not."""
    out = out.absolute()
    staging = out.with_name(f".{out.name}.merge.staging")
    made = [parent for parent in out.parents if not parent.exists()]  # innermost first
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)  # of a merge that was killed
        staging.mkdir()
    except OSError as error:
        raise ConfigError(f"--out must be a place that can be written, got {out}: {error.strerror}") from None
    try:
        yield staging
        for file in staging.iterdir():
            fsync_file(file)
        fsync_directory(staging)
        os.rename(staging, out)  # replaces an empty directory
        fsync_directory(out.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise
