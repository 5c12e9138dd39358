"""What a run would do and hold, from everything that it would load: checked as a run is, and nothing is written."""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from formats.errors import ConfigError
from trainer.config import TrainConfig
from trainer.inputs import facts_of
from trainer.notes import notes
from trainer.preflight.before_start import check_before_start
from trainer.preflight.continuation import require_same_run, run_facts
from trainer.preflight.disk import require_disk
from trainer.preflight.liger import settle_liger
from trainer.preflight.memory import GIB, StepMemory, batch_shape, capacity_bytes, require_room, step_memory
from trainer.recipe import training_arguments
from trainer.result.dry_save import dry_save
from trainer.result.run_directory import look_into
from trainer.run import make_trainer, prepare


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """A run that was not started."""

    num_steps: int
    """Optimizer steps."""
    steps_per_epoch: int
    """Of them."""
    micro_batch: tuple[int, int]
    """(sequences, tokens of each) of the largest micro-batch of a process."""
    micro_batches: int
    """Of a step, over all processes."""
    device: str
    """Of this process."""
    capacity: int
    """Bytes of its memory."""
    memory: StepMemory
    """What a step holds of it."""
    unknown: str | None
    """Why the activations could not be counted; None where they were."""
    notes: list[str]
    """What the run would say before it starts."""

    def text(self) -> str:
        """For the user."""
        sequences, tokens = self.micro_batch
        lines = [
            *self.notes,
            f"{self.num_steps:,} step{'s' * (self.num_steps != 1)}, {self.steps_per_epoch:,} to an epoch, of "
            f"{self.micro_batches} x {sequences} sequences of up to {tokens:,} tokens",
            f"a step holds, GiB on each process: {self.memory}",
            f"at most {self.memory.peak / GIB:.2f} at a time, of {self.capacity / GIB:.2f} ({self.device})",
        ]
        if self.unknown is not None:
            lines.append(f"without activations: {self.unknown}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"memory": self.memory.to_dict()}


def plan_training(config: TrainConfig) -> TrainingPlan:
    """Check settings, caches and model as `train` does, and count what a step holds.

    Raises:
        ConfigError: as `train`, whose result must find its place in `config.out`, or the step cannot fit.
        FormatError: a cache is missing, unfinished or broken.
        IdentityMismatchError: a cache was built with another model, tokenizer or template.
    """
    resolved, inputs, rows, student, retention = prepare(config)
    out = Path(config.out)
    record, checkpoint = look_into(out, inputs.target.identity.to_dict())
    result_bytes = dry_save(student.model, inputs.tokenizer, inputs.model_dir, out, student.layout)
    with tempfile.TemporaryDirectory() as scratch:  # the Trainer makes the directory that it is given
        args = training_arguments(resolved, Path(scratch))
        settle_liger(args, student.model)
        trainer = make_trainer(config, student, args, inputs.tokenizer, rows, retention)
    check_before_start(trainer)
    require_disk(trainer, out, result_bytes)
    if checkpoint is not None:
        require_same_run(record.get("run", {}), run_facts(trainer, config, *facts_of(config, inputs)))
    num_steps, per_epoch = trainer.planned_steps()
    unknown = None
    try:
        memory = step_memory(trainer)
    except ConfigError as error:
        unknown, memory = str(error), step_memory(trainer, activations=False)
    require_room(memory, args.device)
    micro_batches = args.gradient_accumulation_steps * args.world_size
    return TrainingPlan(
        num_steps=num_steps,
        steps_per_epoch=per_epoch,
        micro_batch=batch_shape(trainer),
        micro_batches=micro_batches,
        device=str(args.device),
        capacity=capacity_bytes(args.device),
        memory=memory,
        unknown=unknown,
        notes=notes(config, resolved, inputs, rows, student, args.train_batch_size * micro_batches),
    )
