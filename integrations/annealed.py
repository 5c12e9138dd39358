"""The label annealing loss inside somebody's `transformers.Trainer`: their data set, loop and checkpoints; our batches,
loss, counts, first check and evaluation.
"""

import sys
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from formats.cache import TeacherCache
from formats.errors import ConfigError
from integrations.collator import JoiningCollator, UnitCollator
from integrations.joined_rows import COLUMNS, Found, JoinedDataset, JoinedRows, rows_of, why_missing
from integrations.settings import require_only
from integrations.teacher import ancestor_of, vocabulary_of
from trainer.config import TrainConfig
from trainer.data.dataset import CachedDataset
from trainer.data.label_terms import bare_objective, reads_initial, resolved
from trainer.data.sampler import EpochBatches, Source
from trainer.loop.finite import FiniteWatch, least_of_ranks
from trainer.loop.kl_budget import KlBudget
from trainer.loop.label_annealing_trainer import LabelAnnealingTrainer
from trainer.loop.log_window import evaluating
from trainer.loop.output_head import OutputHead
from trainer.loop.step0 import HeadCheck, Step0Check, Step0Report
from trainer.loss.chunks import logits_type
from trainer.objective import Objective
from trainer.preflight import best_model
from trainer.preflight.arguments import refuse_argument, require_one_device
from trainer.preflight.liger import settle_liger

REFUSED = (
    "label_smoothing_factor",
    "auto_find_batch_size",
    "deepspeed",
    "include_for_metrics",
    "batch_eval_metrics",
)
"""Names of TrainingArguments that this loss cannot honour, whoever's Trainer it is in."""

NOT_CALLED = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")
"""Functions of a Trainer that would have to see logits, or another loss."""

_OURS: Any = LabelAnnealingTrainer


def say(line: str) -> None:
    """One line for the user, on stderr."""
    print(line, file=sys.stderr, flush=True)


def refuse_arguments(args: Any) -> None:
    """Refuse TrainingArguments that ask for what the loss cannot give.

    Raises:
        ConfigError: names the first one and what to do instead.
    """
    for name in REFUSED:
        refuse_argument(name, getattr(args, name, None))
    if not args.average_tokens_across_devices:
        raise ConfigError(
            "average_tokens_across_devices must be true, got false: a step's mean is over the tokens of all processes; "
            "remove it"
        )
    split = args.accelerator_config
    if getattr(split, "split_batches", False) or getattr(split, "dispatch_batches", False):
        raise ConfigError(
            "accelerator_config must leave split_batches and dispatch_batches off: a batch's teacher belongs to its "
            "rows, and cannot be cut with them"
        )
    if args.bf16_full_eval or args.fp16_full_eval:
        raise ConfigError(
            "bf16_full_eval and fp16_full_eval: evaluation computes in the precision of training; remove"
        )


class _NewWindow(TrainerCallback):
    """Time before the first step is no training time."""

    def __init__(self, trainer: "Annealed") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.restart_log_window()


