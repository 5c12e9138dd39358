"""`transformers.Trainer` that trains in its first step, keeps the best checkpoint and not the worst, and stops when a
number is not finite.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from formats.errors import ConfigError, DivergenceError
from trainer import checkpoint
from trainer.loop.finite import FiniteWatch, all_finite, least_of_ranks
from trainer.preflight import best_model
from trainer.preflight.arguments import refuse_unhonoured
from trainer.schedule import first_step_trains


class GuardedTrainer(Trainer):
    """Base of `LabelAnnealingTrainer`; takes the arguments of `transformers.Trainer` by name.

    Raises:
        ConfigError: an argument that cannot be honoured, or no metric of that name to choose checkpoints by.
    """

    waiting: Sequence[Any] = ()
    """Batches of a stream that are no whole step yet."""

    def __init__(
        self, *, args: TrainingArguments, eval_dataset: Any = None, callbacks: Any = (), **kwargs: Any
    ) -> None:
        refuse_unhonoured(args)
        args.remove_unused_columns = args.logging_nan_inf_filter = False
        early = any(isinstance(entry, EarlyStoppingCallback) for entry in callbacks)
        _settle_metric(args, eval_dataset, early=early)
        self.finite = FiniteWatch(args.device)
        self._noted_step = 0
        super().__init__(args=args, eval_dataset=eval_dataset, callbacks=list(callbacks), **kwargs)
        require_sharding(args.fsdp, enabled=self.is_fsdp_enabled)
        sum_in_full_precision(self.accelerator)

    # --- batches ----------------------------------------------------------------------------------------

    def _prepare_input(self, data: Any) -> Any:
        """As the base class, but a copy to a GPU does not make the host wait: it starts from pinned memory."""
        if isinstance(data, torch.Tensor) and self.args.device.type == "cuda":
            if not data.is_cuda and not data.is_pinned():
                data = data.pin_memory()
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """As the base class, but only whole steps, and none behind the last one.

        The base class trains one more where a run continues from the checkpoint of its last step. Of a stream whose end
        is no whole step it adds the gradients to those of the next pass's first step, on top; here the batches wait for
        that step. Processes whose parts of a stream end at different steps go on by themselves, as nothing is counted
        for a step that is not taken.

        Raises:
            ConfigError: a pass over a stream has no whole step.
        """
        if self.state.global_step >= self.state.max_steps:
            return [], None
        batches = [*self.waiting, *islice(epoch_iterator, max(num_batches - len(self.waiting), 0))]
        if len(batches) < num_batches:
            if len(batches) > len(self.waiting) and not self.state.global_step:
                raise ConfigError(
                    f"a stream must have the {num_batches} batches of a step for every process, got {len(batches)}; "
                    "use fewer gradient_accumulation_steps, or a smaller batch"
                )
            self.waiting = batches
            return [], None
        self.waiting = batches[num_batches:]
        return batches[:num_batches], self._get_num_items_in_batch(batches[:num_batches], device)

    # --- the plan ---------------------------------------------------------------------------------------

    def planned_steps(self) -> tuple[int, int]:
        """(optimizer steps of the run, of an epoch)."""
        args = self.args
        per_epoch = max(-(-len(self.get_train_dataloader()) // args.gradient_accumulation_steps), 1)
        return (
            args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
        ), per_epoch

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As in the base class, but the first step of a warm-up trains (trainer/schedule.py)."""
        fresh = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if fresh:
            scheduler = self.schedule_of(scheduler, num_training_steps)
            self.lr_scheduler = scheduler
        return scheduler

    def schedule_of(self, scheduler: Any, num_training_steps: int) -> Any:
        """A schedule as transformers made it for so many steps -> the one of this trainer."""
        warmup = self.args.get_warmup_steps(num_training_steps)
        return first_step_trains(
            scheduler, best_model.word(self.args.lr_scheduler_type), warmup, num_training_steps
        )

    # --- numbers that are none --------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """As the base class, but nothing that is not finite is logged, judged or saved."""
        self._note_step(grad_norm)
        control, last = self.control, self.state.global_step >= self.state.max_steps
        if last or control.should_log or control.should_evaluate or control.should_save:
            self.require_finite(weights=last or control.should_save)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _note_step(self, grad_norm: Any) -> None:
        if self._noted_step == self.state.global_step:  # the end of an epoch repeats its last step
            return
        self._noted_step = self.state.global_step
        if self.accelerator.scaler is None:
            self.finite.see("gradient", grad_norm, self.state.global_step)
        else:  # an infinite gradient of fp16 is normal: the step is skipped and the scale halved
            self.finite.see_scaled(grad_norm)

    def require_finite(self, *, weights: bool) -> None:
        """Stop the run if loss, gradient or (if asked for) a weight is not finite on any rank. Collective.

        Raises:
            DivergenceError: names what and where, and what is kept.
        """
        least = partial(least_of_ranks, world_size=self.args.world_size)
        self.finite.require(least, self._what_now)
        if self.accelerator.scaler is not None:
            self.finite.require_steps(
                self.accelerator.scaler, last=self.state.global_step >= self.state.max_steps
            )
        if not weights:
            return
        assert self.model is not None
        good = all_finite(self.model.parameters(), self.args.device)
        if not bool(least(good.to(torch.int64))):
            raise DivergenceError(
                f"the weights must be finite, got NaN or infinity after step {self.state.global_step}"
                f"{self._what_now()}"
            )

    def _what_now(self) -> str:
        newest = checkpoint.newest_checkpoint(Path(self.args.output_dir or "."))
        kept = f"{newest.name}, the last good one, is kept" if newest else "no checkpoint was due before it"
        return (
            f"; {kept}, and nothing is published. Start again in another --out with a lower training.learning_rate "
            f"(it was {self.args.learning_rate:g}) or other data"
        )

    # --- the best checkpoint ----------------------------------------------------------------------------

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As the base class; a run that is stopped early saves its checkpoint whether it is the best or not."""
        is_best = super()._determine_best_metric(metrics, trial)
        return is_best or (
            self.control.should_training_stop and self.state.global_step < self.state.max_steps
        )

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class, which with `save_total_limit: 1` would delete the newest checkpoint of a run that is only
        interrupted, if another one is the best so far. Which are kept is settled where they are saved.
        """
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def find_best_again(self) -> None:
        """After a continuation, or a move of the run's directory: where the best checkpoint so far is now.

        Raises:
            ConfigError: it is gone.
        """
        step = self.state.best_global_step
        if not step or self.args.save_strategy == "no":
            return
        best = checkpoint.final_directory(Path(self.args.output_dir or "."), step)
        if best.is_dir():
            self.state.best_model_checkpoint = str(best)
        elif self.args.load_best_model_at_end:
            raise ConfigError(
                f"the best checkpoint so far must be there, got no {best}; put it back, or use another --out"
            )


