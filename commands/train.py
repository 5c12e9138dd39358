"""`anneal train`: from a cache and a model to a tuned model."""

import os
from pathlib import Path
from typing import Annotated

import typer

from commands import completion
from commands.options import RetainOption, set_option
from commands.terminal import show


def train_command(
    cache: Annotated[
        str | None,
        typer.Argument(
            autocompletion=completion.caches,
            metavar="CACHE",
            help="The cache of the fine-tuning corpus.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            autocompletion=completion.models,
            show_default=False,
            help="The model to start from: it or an ancestor built the cache.",
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(show_default=False, help="Directory for the tuned model.")
    ] = None,
    kl_coef: Annotated[
        float | None,
        typer.Option(
            show_default=False,
            help="Weight of the KL term, the paper's lambda; 0 is direct fine-tuning.  [default: 1.0]",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(show_default=False, help="Softmax temperature of the KL term.  [default: 1.0]"),
    ] = None,
    kl_direction: Annotated[
        str | None,
        typer.Option(
            autocompletion=completion.words(*completion.KL_DIRECTIONS),
            show_default=False,
            help="forward: KL(initial || model); reverse.  [default: forward]",
        ),
    ] = None,
    retain: RetainOption = None,
    packing: Annotated[
        bool | None, typer.Option("--packing", show_default=False, help="Put several rows into one sequence.")
    ] = None,
    allow_different_student: Annotated[
        bool | None,
        typer.Option(
            "--allow-different-student",
            show_default=False,
            help="Distil into a model that is not the teacher.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(show_default=False, help="YAML file with any of these settings and `training:`."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        set_option("Any setting, such as training.learning_rate=1e-5. May be repeated; wins over the file."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything, print the steps and the memory of one, and stop."),
    ] = False,
) -> None:
    """Fine-tune one model with label annealing from CACHE."""
    from trainer import load_config, plan_training, train
    from trainer.evaluation.evaluate import format_evaluation

    flags = {
        "cache": cache,
        "model": model,
        "out": out,
        "kl_coef": kl_coef,
        "temperature": temperature,
        "kl_direction": kl_direction,
        "packing": packing,
        "allow_different_student": allow_different_student,
    }
    asked = load_config(config, flags=flags, overrides=overrides or [], retain=retain or [])
    if dry_run:
        plan = plan_training(asked)
        if int(os.environ.get("RANK", "0")) == 0:
            show(plan.text())
        return
    report = train(asked)
    if int(os.environ.get("RANK", "0")) == 0:
        show(report.line())
        if report.evaluation:
            show(format_evaluation(report.evaluation))
    if report.interrupted_by:
        raise typer.Exit({"SIGINT": 130}.get(report.interrupted_by, 143))