class Annealed(Trainer):
    """First base of a subclass of somebody's Trainer; call `anneal_with` behind their `__init__`.

    Loss, counts and evaluation are functions of `LabelAnnealingTrainer`, which ask no more of a Trainer than what
    `anneal_with` sets.
    """

    loss_is_scaled_for_ga = True
    is_evaluating = False
    learns = True
    pack_length: int | None = None
    waiting: Sequence[Any] = ()
    objective: Objective

    compute_loss = _OURS.compute_loss
    get_batch_samples = _OURS.get_batch_samples
    _get_num_items_in_batch = _OURS._get_num_items_in_batch
    _loader = _OURS._loader
    loader_of_rows = _OURS.loader_of_rows
    measure_rows = _OURS.measure_rows
    evaluation_model = _OURS.evaluation_model
    coef_now = _OURS.coef_now
    evaluation_loop = _OURS.evaluation_loop
    pause = _OURS.pause
    restart_log_window = _OURS.restart_log_window

    def anneal_with(
        self,
        config: TrainConfig,
        tokenizer: Any,
        *,
        on_missing: str = "refuse",
        eval_cache: str | None = None,
        packing: bool = False,
        flatten: bool = False,
    ) -> None:
        """Take the loss's place in the Trainer, whose model is not wrapped yet.

        Args:
            config: `cache` and the settings of `integrations.settings`, no others.
            tokenizer: the one that made the data set.
            on_missing: what becomes of a row that the cache does not hold.
            eval_cache: the cache of the evaluation data; None evaluates the cross-entropy alone.
            packing: rows share sequences; so they do where the data set has `seq_lengths`.
            flatten: packed rows of a batch all share one.

        Raises:
            FormatError: a cache is missing, unfinished or broken.
            ConfigError: the model's head, the data or the arguments do not fit.
            IdentityMismatchError: the cache belongs to another model.
        """
        args = self.args
        require_only(config)
        for name in NOT_CALLED:
            if getattr(self, name, None) is not None:
                raise ConfigError(
                    f"{name} is not available here: the loss comes from the cache and no logits are built; remove it"
                )
        require_one_device(args, self.model)
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if parallel is not None and parallel.tp_size * parallel.cp_size * parallel.sp_size > 1:
            raise ConfigError(
                "tensor, context and sequence parallel training are not supported; use DDP or FSDP"
            )
        logits_type(config.loss_kernel, torch.float32, args.device)  # type: ignore[arg-type]
        settle_liger(args, self.model)
        args.logging_nan_inf_filter = False
        cache, self.say = TeacherCache(config.cache), say if args.process_index == 0 else (lambda line: None)
        self.head = OutputHead.of(self.model).install()  # type: ignore[arg-type]
        self.head.kernel = config.loss_kernel  # type: ignore[assignment]
        different = config.allow_different_student
        with_kl = config.kl_coef > 0
        reads_teacher = with_kl or reads_initial(config.weighting, target=True)
        ancestor = ancestor_of(cache, self.head.model, tokenizer) if reads_teacher and not different else None
        size = vocabulary_of(cache, self.head.model, tokenizer, different_student=different)
        self.head.vocab_size = size if size < self.head.num_outputs else None

        def dataset(opened: TeacherCache, loss: str, **settings: Any) -> CachedDataset:
            made = CachedDataset(opened, config.temperature, loss, tail_draws=draws, **settings)
            made.vocab_size = size
            return made

        draws = config.tail_draws and config.kl_direction == "forward"
        self.objective = resolved(bare_objective(config), cache)
        self.kl_coef, self.kl_direction = config.kl_coef, config.kl_direction
        self.train_rows = JoinedRows(
            dataset(cache, "both" if with_kl else "ce", objective=self.objective), on_missing
        )
        held_out = None if eval_cache is None else CachedDataset(eval_cache)
        if held_out is not None:
            held_out.vocab_size = size
        self.eval_rows = JoinedRows(held_out, on_missing)
        self._checked: set[int] = set()
        self.packing = packing or "seq_lengths" in (getattr(self.train_dataset, "column_names", None) or ())
        pad = getattr(tokenizer, "pad_token_id", None) or 0
        self._collators = {
            flag: UnitCollator(pad, packing=flag, flatten=flatten and flag) for flag in (False, True)
        }
        self.data_collator = JoiningCollator(self.train_rows, self._collators[self.packing])  # type: ignore[assignment]
        self.finite, self.log_window = FiniteWatch(args.device), None
        self.budget = None if config.kl_budget is None else KlBudget(self, config.kl_coef, config.kl_budget)  # type: ignore[arg-type]
        if self.train_dataset is not None and not hasattr(self.train_dataset, "__len__"):
            # accelerate would let one process read a stream, and cut its batches for the others.
            self.accelerator.dataloader_config.dispatch_batches = False
            self._refuse_ends_of_epochs()
        if self.train_dataset is not None:
            self.require_rows(self.train_dataset, self.train_rows, "train")
        held: Any = self.eval_dataset
        for each in held.values() if isinstance(held, dict) else () if held is None else (held,):
            self.require_rows(each, self.eval_rows, "evaluation")
        first: TrainerCallback
        if reads_teacher:
            first = Step0Check(
                self,  # type: ignore[arg-type]
                dataset(cache, "both"),
                self._on_step0,
                num_rows=config.step0_rows,
                threshold=config.step0_threshold,
                different_student=different,
                ancestor=ancestor,
            )
        else:
            line = f"step 0: no KL is measured: kl_coef is 0, so only the tokens of {config.cache} are used"
            first = HeadCheck(self, self.train_rows.dataset, line, self.say)  # type: ignore[arg-type]
        for callback in (first, _NewWindow(self), self.budget):
            if callback is not None:
                self.add_callback(callback)
        if not hasattr(Trainer, "loss_is_scaled_for_ga"):  # transformers < 5.19 asks this instead
            self.compute_loss_func = self.compute_loss

    def _refuse_ends_of_epochs(self) -> None:
        """accelerate gives each process shards of its own of a stream that has enough of them."""
        args, shards = self.args, getattr(self.train_dataset, "n_shards", 0)
        if 1 < args.world_size <= shards:
            for name in ("logging_strategy", "eval_strategy", "save_strategy"):
                if best_model.word(getattr(args, name)) == "epoch":
                    raise ConfigError(
                        f"{name} must be steps or no for a stream of {shards} shards, which processes end at different "
                        f"steps, got epoch"
                    )

    def _on_step0(self, report: Step0Report) -> None:
        self.step0 = report
        self.say(report.line())

    # --- rows -------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        """Keep what a row is read from, which the model's `forward` may not take."""
        super()._set_signature_columns_if_needed()
        columns = [*(self._signature_columns or ()), *COLUMNS]
        self._signature_columns = list(dict.fromkeys(columns))  # type: ignore[assignment]

    def require_rows(self, dataset: Any, rows: JoinedRows, name: str) -> None:
        """See that the cache holds every row, each process a part of them, before anything is trained. Collective.

        A stream is looked at when it is read.

        Raises:
            ConfigError: the cache lacks some; with the count, the likely reasons and what to do.
        """
        if rows.dataset is None or not hasattr(dataset, "__len__") or id(dataset) in self._checked:
            return
        rank, world_size = self.args.process_index, self.args.world_size
        found = rows.find(rows_of(dataset, rank, world_size))
        counts = torch.tensor([found.num_rows, found.num_missing], device=self.args.device)
        if world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        self._checked.add(id(dataset))
        num_rows, num_missing = counts.tolist()
        if num_missing and rows.on_missing == "refuse":
            raise ConfigError(self._missing(rows.dataset.cache, found, name, num_rows, num_missing))
        if num_missing:
            self.say(
                f"{num_missing:,} of {num_rows:,} rows of the {name} data set are not in {rows.dataset.name}: no KL on "
                "them (on_missing: skip_kl)"
            )

    def _missing(self, cache: TeacherCache, found: Found, name: str, num_rows: int, num_missing: int) -> str:
        reasons = "; ".join(why_missing(cache, found.missing)) if found.missing else "see the other processes"
        return (
            f"every row of the {name} data set must be in the cache, got {num_missing:,} of {num_rows:,} that "
            f"{cache.path} does not hold ({reasons}); build a cache from these very rows (`write_rows`, docs/"
            "integrations.md), or set on_missing: skip_kl to train them without KL"
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """This rank's batches for evaluation; every row is counted once."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]  # type: ignore[index]
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if not hasattr(dataset, "__len__") or isinstance(dataset, dict):
            raise ConfigError(f"evaluation needs a data set of known length, got {type(dataset).__name__}")
        self.require_rows(dataset, self.eval_rows, "evaluation")
        args = self.args
        batches = EpochBatches(
            [Source(units=[[row] for row in range(len(dataset))])],
            args.eval_batch_size,
            shuffle=False,
            rank=args.process_index,
            world_size=args.world_size,
        )
        packed = "seq_lengths" in (getattr(dataset, "column_names", None) or ())
        return DataLoader(
            JoinedDataset(dataset, self.eval_rows),
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=self._collators[self.packing or packed],
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        )

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As for evaluation."""
        return self.get_eval_dataloader(test_dataset)

    def device_batch(self, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Items of a cached data set as one batch on the model's device, padded or packed as in training."""
        return self._prepare_inputs(self._collators[self.packing](list(rows)))  # type: ignore[return-value]

    # --- the log ----------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in the base class; no time of training."""
        with evaluating(self):
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the interval to the Trainer's own line."""
        if "loss" in logs and self.log_window is not None:

            def mean(sums: torch.Tensor) -> torch.Tensor:
                return sums if self.args.world_size == 1 else self.accelerator.reduce(sums, reduction="mean")

            logs |= self.log_window.drain(mean)
            logs |= {} if self.budget is None else {"kl_coef": self.budget.coef.item()}
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """As the base class, but a loss that is not finite is neither logged nor saved.

        Raises:
            DivergenceError: names the step.
        """
        if self.accelerator.scaler is None:
            self.finite.see("gradient", grad_norm, self.state.global_step)
        if self.control.should_log or self.control.should_save or self.control.should_evaluate:
            self.finite.require(
                partial(least_of_ranks, world_size=self.args.world_size),
                lambda: f"; use a lower learning_rate (it was {self.args.learning_rate:g}) or other data",
            )
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
