"""`anneal sweep`: a grid of runs from one cache."""

from pathlib import Path
from typing import Annotated

import typer

from commands import completion
from commands.compare import draw
from commands.options import JsonOption, PageOption, PlotOption, RetainOption, RunSettingsOption
from commands.parsing import require_owner
from commands.terminal import named, show_report
from formats.progress import ConsoleProgress


def sweep_command(
    place: Annotated[
        str | None,
        typer.Argument(
            metavar="CACHE|SWEEP.yaml",
            autocompletion=completion.caches,
            show_default=False,
            help="The cache of the fine-tuning corpus, or a YAML file with the whole sweep.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            autocompletion=completion.models,
            show_default=False,
            help="The initial model: the one that built the cache.",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(show_default=False, help="Directory of the sweep; the same one continues it."),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=CACHE|TASK",
            autocompletion=completion.caches,
            show_default=False,
            help="What the initial model knew: held-out text, or a task.",
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=CACHE|TASK",
            autocompletion=completion.caches,
            show_default=False,
            help="What the runs learn, in the same way.",
        ),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2",
            show_default=False,
            help="Values of a setting, such as kl_coef=0.5,1,2; several are crossed with each other.",
        ),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2",
            show_default=False,
            help="Runs without KL, such as l2.coef=0.03,0.1, or 'l2.coef=0.1 kl_coef=1' with it. May be repeated.",
        ),
    ] = None,
    every: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2",
            show_default=False,
            help="Values crossed with every run, direct fine-tuning too, such as training.learning_rate=1e-4,3e-4.",
        ),
    ] = None,
    merge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD:V1,V2",
            show_default=False,
            help="Merges of finished runs, such as wise-ft:0.25,0.5, ties:density=0.1,0.2:scale=1 or soup:by=CACHE.",
        ),
    ] = None,
    merge_of: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            show_default=False,
            help="What --merge merges: direct, all, or names.  [default: direct]",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            show_default=False, help="How many seeds, counted from training.seed; or [3,5].  [default: 1]"
        ),
    ] = None,
    keep_gain: Annotated[
        float | None,
        typer.Option(
            show_default=False,
            help="Share of direct fine-tuning's gain that the recommended run must keep.  [default: 0.9]",
        ),
    ] = None,
    search: Annotated[
        bool | None,
        typer.Option(
            "--search",
            show_default=False,
            help="Find the largest kl_coef that keeps --keep-gain, by bisection.",
        ),
    ] = None,
    eval_dtype: Annotated[
        str | None,
        typer.Option(
            autocompletion=completion.words(*completion.DTYPES),
            show_default=False,
            help="float32, bfloat16 or float16: the weights while evaluating.  [default: float32]",
        ),
    ] = None,
    search_runs: Annotated[
        int | None, typer.Option(show_default=False, help="Most values that --search tries.  [default: 8]")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(show_default=False, help="YAML file with settings of `anneal train`.")
    ] = None,
    retain: RetainOption = None,
    overrides: RunSettingsOption = None,
    bench: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            show_default=False,
            help="Setting of anneal bench for tasks among --source and --target, such as limit=500.",
        ),
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=False,
            help="Runs at a time, each with a GPU, or a share of the CPU's threads.  [default: 1; with --ray all "
            "there is room for]",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            show_default=False,
            help="Train on this Ray cluster, a run per GPU; `auto` finds one, `local` starts one.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the runs and their tokens, and stop.")
    ] = False,
    plot: PlotOption = None,
    page: PageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train every combination of settings, merge, and compare.

    All from one cache; the same command continues.
    """
    from trainer.comparison.page import require_writable
    from trainer.sweep.config import sweep_from_options
    from trainer.sweep.pools import LocalPool
    from trainer.sweep.sweep import plan_sweep, run_sweep

    asked = sweep_from_options(
        place,
        base_file=config,
        model=model,
        overrides=overrides or [],
        retain=retain or [],
        grid=grid or [],
        also=also or [],
        every=every or [],
        merge=merge or [],
        merge_of=merge_of or [],
        seeds=seeds,
        out=out,
        source=named(source or [], "--source", "NAME=CACHE"),
        target=named(target or [], "--target", "NAME=CACHE"),
        bench=bench or [],
        keep_gain=keep_gain,
        search=search,
        search_runs=search_runs,
        eval_dtype=eval_dtype,
    )
    require_owner("--merge", bool(merge), {"--merge-of": merge_of})
    require_writable(plot, page)
    if dry_run:
        show_report(plan_sweep(asked), as_json=as_json)
        return
    if ray is not None:
        from trainer.sweep.on_ray import RayPool

        with RayPool(None if ray == "local" else ray, parallel) as cluster:
            report = run_sweep(asked, pool=cluster, progress=ConsoleProgress())
    else:
        report = run_sweep(asked, pool=LocalPool(parallel or 1), progress=ConsoleProgress())
    show_report(report, as_json=as_json)
    if report.comparison is not None:
        draw(report.comparison, plot, page)
    if report.failed:
        raise typer.Exit(1)
