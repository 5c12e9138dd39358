"""`train`: from a cache and a model to a directory that transformers and vLLM load.

Order: settings, identity, model, a dry save, output directory, then the Trainer; so a mistake costs seconds and leaves
nothing behind. An interrupted run (a signal, a power cut) continues when the same command is given again.
"""

import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from formats.errors import AnnealError
from formats.progress import counted
from trainer.checkpoint import writing_to
from trainer.config import TrainConfig
from trainer.evaluation.weight_distance import weight_distance
from trainer.inputs import Inputs, Rows, Student, facts_of, load_student, open_inputs, rows_of
from trainer.loading import quiet_transformers
from trainer.loop.kl_budget import unreached
from trainer.loop.label_annealing_trainer import LabelAnnealingTrainer
from trainer.loop.progress import AnnealProgress
from trainer.loop.reporters import Reporters
from trainer.loop.step0 import HeadCheck, Step0Check, Step0Report
from trainer.loss.chunks import logits_type
from trainer.notes import notes
from trainer.outcome import evaluate_rows, figures_of, measure_new_text
from trainer.preflight.before_start import check_before_start
from trainer.preflight.continuation import ewc_contents, run_facts
from trainer.preflight.disk import require_disk
from trainer.preflight.frozen import frozen_record
from trainer.preflight.liger import settle_liger
from trainer.quantization import as_stored
from trainer.recipe import on_gpu, resolve_training, training_arguments
from trainer.result.dry_save import dry_save
from trainer.result.lineage import own_weights, to_record
from trainer.result.measured import add_measured, measured_text
from trainer.result.model_card import model_card
from trainer.result.run_directory import RunDirectory
from trainer.result.saving import ResultLayout, save_result
from trainer.result.verify_saved import check_saved, live_predictions
from trainer.retention.ewc_tasks import ewc_of
from trainer.retention.fisher_file import remove_fisher
from trainer.retention.l2 import L2
from trainer.retention.method import RetentionMethod
from trainer.retention.sfa import Sfa


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
    new_text: dict[str, Any] | None = None
    """KL(initial || model) at T = 1 and CE on rows of the new text after the last step, whatever was trained."""
    last: dict[str, float] = field(default_factory=dict)
    """The last training log line: loss, ce, kl, kept_mass, ..."""
    evaluation: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Evaluation cache -> what `Measurement.to_dict` says."""
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
        return f"{counted(self.num_steps, 'step')} in {self.seconds:.0f} s; model in {self.out}"


def train(
    config: TrainConfig, *, trainer_class: type[LabelAnnealingTrainer] = LabelAnnealingTrainer
) -> TrainReport:
    """Fine-tune `config.model` on `config.cache` and write the result to `config.out`.

    Start it under `torchrun` or `accelerate launch` for several processes; every one calls this function.

    Args:
        trainer_class: for people with a loss of their own (`examples/real/two_models.py`).

    Raises:
        ConfigError: settings, model or output directory do not fit; or the model could not be saved again.
        FormatError: a cache is missing, unfinished or broken.
        IdentityMismatchError: a cache was built with another model, tokenizer or template, or the KL before
            the first update is above `config.step0_threshold`.
        DivergenceError: the loss, a gradient or a weight is not finite; nothing is published.
        AnnealError: the saved model does not compute what the trained one does; it is not published.
    """
    with ExitStack() as opened:
        return _train(config, opened, trainer_class)


def _train(
    config: TrainConfig, opened_run: ExitStack, trainer_class: type[LabelAnnealingTrainer]
) -> TrainReport:
    """`train`, which closes what is entered into `opened_run`."""
    started = time.perf_counter()
    resolved, inputs, rows, student, retention = prepare(config)
    out = Path(config.out)
    result_bytes = dry_save(student.model, inputs.tokenizer, inputs.model_dir, out, student.layout)
    args = training_arguments(resolved, out)
    rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.process_index == 0:
        for line in notes(config, resolved, inputs, rows, student, rows_per_step):
            say(line)
    with args.main_process_first():
        settings = config.to_dict() | {"training": resolved}
        identity = inputs.target.identity.to_dict()
        directory = RunDirectory.open(out, settings, identity, owner=args.process_index == 0)
    opened_run.enter_context(directory)
    settle_liger(args, student.model)
    trainer = make_trainer(config, student, args, inputs.tokenizer, rows, retention, trainer_class)
    check_before_start(trainer)
    require_disk(trainer, out, result_bytes)
    directory.require_same_run(run_facts(trainer, config, *facts_of(config, inputs)))
    if args.process_index == 0:  # not at the end alone: checkpoints are models too
        directory.write_record(lineage=to_record(inputs.lineage))
    check_before_first_step(trainer, config, inputs, rows, directory)
    how_far = partial(measure_new_text, trainer, config, inputs, student.vocab_size)
    reporters = Reporters(trainer, args.report_to, lambda: how_far()["kl"])
    trainer.add_callback(reporters)
    run_steps(trainer, directory)
    report = report_of(trainer, directory, started)
    if report.interrupted_by is None:
        if args.process_index == 0 and (above := unreached(config.kl_budget, report.last)):
            say(above)
        report.evaluation = evaluate_rows(trainer, rows.evaluation, inputs)
        report.new_text = how_far()
        reporters.tell(figures_of(report.evaluation, report.new_text))
    reporters.close()
    if report.interrupted_by is None:
        with writing_to(directory.path):
            publish(trainer, directory, config, inputs, student.layout, rows, resolved, report)
    report.seconds = time.perf_counter() - started
    return report


def say(line: str) -> None:
    """One line for the user, on stderr."""
    print(line, file=sys.stderr, flush=True)


# --- before the model --------------------------------------------------------------------------------------


def prepare(config: TrainConfig) -> tuple[dict[str, Any], Inputs, Rows, Student, list[RetentionMethod]]:
    """What a run loads before anything is written, checked: arguments, caches, rows, model, methods."""
    resolved = resolve_training(config)
    # Refused here, if it is not there; auto would be tried, by all processes on one GPU.
    if config.loss_kernel != "auto":
        logits_type(config.loss_kernel, torch.float32, "cuda" if on_gpu(resolved) else "cpu")
    quiet_transformers()
    inputs = open_inputs(config)
    rows = rows_of(config, inputs)
    student = load_student(config, inputs, resolved)
    for dataset in rows.with_teacher:
        dataset.vocab_size = student.vocab_size
    retention = retention_methods(config, inputs, rows, student, int(resolved["seed"]))
    return resolved, inputs, rows, student, retention


def retention_methods(
    config: TrainConfig, inputs: Inputs, rows: Rows, student: Student, seed: int
) -> list[RetentionMethod]:
    """The methods that the settings ask for, in the order in which they act."""
    methods: list[RetentionMethod] = []
    if config.l2 is not None:
        methods.append(L2(config.l2))
    tasks, start = config.ewc_tasks, inputs.start.weights
    methods += ewc_of(tasks, rows.fisher, inputs.anchors, student.model, start=start, seed=seed, say=say)
    if config.sfa is not None:
        methods.append(Sfa(config.sfa))
    return methods


# --- the model, and the run around it ----------------------------------------------------------------------


def make_trainer(
    config: TrainConfig,
    student: Student,
    args: TrainingArguments,
    tokenizer: Any,
    rows: Rows,
    retention: list[RetentionMethod],
    trainer_class: type[LabelAnnealingTrainer] = LabelAnnealingTrainer,
) -> LabelAnnealingTrainer:
    """The Trainer with this program's progress lines instead of its own."""
    trainer = trainer_class(
        student.model,
        args,
        train_dataset=rows.training,
        eval_dataset=rows.evaluation or None,
        mixed=rows.mixed,
        kl_coef=config.kl_coef,
        kl_direction=config.kl_direction,
        objective=rows.objective,
        kl_budget=config.kl_budget,
        loss_kernel=config.loss_kernel,  # type: ignore[arg-type]
        packing=config.packing,
        pack_length=config.pack_length,
        group_by_length=config.group_by_length,
        retention=retention,
        processing_class=tokenizer,
    )
    padded = student.vocab_size is not None and student.vocab_size < trainer.head.num_outputs
    trainer.head.vocab_size = student.vocab_size if padded else None
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(AnnealProgress(bar=not args.disable_tqdm))
    return trainer