def require_sharding(fsdp: Any, *, enabled: bool) -> None:
    """Refuse FSDP where accelerate leaves it out without a word, as it does on CPUs, and runs DDP.

    Raises:
        ConfigError: it is asked for and not there.
    """
    if fsdp and not enabled:
        raise ConfigError(f"training.fsdp needs a GPU for each process, got fsdp: {fsdp} without; remove it")


def sum_in_full_precision(accelerator: Any) -> None:
    """Let FSDP2 add gradients of micro-batches and processes up in fp32, in shards, whatever the model computes in.

    accelerate's default under bf16 is to add them up in bf16, micro-batches in an unsharded copy on every process, and
    to round the loss as well.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2:
        return
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
        )


def _settle_metric(args: TrainingArguments, eval_dataset: Any, *, early: bool) -> None:
    """The full name and the direction of the metric that chooses checkpoints, in `args`."""
    need = best_model.chooses(vars(args)) or ("EarlyStoppingCallback" if early else None)
    if need is None:
        return
    caches = list(eval_dataset) if isinstance(eval_dataset, dict) else [""]
    if best_model.word(args.eval_strategy) == "no":
        raise ConfigError(f"{need} needs evaluations, got eval_strategy: no; use steps or epoch")
    found = best_model.full_name(args.metric_for_best_model, caches)
    if found is None:
        known = ", ".join(best_model.known_metrics(caches))
        raise ConfigError(
            f"metric_for_best_model must be one of {known} for {need}; got {args.metric_for_best_model!r}"
        )
    if args.greater_is_better and found.endswith("loss"):
        raise ConfigError(
            f"greater_is_better contradicts {found}, which is better when lower, got true; remove it"
        )
    args.metric_for_best_model, args.greater_is_better = found, False
