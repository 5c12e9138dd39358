"""`transformers.Trainer` with the label annealing loss, and the traps of that class closed.

- The loss is taken inside the wrapped forward (trainer/loop/output_head.py); `compute_loss_func` would only see logits.
- Denominators count shifted labels and teacher positions of all micro-batches and ranks of a step, and the mean that
  DDP and FSDP take over ranks is undone: the gradient does not depend on how a batch is split.
- The base class must not divide by the accumulation steps again (`loss_is_scaled_for_ga`).
- Its loaders would drop the teacher's columns and repeat rows on some ranks: see trainer/data/sampler.py.
- Checkpoints are staged, marked and renamed (trainer/checkpoint.py); no pickled arguments are written.
"""

import shutil
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, seed_worker

from formats.errors import ConfigError
from trainer import checkpoint
from trainer.data.collator import LabelAnnealingCollator, count_targets
from trainer.data.dataset import CachedDataset, UnitDataset, require_one_tail
from trainer.data.packing import best_fit, capacity_of
from trainer.data.sampler import EpochBatches, Source, sources_of
from trainer.loop.guarded_trainer import GuardedTrainer
from trainer.loop.kl_budget import KlBudget
from trainer.loop.log_window import LogWindow, evaluating
from trainer.loop.measure import Measurement, measure, metrics_of
from trainer.loop.output_head import OutputHead
from trainer.loop.signals import StopRequest
from trainer.loop.step_control import StepControl, callback_states
from trainer.loss.chunks import logits_type
from trainer.objective import Objective
from trainer.preflight.arguments import require_one_device
from trainer.retention.method import RetentionMethod
from trainer.retention.retained import Retained

TRAINER_STATE_NAME = "trainer_state.json"