def check_before_first_step(
    trainer: LabelAnnealingTrainer, config: TrainConfig, inputs: Inputs, rows: Rows, directory: RunDirectory
) -> None:
    """Have the model proven to be its own teacher when everything is placed, and record what was found."""
    first = trainer.args.process_index == 0
    if rows.first_check is None:
        line = (
            f"step 0: no KL is measured: kl_coef is 0, so only the tokens of {config.cache} are used, whichever "
            "model built it"
        )
        trainer.add_callback(HeadCheck(trainer, rows.training, line, say))
        return

    def on_report(report: Step0Report) -> None:
        if first:
            say(report.line())
            directory.write_record(step0=report.to_dict())
        directory.record["step0"] = report.to_dict()

    check = Step0Check(
        trainer,
        rows.first_check,
        on_report,
        num_rows=config.step0_rows,
        threshold=config.step0_threshold,
        different_student=config.allow_different_student or config.fake_quantize != "none",
        ancestor=inputs.ancestor,
    )
    trainer.add_callback(check)


def run_steps(trainer: LabelAnnealingTrainer, directory: RunDirectory) -> None:
    """Train to the end, or to a signal, from the newest checkpoint if there is one."""
    checkpoint = directory.checkpoint
    if checkpoint is not None and trainer.args.process_index == 0:
        say(f"continuing from {checkpoint.name}")
    with trainer.stop_request:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


