"""Whether the disk has room for what a run will write: checkpoints with the optimiser's state, and the result."""

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from formats.errors import ConfigError
from formats.progress import format_bytes
from trainer.checkpoint import complete_checkpoints
from trainer.preflight.combinations import word
from trainer.preflight.memory import num_bytes, optimiser_bytes

if TYPE_CHECKING:
    from trainer.loop.label_annealing_trainer import LabelAnnealingTrainer


def require_disk(trainer: "LabelAnnealingTrainer", out: Path, result_bytes: int) -> None:
    """Refuse a run whose checkpoints and result have no room at `out` beside the checkpoints that are there.

    Raises:
        ConfigError: the bytes, what of, and what would make them fewer.
    """
    args = trainer.args
    max_steps, per_epoch = trainer.planned_steps()
    done = [step for step, _ in complete_checkpoints(out)]
    left = num_saves(
        word(args.save_strategy),
        max_steps=max_steps,
        per_epoch=per_epoch,
        save_steps=float(args.save_steps),
        first=max(done, default=0),
    )
    more, beside = num_more(left, len(done), args.save_total_limit)
    each = checkpoint_bytes(trainer)
    need = max(more * each, beside * each + result_bytes)
    what = f"checkpoints of {format_bytes(each)} each, {more} more at a time, and the result"
    require_space(out, need, what, "free some, lower training.save_total_limit, or choose another directory")


def checkpoint_bytes(trainer: "LabelAnnealingTrainer") -> int:
    """Of one checkpoint: all weights, or the adapters alone, and the optimiser's state of what is trained."""
    model = trainer.model
    assert model is not None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = num_bytes(trained if hasattr(model, "peft_config") else model.parameters())
    state = optimiser_bytes(trainer.args, model, trained[0]) * sum(p.numel() for p in trained)
    return weights + int(state)


def num_saves(strategy: str, *, max_steps: int, per_epoch: int, save_steps: float, first: int) -> int:
    """Checkpoints that a run saves after step `first`, the one of its last step included.

    Args:
        strategy: of `save_strategy`; what `best` saves is not known before, but for one.
        save_steps: a number of steps, or a share of all of them.
    """
    if strategy == "no" or first >= max_steps:
        return 0
    if strategy == "best":
        return 1
    every = per_epoch if strategy == "epoch" else save_steps
    every = max(math.ceil(max_steps * every) if every < 1 else int(every), 1)
    return math.ceil(max_steps / every) - first // every


def num_more(left: int, there: int, limit: int | None) -> tuple[int, int]:
    """Of `left` checkpoints to come, beside those `there`: (how many more exist while the last ones are written, and
    while the result is). The oldest go when there are more than `limit`, after the new one is written.
    """
    if not left:
        return 0, 0
    if not limit:
        return left, left
    return max(min(there + left, limit + 1) - there, 1), min(there + left, limit) - there


def require_space(out: Path, num_bytes: int, what: str, remedy: str) -> None:
    """Refuse to begin what has no room.

    Args:
        what: that takes the bytes.
        remedy: what to do.

    Raises:
        ConfigError: the disk of `out` has fewer bytes left.
    """
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise ConfigError(
            f"--out must have room for {what}, which take {format_bytes(num_bytes)}, got {format_bytes(free)} free at "
            f"{place}; {remedy}"
        )
