"""`anneal merge`: averages of finished models."""

from typing import Annotated

import typer

from commands import completion
from commands.parsing import parse_numbers
from commands.terminal import show
from formats.progress import ConsoleProgress


def merge_command(
    tuned: Annotated[
        list[str],
        typer.Argument(
            metavar="TUNED",
            autocompletion=completion.models,
            help="Models fine-tuned from the initial one; wise-ft takes one.",
        ),
    ],
    initial: Annotated[
        str,
        typer.Option(
            autocompletion=completion.models, help="The initial model: directory or Hugging Face name."
        ),
    ],
    out: Annotated[str, typer.Option(help="Directory of the merged model; new or empty.")],
    method: Annotated[
        str,
        typer.Option(
            autocompletion=completion.words(*completion.MERGES),
            help="wise-ft, task-arithmetic, ties, soup or fisher.",
        ),
    ],
    alpha: Annotated[
        float | None,
        typer.Option(
            show_default=False, help="wise-ft: weight of the tuned model, 0 to 1.5.  [default: 0.5]"
        ),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            show_default=False, help="task-arithmetic, ties: factor on the task vectors.  [default: 1.0]"
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(show_default=False, help="ties: share of the entries that are kept.  [default: 0.2]"),
    ] = None,
    trim: Annotated[
        str | None,
        typer.Option(
            metavar="model|tensor",
            autocompletion=completion.words(*completion.TRIMS),
            show_default=False,
            help="ties: keep that share of each model's task vector as a whole, or of every tensor.  [default: model]",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W1,W2,...",
            show_default=False,
            help="task-arithmetic, ties: a factor on each model's task vector; soup, fisher: its share.  "
            "[default: 1 each]",
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="CACHE",
            show_default=False,
            help="soup: add models one by one, the best on this held-out text first, where it gets no worse.",
        ),
    ] = None,
    fisher: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CACHE|DIR",
            show_default=False,
            help="fisher: text that the model knows, or F that a run kept (ewc.keep_fisher); once per model, in order.",
        ),
    ] = None,
    fisher_rows: Annotated[
        int | None,
        typer.Option(show_default=False, help="fisher: rows of each text that are read.  [default: 256]"),
    ] = None,
) -> None:
    """Merge tuned models with the initial one.

    By WiSE-FT, task arithmetic, TIES, a soup or Fisher merging.
    """
    from trainer import MergeConfig, merge

    config = MergeConfig(
        tuned=tuned,
        initial=initial,
        out=out,
        method=method,
        alpha=alpha,
        scale=scale,
        density=density,
        trim=trim,
        weights=None if weights is None else parse_numbers(weights, "--weights"),
        by=by,
        fisher=fisher or None,
        fisher_rows=fisher_rows,
    )
    show(merge(config, ConsoleProgress()).line())
