"""The proof before the first update: the model must be its own teacher.

A model that was trained from the cache's teacher is some way off it already: its KL is reported, not judged.

Label annealing starts from the very model that filled the cache, so KL(initial || model) is then the noise
of two engines and of the cache's quantisation, a few 1e-4 nats. Anything larger means that the run would
pull the model towards something else: another model, revision or tokenizer, rows that are shifted by one,
attention that leaks across packed rows, a damaged cache. The check runs on the training loader's own
batches, so it covers them all.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from transformers import TrainerCallback

from formats.errors import AnnealError, IdentityMismatchError
from formats.progress import counted
from trainer.data.dataset import CachedDataset
from trainer.data.sampler import sample_rows
from trainer.running import RunningTrainer

VERIFY_TOKENS = 16
"""Tokens on which the model's own logits are compared with those of the loss."""


@dataclass(frozen=True, kw_only=True)
class Step0Report:
    """What was measured before the first update."""

    kl: float
    """KL(initial || model), nats per position."""
    ce: float
    """Cross-entropy of the initial model on these rows; NaN where none carries loss."""
    kept_mass: float
    """Mean teacher mass of the kept tokens."""
    num_rows: int
    """Rows measured."""
    num_positions: int
    """Positions with teacher targets."""
    temperature: float
    """T at which KL was measured."""
    threshold: float
    """Nats above which training is refused."""
    different_student: bool = False
    """Whether the refusal was lifted."""
    ancestor: str | None = None
    """The cache's teacher, where the model is not it but descends from it."""

    def line(self) -> str:
        """The first line of the log."""
        teacher, limit = "initial", f" (threshold {self.threshold:g})"
        verdict = "the model is the cache's teacher"
        if self.ancestor is not None:
            teacher, limit = self.ancestor, ""
            verdict = (
                f"how far the model has moved from its ancestor {teacher}, the cache's teacher; not judged"
            )
        elif self.kl > self.threshold:
            verdict = "not what the cache's teacher says, which was allowed"
        return (
            f"step 0: KL({teacher} || model) = {self.kl:.2e} nats over {self.num_positions:,} positions of "
            f"{counted(self.num_rows, 'row')}{limit}: {verdict}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def require_small(report: Step0Report) -> None:
    """Refuse a model that is not the teacher.

    Raises:
        IdentityMismatchError: KL is above the threshold, no different student was allowed, and the teacher is not
            an ancestor.
    """
    if report.different_student or report.ancestor is not None or report.kl <= report.threshold:
        return
    raise IdentityMismatchError(
        f"KL(initial || model) before the first update must be at most {report.threshold:g} nats, got "
        f"{report.kl:.3g} "
        f"over {report.num_positions} positions: the model is not the cache's teacher. Likely causes: "
        "another model "
        "or revision, another tokenizer or chat template, shifted rows, a damaged cache (check with "
        "`anneal cache "
        "inspect`), or an attention kernel that cannot pack; pass --allow-different-student to distil on "
        "purpose"
    )


def measure_step0(
    trainer: RunningTrainer,
    dataset: CachedDataset,
    *,
    num_rows: int,
    threshold: float,
    different_student: bool = False,
    ancestor: str | None = None,
) -> Step0Report:
    """Check the head by numbers and measure KL on a sample of rows. Collective.

    Raises:
        ConfigError: the model's head is not one that the loss can reproduce.
        AnnealError: the sampled rows have no teacher positions, or KL is not a number.
    """
    rows = sample_rows(dataset, num_rows, trainer.args.seed)
    verify_head(trainer, dataset, int(rows[0]))
    loader = trainer.loader_of_rows(dataset, rows, as_trained=True)
    result = trainer.measure_rows(loader)
    if not result.num_kl:
        raise AnnealError(
            f"the first check needs teacher positions, got none in {len(rows)} rows of {dataset.name}"
        )
    if math.isnan(result.kl):
        raise AnnealError(
            "KL(initial || model) must be a number before the first update, got NaN: the model or the "
            "cache holds NaN; check the model's weights and dtype"
        )
    return Step0Report(
        kl=result.kl,
        ce=result.ce,
        kept_mass=result.kept_mass,
        num_rows=len(rows),
        num_positions=result.num_kl,
        temperature=dataset.temperature,
        threshold=threshold,
        different_student=different_student,
        ancestor=ancestor,
    )


def verify_head(trainer: RunningTrainer, dataset: CachedDataset, row: int) -> None:
    """Compare the model's own logits with those of the loss on the first tokens of a row. Collective.

    Raises:
        ConfigError: the model's head is not one that the loss can reproduce.
    """
    model = trainer.evaluation_model()
    was_training = model.training
    model.eval()
    batch = trainer.device_batch([dict(dataset[row])])
    trainer.head.verify(model, {"input_ids": batch["input_ids"][:, :VERIFY_TOKENS]})
    model.train(was_training)


class Step0Check(TrainerCallback):
    """Runs the check when everything is wrapped and placed, and before any update; skipped when resuming."""

    def __init__(
        self, trainer: RunningTrainer, dataset: CachedDataset, on_report: Any, **settings: Any
    ) -> None:
        self.trainer, self.dataset, self.on_report, self.settings = trainer, dataset, on_report, settings

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            report = measure_step0(self.trainer, self.dataset, **self.settings)
            self.on_report(report)
            require_small(report)
            self.trainer.restart_log_window()


class HeadCheck(TrainerCallback):
    """What is left of the check where nothing is read of a teacher: the loss must know the model's head."""

    def __init__(self, trainer: RunningTrainer, dataset: CachedDataset, line: str, say: Any) -> None:
        self.trainer, self.dataset, self.line, self.say = trainer, dataset, line, say

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            if args.process_index == 0:
                self.say(self.line)
            verify_head(self.trainer, self.dataset, 0)
            self.trainer.restart_log_window()