class LabelAnnealingTrainer(GuardedTrainer):
    """Fine-tune with `loss = CE + kl_coef * KL` from a cache. Everything else is `transformers.Trainer`.

    Args:
        model: a causal language model, with adapters or without, not yet wrapped.
        args: `TrainingArguments`; `remove_unused_columns` is turned off, what cannot be honoured is refused.
        train_dataset, eval_dataset: a `CachedDataset` at the run's temperature, for evaluation also a dict of them.
        mixed: further datasets, each with its weight (units per unit of the training dataset) or `Share`.
        kl_coef, kl_direction, objective, loss_kernel: as in `label_annealing_loss`; datasets are of one `objective`.
        kl_budget: nats; `kl_coef` is then the first coefficient (trainer/loop/kl_budget.py).
        packing, pack_length, group_by_length: as in `TrainConfig`.
        retention: methods that act on the weights; `model` then has its initial ones.
        processing_class: the tokenizer, saved with the model.

    Logged beside the Trainer's own: ce and kl as they are weighted, kl_coef with a budget, kept_mass,
    student_kept_mass, tokens_per_second, memory_gib, the penalties of `retention` under their names (they are part
    of `loss`); and {prefix}_ce, _kl, _perplexity, _num_tokens from evaluation.

    Raises:
        ConfigError: the model's head, the datasets or the arguments do not fit label annealing.
    """

    loss_is_scaled_for_ga = True
    is_evaluating = False
    learns = True
    """Whether some training row has a cross-entropy, which is then part of the loss of an evaluation."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train_dataset: CachedDataset | None = None,
        eval_dataset: CachedDataset | dict[str, CachedDataset] | None = None,
        mixed: Sequence[tuple[CachedDataset, float]] = (),
        kl_coef: float = 1.0,
        kl_direction: str = "forward",
        objective: Objective | None = None,
        kl_budget: float | None = None,
        loss_kernel: Literal["auto", "torch", "triton"] = "auto",
        packing: bool = False,
        pack_length: int | None = None,
        group_by_length: bool = False,
        retention: Sequence[RetentionMethod] = (),
        processing_class: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        require_one_device(args, model)
        if train_dataset is not None:
            require_one_tail([train_dataset, *(dataset for dataset, _ in mixed)])
            used = [train_dataset, *(dataset for dataset, weight in mixed if weight)]
            self.learns = any(dataset.loss != "kl" for dataset in used)
        self.retained = Retained(self, model, retention)
        self.retained.check_optimiser(args)
        logits_type(loss_kernel, torch.float32, args.device)  # refused here, not at the first step
        self.head = OutputHead.of(model).install()
        self.head.kernel = loss_kernel
        self.kl_coef, self.kl_direction = kl_coef, kl_direction
        self.objective: Objective | None = objective
        self.packing, self.pack_length, self.group_by_length = packing, pack_length, group_by_length
        self.mixed = list(mixed)
        self.stop_request = StopRequest()
        self.log_window: LogWindow | None = None
        self.epoch_batches: EpochBatches | None = None
        self._layout: tuple[list[list[list[int]]], np.ndarray | None] | None = None
        pad_token_id = getattr(processing_class, "pad_token_id", None) or 0
        self._collators = {flag: LabelAnnealingCollator(pad_token_id, packing=flag) for flag in (False, True)}
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,  # type: ignore[arg-type]
            eval_dataset=eval_dataset,  # type: ignore[arg-type]
            data_collator=self._collators[packing],
            processing_class=processing_class,
            callbacks=[StepControl(self), self.retained, *callbacks],
            **kwargs,
        )
        self.model_accepts_loss_kwargs = (
            True  # transformers before 5.19 asks this, not `loss_is_scaled_for_ga`
        )
        self.budget = None if kl_budget is None else KlBudget(self, kl_coef, kl_budget)
        if self.budget is not None:
            self.add_callback(self.budget)
        if self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1:
            raise ConfigError(
                "tensor, context and sequence parallel training are not supported; use DDP or FSDP"
            )

    # --- batches ----------------------------------------------------------------------------------------

    def _loader(
        self, datasets: Sequence[CachedDataset], batches: EpochBatches, *, packing: bool
    ) -> DataLoader:
        args = self.args
        workers = args.dataloader_num_workers
        return DataLoader(
            UnitDataset(datasets),
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=self._collators[packing],
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
            multiprocessing_context=args.dataloader_multiprocessing_context if workers else None,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=args.process_index),
        )

    def _units(self, datasets: Sequence[CachedDataset]) -> tuple[list[list[list[int]]], np.ndarray | None]:
        """Units of every dataset in overall row numbers, and all lengths where they matter; made once."""
        if self._layout is None:
            lengths = None
            if self.packing or self.group_by_length:
                lengths = np.concatenate([dataset.lengths() for dataset in datasets])
            layout, start = [], 0
            for dataset in datasets:
                if self.packing and lengths is not None:
                    capacity = capacity_of([lengths], self.pack_length)
                    packs = best_fit(lengths[start : start + len(dataset)], capacity)
                    layout.append([[start + row for row in pack] for pack in packs])
                else:
                    layout.append([[start + row] for row in range(len(dataset))])
                start += len(dataset)
            self._layout = layout, lengths
        return self._layout

    def get_train_dataloader(self) -> DataLoader:
        """This rank's batches of an epoch; the order depends on the data seed and the epoch alone."""
        if self.train_dataset is None:
            raise ConfigError("training needs a train_dataset, got none")
        datasets = [self.train_dataset, *(dataset for dataset, _ in self.mixed)]
        units, lengths = self._units(datasets)  # type: ignore[arg-type]
        amounts = [1.0, *(amount for _, amount in self.mixed)]
        args = self.args
        self.epoch_batches = EpochBatches(
            sources_of(units, datasets, amounts),  # type: ignore[arg-type]
            self._train_batch_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=args.train_sampling_strategy != "sequential",
            lengths=lengths if self.group_by_length else None,
            window=args.gradient_accumulation_steps * args.world_size,
            rank=args.process_index,
            world_size=args.world_size,
        )
        return self._loader(datasets, self.epoch_batches, packing=self.packing)  # type: ignore[arg-type]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """This rank's batches for evaluation, never packed; every row is counted once."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]  # type: ignore[index]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(dataset, CachedDataset):
            raise ConfigError(f"evaluation needs a CachedDataset, got {type(dataset).__name__}")
        return self.loader_of_rows(dataset, np.arange(len(dataset)), as_trained=False)

    def loader_of_rows(self, dataset: CachedDataset, rows: Iterable[int], *, as_trained: bool) -> DataLoader:
        """This rank's share of the given rows, in order: packed and batched as in training, or as in evaluation."""
        args = self.args
        chosen = np.asarray(list(rows), dtype=np.int64)
        units = chosen[:, None].tolist()
        if packing := as_trained and self.packing:
            lengths = np.asarray([len(dataset[row]["input_ids"]) for row in chosen.tolist()])
            capacity = self.pack_length or 2 * int(lengths.max())  # room for two rows at least
            units = [chosen[pack].tolist() for pack in best_fit(lengths, capacity)]
        batches = EpochBatches(
            [Source(units=units)],
            self._train_batch_size if as_trained else args.eval_batch_size,
            shuffle=False,
            rank=args.process_index,
            world_size=args.world_size,
        )
        return self._loader([dataset], batches, packing=packing)

    def device_batch(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows of a dataset as one batch on the model's device, padded or packed as in training."""
        return self._prepare_inputs(self.data_collator(rows))  # type: ignore[arg-type]

    # --- the loss ---------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """int64 [3]: labels, teacher positions and tokens of all micro-batches of a step on all ranks."""
        counts = [(*count_targets(batch), batch["num_tokens"]) for batch in batch_samples]
        totals = self._prepare_input(torch.tensor(counts, dtype=torch.int64).reshape(-1, 3).sum(0))
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, reduction="sum")
        if self.log_window is None:
            self.log_window = LogWindow(self.args.device)
        self.log_window.step(totals[2])
        return totals

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch: summed over micro-batches and averaged over ranks it is the step's."""
        counts: dict[str, Any] = {}
        if isinstance(num_items_in_batch, torch.Tensor):
            # DDP and FSDP average over ranks what ought to be summed; a smaller denominator undoes it.
            share = num_items_in_batch[:2] / self.args.world_size
            counts = {"num_ce": share[0], "num_kl": share[1]}
        counts |= {"kl_coef": self.coef_now, "kl_direction": self.kl_direction, "objective": self.objective}
        output = self.head.loss(model, inputs, **counts)
        if num_items_in_batch is not None:
            self.finite.see("loss", output.loss, self.state.global_step + 1)
            parts: list[Any] = [self.log_window, self.budget]
            for part in filter(None, parts):
                part.add(output)
        return (output.loss, {"loss": output.loss}) if return_outputs else output.loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the base class; behind the last backward pass of a step the penalties add theirs, once."""
        loss = super().training_step(*args, **kwargs)
        if self.retained.methods and self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            loss = loss + self.retained.add_gradients(1.0 if scaler is None else scaler.get_scale())
        return loss

    # --- evaluation -------------------------------------------------------------------------------------

    def measure_rows(
        self, dataloader: DataLoader, kl_direction: str = "forward", on_batch: Any = None
    ) -> Measurement:
        """Means over a loader on all ranks. Collective."""
        model = self.evaluation_model()

        def reduce(sums: torch.Tensor) -> torch.Tensor:
            if self.args.world_size == 1:
                return sums
            return self.accelerator.reduce(sums.to(self.args.device), reduction="sum").cpu()

        return measure(
            model,
            self.head,
            dataloader,
            kl_direction=kl_direction,
            prepare=self._prepare_inputs,
            reduce=reduce,
            on_batch=on_batch or (lambda: None),
        )

    @property
    def coef_now(self) -> float | torch.Tensor:
        """The coefficient of the moment; with a budget on the device."""
        return self.kl_coef if self.budget is None else self.budget.coef

    def evaluation_model(self) -> nn.Module:
        """The model to call without gradients: sharded under FSDP, else the one inside DDP."""
        if not self.accelerator._models and self.model_wrapped is self.model:
            if self.is_fsdp_enabled:
                self.model = self.model_wrapped = self.accelerator.prepare(self.model)
            else:
                self.accelerator.prepare_model(self.model, evaluation_mode=True)
        assert self.model is not None
        return self.model

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """CE, perplexity and KL(initial || model) over a loader of `get_eval_dataloader`."""
        self.callback_handler.eval_dataloader = dataloader

        def on_batch() -> None:
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        result = self.measure_rows(dataloader, on_batch=on_batch).require_finite(metric_key_prefix)
        metrics = metrics_of(result, float(self.coef_now), learns=self.learns)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        num_samples = self.num_examples(dataloader)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=named, num_samples=num_samples)  # type: ignore[arg-type]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in the base class; no time of training."""
        with evaluating(self):
            return super().evaluate(*args, **kwargs)

    # --- logs and checkpoints ---------------------------------------------------------------------------
    def pause(self, seconds: float) -> None:
        """Leave time that was no training out of the throughput."""
        if self.log_window is not None:
            self.log_window.pause(seconds)

    def restart_log_window(self) -> None:
        """Begin to count anew: what was before the first step was no training."""
        self.log_window = LogWindow(self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the interval to the Trainer's own line."""
        if "loss" in logs and self.log_window is not None:

            def mean(sums: torch.Tensor) -> torch.Tensor:
                return sums if self.args.world_size == 1 else self.accelerator.reduce(sums, reduction="mean")

            logs |= self.log_window.drain(mean) | self.retained.drain(mean)
            logs |= {} if self.budget is None else {"kl_coef": self.budget.coef.item()}
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As the base class, but without `training_args.bin`, a pickle of the arguments."""
        super()._save(output_dir, state_dict)
        (Path(output_dir or self.args.output_dir or ".") / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write to a staging directory, mark it complete, rename it, then drop surplus old ones."""
        begin = time.perf_counter()
        run_dir, step = Path(self._get_output_dir(trial)), self.state.global_step
        staging = checkpoint.staging_directory(run_dir, step)
        final = checkpoint.final_directory(run_dir, step)
        if checkpoint.is_complete(final):
            return
        try:
            with checkpoint.writing_to(staging):
                self._write_checkpoint(run_dir, staging, final)
        except OSError:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)  # of no use, and the disk may be full
            raise
        self.accelerator.wait_for_everyone()
        self.pause(time.perf_counter() - begin)

    def _write_checkpoint(self, run_dir: Path, staging: Path, final: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.store_flos()
        self.save_model(str(staging), _internal_call=True)
        if self.state.best_global_step:
            best = checkpoint.final_directory(run_dir, self.state.best_global_step)
            if best == final or best.exists():
                self.state.best_model_checkpoint = str(best)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
        if self.args.should_save:
            states = callback_states([*self.callback_handler.callbacks, self.control])
            self.state.stateful_callbacks = states  # type: ignore[assignment]
            self.state.save_to_json(str(staging / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoint.commit_checkpoint(staging, final, self.state.global_step)
            best_path = self.state.best_model_checkpoint
            checkpoint.rotate(run_dir, self.args.save_total_limit, Path(best_path) if best_path else None)
