"""`train`: from a cache and a model to a directory that transformers and vLLM load.

Order: settings, identity, model, output directory, then the Trainer; so a mistake costs seconds and leaves
nothing behind. An interrupted run (SIGTERM, Ctrl-C, power cut) continues when the same command is given
again.
"""

import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from formats.cache import TeacherCache
from formats.identity.fingerprint import ModelFingerprint, resolve_model
from trainer.config import TrainConfig
from trainer.loading import (
    load_model,
    load_tokenizer,
    open_cache,
    quiet_transformers,
    stored_dtype,
)
from trainer.loss.logits import passes_of
from trainer.preflight.before_start import check_before_start
from trainer.preflight.continuation import run_facts
from trainer.preflight.liger import settle_liger
from trainer.preflight.vocabulary import shared_vocabulary
from trainer.recipe import resolve_training, training_arguments
from trainer.result.run_directory import RunDirectory

if TYPE_CHECKING:
    from trainer.loop.label_annealing_trainer import LabelAnnealingTrainer
    from trainer.loop.step0 import Step0Report


@dataclass(kw_only=True)
class TrainReport:
    """What a run did."""

    out: Path
    """The output directory."""
    num_steps: int
    """Optimizer steps taken in all, resumed ones included."""
    max_steps: int
    """Optimizer steps planned."""
    seconds: float
    """Wall time of this call."""
    step0: dict[str, Any] | None = None
    """The check before the first update (`Step0Report.to_dict()`)."""
    last: dict[str, float] = field(default_factory=dict)
    """The last training log line: loss, ce, kl, head_mass, ..."""
    evaluation: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Evaluation cache -> ce, perplexity, kl, num_tokens."""
    log_history: list[dict[str, Any]] = field(default_factory=list)
    """Every log entry."""
    resumed_from: int | None = None
    """Step of the checkpoint this call continued from."""
    interrupted_by: str | None = None
    """Name of the signal that stopped the run; the same command continues it."""

    def line(self) -> str:
        """The last line for the user."""
        if self.interrupted_by:
            return (
                f"stopped by {self.interrupted_by} after step {self.num_steps} of {self.max_steps}, "
                "checkpoint saved; "
                "the same command continues"
            )
        return f"{self.num_steps} steps in {self.seconds:.0f} s; model in {self.out}"


def train(config: TrainConfig) -> TrainReport:
    """Fine-tune `config.model` on `config.cache` and write the result to `config.out`.

    Start it under `torchrun` or `accelerate launch` for several processes; every one calls this function.

    Raises:
        ConfigError: settings, model or output directory do not fit.
        FormatError: a cache is missing, unfinished or broken.
        IdentityMismatchError: a cache was built with another model, tokenizer or template, or the KL before
            the first update is above `config.step0_threshold`.
        DivergenceError: the loss, a gradient or a weight is not finite; nothing is published.
    """
    with ExitStack() as opened:
        return _train(config, opened)


def _train(config: TrainConfig, opened_run: ExitStack) -> TrainReport:
    """`train`, which closes what is entered into `opened_run`."""
    started = time.perf_counter()
    resolved = resolve_training(config)
    on_cuda = torch.cuda.is_available() and not resolved.get("use_cpu")
    passes_of(config.loss_kernel, torch.float32, "cuda" if on_cuda else "cpu")
    quiet_transformers()
    fisher_paths = [config.ewc.cache] if config.ewc is not None else []
    others = (*(cache.path for cache in config.caches), *config.eval_caches.values(), *fisher_paths)
    for path in (config.cache, *others):
        TeacherCache(path)  # the cheapest mistakes first
    model_dir = resolve_model(config.model, config.revision)
    tokenizer = load_tokenizer(model_dir)
    check = not config.allow_different_student
    cache = open_cache(config.cache, model_dir, tokenizer, check_identity=check)
    mixed = [open_cache(entry.path, model_dir, tokenizer, check_identity=check) for entry in config.caches]
    held_out = {
        name: open_cache(path, model_dir, tokenizer, check_identity=check)
        for name, path in config.eval_caches.items()
    }
    known_text = [open_cache(path, model_dir, tokenizer, check_identity=check) for path in fisher_paths]

    from trainer.data.dataset import CachedDataset

    # Without a KL term nobody reads the teacher's payloads, so they are not decoded either.
    def rows(opened: TeacherCache, loss: str) -> CachedDataset:
        loss = "ce" if config.kl_coef == 0 and loss == "both" else loss
        return CachedDataset(opened, config.temperature, loss, *tail)

    forward = config.kl_direction == "forward"
    tail = (config.tail_moments and forward, config.tail_draws and forward)

    train_dataset = rows(cache, "both")
    mixed_datasets = [
        (rows(opened, entry.loss), entry.weight) for opened, entry in zip(mixed, config.caches, strict=True)
    ]
    first_check = CachedDataset(cache, config.temperature, "both", *tail)
    eval_datasets = {name: CachedDataset(opened) for name, opened in held_out.items()}
    fisher_rows = CachedDataset(known_text[0], loss="ce") if known_text else None

    model = load_model(model_dir, dtype=config.dtype, attn_implementation=config.attn_implementation)
    num_outputs = int(model.get_output_embeddings().weight.shape[0]) if model.get_output_embeddings() else 0
    vocab_size = shared_vocabulary(
        (cache, *mixed, *held_out.values(), *known_text),
        num_outputs,
        tokenizer,
        different_student=config.allow_different_student,
    )
    for dataset in (
        train_dataset,
        first_check,
        *(rows for rows, _ in mixed_datasets),
        *eval_datasets.values(),
    ):
        dataset.vocab_size = vocab_size
    if config.lora is not None:
        from trainer.result.lora import attach_adapters

        model = attach_adapters(model, config.lora)

    from trainer.retention.methods import methods_of

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    retention = methods_of(config, fisher_rows, int(resolved["seed"]), say)

    out = Path(config.out)
    args = training_arguments(resolved, out)
    settings = config.to_dict() | {"training": resolved}
    identity = cache.identity.to_dict()
    with args.main_process_first():
        directory = RunDirectory.open(out, settings, identity, owner=args.process_index == 0)
    opened_run.enter_context(directory)
    settle_liger(args, model)

    trainer = _make_trainer(
        config, model, args, tokenizer, train_dataset, mixed_datasets, eval_datasets, retention
    )
    trainer.head.vocab_size = vocab_size if vocab_size < num_outputs else None
    check_before_start(trainer)
    groups = {"training": [cache], "mixed": mixed, "evaluation": [*held_out.values()]}
    weights = ModelFingerprint.of(model_dir).weights if config.allow_different_student else None
    directory.require_same_run(run_facts(trainer, config, groups, weights))
    from trainer.loop.step0 import Step0Check

    def on_report(report: "Step0Report") -> None:
        if args.process_index == 0:
            say(report.line())
            directory.write_record(step0=report.to_dict())
        directory.record["step0"] = report.to_dict()

    trainer.add_callback(
        Step0Check(
            trainer,
            first_check,
            on_report,
            num_rows=config.step0_rows,
            threshold=config.step0_threshold,
            different_student=config.allow_different_student,
        )
    )
    if directory.checkpoint is not None and args.process_index == 0:
        say(f"continuing from {directory.checkpoint.name}")
    with trainer.stop_request:
        trainer.train(resume_from_checkpoint=str(directory.checkpoint) if directory.checkpoint else None)
    state = trainer.state
    logged = [entry for entry in state.log_history if "ce" in entry]
    report = TrainReport(
        out=out,
        num_steps=state.global_step,
        max_steps=state.max_steps,
        seconds=time.perf_counter() - started,
        step0=directory.record.get("step0"),
        last=dict(logged[-1]) if logged else {},
        log_history=list(state.log_history),
        resumed_from=int(directory.checkpoint.name.split("-")[-1]) if directory.checkpoint else None,
        interrupted_by=_interruption(trainer),
    )
    if report.interrupted_by is None:
        report.evaluation = _evaluate(trainer, eval_datasets)
        _publish(trainer, directory, config, model_dir, resolved, cache, report)
    report.seconds = time.perf_counter() - started
    return report


def _make_trainer(
    config: TrainConfig,
    model: Any,
    args: Any,
    tokenizer: Any,
    train_dataset: Any,
    mixed: list[tuple[Any, float]],
    eval_datasets: dict[str, Any],
    retention: list[Any],
) -> "LabelAnnealingTrainer":
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from trainer.loop.label_annealing_trainer import LabelAnnealingTrainer
    from trainer.loop.progress import AnnealProgress

    trainer = LabelAnnealingTrainer(
        model,
        args,
        train_dataset=train_dataset,
        eval_dataset=eval_datasets or None,
        mixed=mixed,
        kl_coef=config.kl_coef,
        kl_direction=config.kl_direction,
        loss_kernel=config.loss_kernel,  # type: ignore[arg-type]
        packing=config.packing,
        pack_length=config.pack_length,
        group_by_length=config.group_by_length,
        retention=retention,
        processing_class=tokenizer,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(AnnealProgress(bar=not args.disable_tqdm))
    return trainer


def _interruption(trainer: "LabelAnnealingTrainer") -> str | None:
    """The signal that ended the run early, agreed on by all ranks: the last step may still have completed
    it.
    """
    if trainer.state.global_step >= trainer.state.max_steps:
        return None
    return trainer.stop_request.signal_name or "a signal to another process"


def _evaluate(trainer: "LabelAnnealingTrainer", datasets: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    results = {}
    for name, dataset in datasets.items():
        found = trainer.measure_rows(trainer.get_eval_dataloader(dataset)).require_finite(name)
        results[name] = {
            "ce": found.ce,
            "perplexity": found.perplexity,
            "kl": found.kl if found.num_kl else None,
            "num_tokens": found.num_ce,
        }
    return results


def _publish(
    trainer: "LabelAnnealingTrainer",
    directory: RunDirectory,
    config: TrainConfig,
    model_dir: Path,
    resolved: Mapping[str, Any],
    cache: TeacherCache,
    report: TrainReport,
) -> None:
    """Save model, tokenizer and card to the staging directory, then give them their place. Collective."""
    import shutil

    from trainer.result.model_card import model_card
    from trainer.result.saving import save_result
    from trainer.retention.fisher_file import remove_fisher

    first = trainer.args.process_index == 0
    if first:
        shutil.rmtree(directory.staging, ignore_errors=True)
        directory.staging.mkdir()
    trainer.accelerator.wait_for_everyone()
    dtype = stored_dtype(model_dir) if config.save_dtype == "same" else config.save_dtype
    save_result(trainer, directory.staging, model_dir, lora=config.lora, dtype=dtype)
    if first:
        card = model_card(
            config,
            cache_id=cache.identity.digest(),
            identity=cache.identity.to_dict(),
            training=resolved,
            step0=report.step0,
            num_steps=report.num_steps,
            last=report.last,
            evaluation=report.evaluation,
        )
        (directory.staging / "README.md").write_text(card, encoding="utf-8")
        directory.publish(
            cache=cache.identity.digest(),
            num_steps=report.num_steps,
            last=report.last,
            evaluation=report.evaluation,
        )
        remove_fisher(directory.path)
        if not config.keep_checkpoints:
            for checkpoint in directory.path.glob("checkpoint-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
