"""`anneal restore`: is it gone, or only hidden?"""

from pathlib import Path
from typing import Annotated

import typer

from commands import completion
from commands.options import EvalLimitOption, JsonOption, build_option, caches_option, set_option
from commands.terminal import named, show_report
from formats.progress import ConsoleProgress


def restore_command(
    tuned: Annotated[
        list[str],
        typer.Argument(
            metavar="TUNED",
            help="Tuned models, or checkpoints of a run; LABEL=DIR gives one a label of its own.",
        ),
    ],
    initial: Annotated[str, typer.Option(help="The model that they were tuned from: directory or hub name.")],
    text: Annotated[
        str, typer.Option(metavar="TEXT", help="General text, like that of pretraining: a corpus or a cache.")
    ],
    source: Annotated[
        list[str],
        caches_option("Held-out text of what the initial model knew, other than TEXT. May be repeated."),
    ],
    out: Annotated[str, typer.Option(help="Directory of the result; the same one continues it.")],
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=False,
            help="Tokens of the text to train on.  [default: those of one epoch of the tuning text]",
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option("--lr", show_default=False, help="Learning rate.  [default: 1.5 times that of tuning]"),
    ] = None,
    rank: Annotated[
        str,
        typer.Option(
            metavar="low-ppl|random",
            autocompletion=completion.words(*completion.RANKS),
            help="Which rows: those the initial model finds easiest.",
        ),
    ] = "low-ppl",
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="CACHE",
            autocompletion=completion.caches,
            show_default=False,
            help="The text that the models were tuned on, for exact memorisation.  [default: what their record names]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the runs, and of --rank random.")] = 0,
    overrides: Annotated[
        list[str] | None,
        set_option(
            "An argument of the restoring runs, such as training.per_device_train_batch_size=8.",
            "training.KEY=VALUE",
        ),
    ] = None,
    build: Annotated[
        list[str] | None, build_option("A setting of the cache that is built of TEXT, as in chain.")
    ] = None,
    limit: EvalLimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train tuned models shortly on general text: what comes back?

    The initial model is trained beside them. What comes back was only hidden.
    """
    from commands.cache_process import build_in_process, look_at_corpus, typed_settings
    from trainer.restore.config import RestoreConfig
    from trainer.restore.restore import run_restore

    settings = typed_settings("restore", overrides, build)
    config = RestoreConfig(
        tuned=named(tuned, "models", "LABEL=DIR"),
        initial=initial,
        text=text,
        source=named(source, "--source", "NAME=CACHE"),
        out=str(Path(out)),
        tokens=tokens,
        learning_rate=lr,
        rank=rank,
        memory=memory,
        seed=seed,
        training=settings["training"],
        build=settings["build"],
    )
    report = run_restore(
        config, build=build_in_process, look=look_at_corpus, limit=limit, progress=ConsoleProgress()
    )
    show_report(report, as_json=as_json)
    if report.failed:
        raise typer.Exit(1)