# --- after the last step -----------------------------------------------------------------------------------


def report_of(trainer: LabelAnnealingTrainer, directory: RunDirectory, started: float) -> TrainReport:
    """What the steps came to."""
    state = trainer.state
    logged = [entry for entry in state.log_history if "ce" in entry]
    # The signal is agreed on by all ranks; the last step may still have completed the run.
    stopped = state.global_step < state.max_steps
    return TrainReport(
        out=directory.path,
        num_steps=state.global_step,
        max_steps=state.max_steps,
        seconds=time.perf_counter() - started,
        step0=directory.record.get("step0"),
        last=dict(logged[-1]) if logged else {},
        log_history=list(state.log_history),
        resumed_from=int(directory.checkpoint.name.split("-")[-1]) if directory.checkpoint else None,
        interrupted_by=(trainer.stop_request.signal_name or "a signal to another process")
        if stopped
        else None,
    )


def publish(
    trainer: LabelAnnealingTrainer,
    directory: RunDirectory,
    config: TrainConfig,
    inputs: Inputs,
    layout: ResultLayout | None,
    rows: Rows,
    resolved: Mapping[str, Any],
    report: TrainReport,
) -> None:
    """Save model, tokenizer and card to the staging directory, prove them, give them their place. Collective.

    Raises:
        AnnealError: the saved model is not the trained one; it is set aside.
    """
    first = trainer.args.process_index == 0
    refusal: AnnealError | None = None
    with as_stored(trainer.model):
        live = live_predictions(trainer, rows.training) if config.verify_saved else None
    if first:
        shutil.rmtree(directory.staging, ignore_errors=True)
        directory.staging.mkdir()
    trainer.accelerator.wait_for_everyone()
    try:
        written = save_result(trainer, directory.staging, inputs.model_dir, config.lora, layout)
        if first and live is not None:
            check = check_saved(live, directory.staging, written, layout.dtypes if layout else ())
            check.require_passed()
            say(check.line())
            directory.record["saved"] = check.to_dict()
    except AnnealError as error:
        refusal = AnnealError(
            f"{error}; nothing was published, the weights are in {directory.set_aside()}"
            if first
            else str(error)
        )
    agree(trainer, refusal)
    if first:
        # Adapters alone have no distance: what they add to the weights is not stored.
        distance = None if layout is None else weight_distance(directory.staging, inputs.model_dir).to_dict()
        identity = inputs.target.identity
        card = model_card(
            config,
            cache_id=identity.digest(),
            identity=identity.to_dict(),
            training=resolved,
            step0=report.step0,
            new_text=report.new_text,
            num_steps=report.num_steps,
            last=report.last,
            kl_to=None if inputs.kl_to in (None, inputs.start) else inputs.kl_to.name,
        )
        (directory.staging / "README.md").write_text(card, encoding="utf-8")
        directory.publish(
            cache=identity.digest(),
            distance=distance,
            frozen=frozen_record(trainer.evaluation_model(), config.freeze),
            ewc=ewc_contents(
                inputs.known, [None if path is None else own_weights(path) for path in inputs.anchors]
            ),
            kl_to=None
            if inputs.kl_to is None
            else {k: v for k, v in asdict(inputs.kl_to).items() if k != "cache"},
            num_steps=report.num_steps,
            last=report.last,
            new_text=report.new_text,
            evaluation=report.evaluation,
        )
        # The run's evaluation is of weights rounded as they will be served, and these are stored before rounding.
        of_the_stored = report.evaluation if config.fake_quantize == "none" else {}
        measured = [
            measured_text(name, inputs.held_out[name], found) for name, found in of_the_stored.items()
        ]
        add_measured(directory.path, measured)
        remove_fisher(directory.path, [n for n, task in enumerate(config.ewc_tasks) if task.keep_fisher])
        if not config.keep_checkpoints:
            for checkpoint in directory.path.glob("checkpoint-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def agree(trainer: LabelAnnealingTrainer, refusal: AnnealError | None) -> None:
    """Raise on every process what one of them has found. Collective."""
    refused = torch.tensor(int(refusal is not None), device=trainer.args.device)
    if trainer.args.world_size > 1:
        refused = trainer.accelerator.reduce(refused, reduction="sum")
    if refusal is not None:
        raise refusal
    if int(refused):
        raise AnnealError("the first process refused the result; see its message")
