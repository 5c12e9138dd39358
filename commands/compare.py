"""`anneal compare` and `anneal select`: what models learnt and kept, and which to take."""

from pathlib import Path
from typing import Annotated, Any

import typer

from commands import completion
from commands.options import (
    BenchOption,
    ComparedArgument,
    DirectOption,
    EvalDtypeOption,
    EvalLimitOption,
    InitialOption,
    JsonOption,
    NoGroupOption,
    PageOption,
    PlotOption,
    SourceOption,
    TargetOption,
    WorkOption,
)
from commands.parsing import require_owner
from commands.terminal import named, note, show_report
from formats.errors import ConfigError
from formats.progress import ConsoleProgress


def compare_command(
    models: ComparedArgument,
    source: SourceOption,
    target: TargetOption,
    initial: InitialOption = None,
    direct: DirectOption = None,
    no_group: NoGroupOption = False,
    plot: PlotOption = None,
    page: PageOption = None,
    as_json: JsonOption = False,
    work: WorkOption = None,
    bench: BenchOption = None,
    dtype: EvalDtypeOption = "float32",
    limit: EvalLimitOption = None,
) -> None:
    """Print what models learnt and kept, on texts and on tasks.

    A word of --source and --target is a cache (perplexity and KL are evaluated, once) or a task of each model's
    bench.json. docs/compare.md says how to read the columns.
    """
    from trainer.comparison.page import require_writable

    require_writable(plot, page)
    comparison = _compared(
        models,
        source,
        target,
        initial,
        direct=direct,
        group=not no_group,
        work=work,
        bench=bench,
        dtype=dtype,
        limit=limit,
    )
    show_report(comparison, as_json=as_json)
    draw(comparison, plot, page)


def _compared(
    models: list[str], source: list[str], target: list[str], initial: str | None, **options: Any
) -> Any:
    """`trainer.compare` of what was typed.

    Raises:
        ConfigError: an option of texts where there are tasks alone, or of tasks where there are texts alone.
    """
    from trainer import compare
    from trainer.comparison.metric import is_task

    sources, targets = named(source, "--source", "NAME=CACHE"), named(target, "--target", "NAME=CACHE")
    tasks = [is_task(word) for word in (*sources.values(), *targets.values())]
    dtype = None if options["dtype"] == "float32" else options["dtype"]
    of_texts = {"--work": options["work"], "--limit": options["limit"], "--dtype": dtype}
    require_owner("a cache among --source and --target", not all(tasks), of_texts)
    require_owner("a task among --source and --target", any(tasks), {"--bench": options["bench"]})
    return compare(
        named(models, "models", "LABEL=DIR"),
        source=sources,
        target=targets,
        initial=named([initial], "models", "LABEL=DIR") if initial is not None else None,
        progress=ConsoleProgress(),
        **options,
    )


def draw(comparison: Any, plot: Path | None, page: Path | None) -> None:
    """Write the picture and the page that were asked for, and say where they are."""
    if plot is not None:
        note(f"picture in {comparison.plot(plot)}")
    if page is not None:
        note(f"page in {comparison.page(page)}")


def select_command(
    models: ComparedArgument,
    source: SourceOption,
    target: TargetOption,
    initial: InitialOption = None,
    direct: DirectOption = None,
    rule: Annotated[
        str,
        typer.Option(
            autocompletion=completion.words(*completion.RULES),
            help="The rule that recommends: keep-gain:SHARE (of direct's gain), budget:PERCENT% (lost), nearest:SHARE "
            "(by KL to the initial model), or paper.",
        ),
    ] = "keep-gain:0.9",
    min_gain: Annotated[
        float | None,
        typer.Option(
            show_default=False,
            help="paper: improvement asked of every target, in nats or the metric's unit; 0 for any.  "
            "[default: its standard error]",
        ),
    ] = None,
    no_group: NoGroupOption = False,
    as_json: JsonOption = False,
    work: WorkOption = None,
    bench: BenchOption = None,
    dtype: EvalDtypeOption = "float32",
    limit: EvalLimitOption = None,
) -> None:
    """Print which of several models to take, by each rule.

    And what it keeps of direct fine-tuning's gain, and what it loses. docs/select.md has the rules.
    """
    from trainer import select
    from trainer.selection.rules import NEAREST, OF_DIRECT, Rule, check_min_gain

    asked = Rule.parse(rule)
    check_min_gain(min_gain)
    if initial is None:
        raise ConfigError("a selection needs the initial model, got none; name it with --initial MODEL")
    comparison = _compared(
        models,
        source,
        target,
        initial,
        direct=direct,
        direct_for=asked.text() if asked.kind in OF_DIRECT else "",
        distance_for=asked.text() if asked.kind == NEAREST else "",
        group=not no_group,
        work=work,
        bench=bench,
        dtype=dtype,
        limit=limit,
    )
    selection = select(comparison, rule, min_gain=min_gain)
    show_report(selection, as_json=as_json)
