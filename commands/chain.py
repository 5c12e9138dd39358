"""`anneal chain`: tasks one after another, and what each step cost."""

from pathlib import Path
from typing import Annotated, Any

import typer

from commands import completion
from commands.options import (
    EvalLimitOption,
    JsonOption,
    PlotOption,
    RunSettingsOption,
    build_option,
    caches_option,
)
from commands.parsing import typed
from commands.terminal import named, note, show_report
from formats.errors import ConfigError
from formats.picture_file import require_plottable
from formats.progress import ConsoleProgress


def chain_command(
    place: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CHAIN.yaml|MODEL",
            show_default=False,
            help="A YAML file with the whole chain; or, with --models, finished models, the oldest first.",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(show_default=False, help="Directory of the chain; the same one continues it."),
    ] = None,
    models: Annotated[
        bool,
        typer.Option(
            "--models", help="Train nothing: report what each of the given models lost. LABEL=DIR names one."
        ),
    ] = False,
    heldout: Annotated[
        list[str] | None,
        caches_option("With --models: held-out text; only its tokens are read. May be repeated."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "--initial",
            autocompletion=completion.models,
            show_default=False,
            help="The initial model: directory or hub name.",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=TRAIN,HELDOUT",
            show_default=False,
            help="A task: caches, or corpora of which they are built. May be repeated; the order counts.",
        ),
    ] = None,
    general: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=TEXT",
            show_default=False,
            help="Held-out text that no task is about. May be repeated.",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            show_default=False,
            help="How each stage holds on, such as kl_coef=1 or sfa.beta=0.5; nothing is direct fine-tuning.",
        ),
    ] = None,
    anchor: Annotated[
        str | None,
        typer.Option(
            metavar="previous|initial",
            autocompletion=completion.words(*completion.ANCHORS),
            show_default=False,
            help="The model that KL holds to; previous builds a cache per stage.  [default: previous]",
        ),
    ] = None,
    replay: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            show_default=False,
            help="Share of the mixture that is text of earlier tasks, such as 0.1.  [default: 0]",
        ),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="direct|multitask|never-seen",
            autocompletion=completion.words(*completion.CONTROLS),
            show_default=False,
            help="Controls: without method and replay; all tasks at once; all tasks but one. May be repeated.",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="ce|accuracy",
            autocompletion=completion.words(*completion.METRICS),
            show_default=False,
            help="What is summed up.  [default: ce]",
        ),
    ] = None,
    overrides: RunSettingsOption = None,
    build: Annotated[
        list[str] | None,
        build_option(
            "A setting of the caches that are built, such as engine=transformers or max_length=512."
        ),
    ] = None,
    limit: EvalLimitOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the runs, and stop.")
    ] = False,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Learn tasks one after another and report what each stage forgot.

    With --models the report alone, of finished models.
    """
    if plot is not None:
        require_plottable(plot)
    words = place or []
    if models:
        given = [task, general, method, anchor, replay, compare, overrides, build]
        if any(value is not None and value != [] for value in given) or dry_run:
            raise ConfigError(
                "--models trains nothing and takes --heldout, --initial, --out, --metric and --limit alone"
            )
        report: Any = _releases(words, heldout or [], out, model, metric, limit)
        columns, rows = report.columns, report.rows
    else:
        if heldout:
            raise ConfigError(
                "--heldout is for --models; the held-out text of a task is --task NAME=TRAIN,HELDOUT"
            )
        if len(words) > 1:
            raise ConfigError(
                f"a chain is one file, got {len(words)} words; for finished models add --models"
            )
        from trainer.chain.config import chain_from_options

        asked = chain_from_options(
            words[0] if words else None,
            tasks=task or [],
            general=general or [],
            method=method or [],
            overrides=overrides or [],
            build=build or [],
            out=out,
            model=model,
            anchor=anchor,
            replay=replay,
            compare=compare,
            metric=metric,
        )
        found = _chain(asked, dry_run, limit, as_json)
        if found is None:
            return
        report, columns, rows = found, found.columns, found.shown
    show_report(report, as_json=as_json)
    if plot is not None and rows:
        from trainer.chain.heat_map import draw_matrix

        note(f"picture in {draw_matrix(rows, columns, plot, metric=report.metric)}")
    if getattr(report, "failed", None):
        raise typer.Exit(1)


def _releases(
    words: list[str],
    heldout: list[str],
    out: str | None,
    initial: str | None,
    metric: str | None,
    limit: int | None,
) -> Any:
    from trainer.chain.config import METRICS
    from trainer.chain.releases import read_releases
    from trainer.checks import check_one_of, check_path

    check_path("out", out, "a directory for matrix.json and remembered evaluations (--out)")
    if metric is not None:
        check_one_of("--metric", metric, METRICS)
    return read_releases(
        named(words, "models", "LABEL=DIR"),
        named(heldout, "--heldout", "NAME=CACHE"),
        Path(str(out)),
        initial=initial,
        limit=limit,
        progress=ConsoleProgress(),
        **typed(metric=metric),
    )


def _chain(asked: Any, dry_run: bool, limit: int | None, as_json: bool) -> Any:
    from commands.cache_process import build_in_process, check_options, look_at_corpus
    from trainer.chain.chain import plan_chain, run_chain
    from trainer.chain.releases import read_finished

    if asked.build:
        check_options(asked.build)
    if dry_run:
        show_report(plan_chain(asked, build_in_process, look_at_corpus), as_json=as_json)
        return None
    handed: dict[str, Any] = {"build": build_in_process, "look": look_at_corpus}
    if asked.finished:
        return read_finished(asked, **handed, limit=limit, progress=ConsoleProgress())
    return run_chain(asked, **handed, limit=limit, progress=ConsoleProgress())
