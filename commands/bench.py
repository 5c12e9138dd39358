"""`anneal bench`: models on tasks."""

from typing import Annotated

import typer

from commands import completion
from commands.options import EngineArgOption, JsonOption
from commands.parsing import parse_engine_args
from commands.terminal import named, show_report
from formats.progress import ConsoleProgress


def bench_command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            autocompletion=completion.models,
            help="Models to measure; LABEL=DIR gives one a label of its own.",
        ),
    ],
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="A,B:SHOTS,...",
            show_default=False,
            help="Tasks, groups or tags of lm-evaluation-harness or of --task-dir.",
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            autocompletion=completion.suites,
            show_default=False,
            help="The tasks that a paper reports; docs/bench.md lists them.",
        ),
    ] = None,
    task_dir: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR",
            show_default=False,
            help="Folder with task files (YAML) of your own. May be repeated.",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(show_default=False, help="Examples in the prompt.  [default: what the task says]"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, show_default=False, help="Run N items of each task, drawn at random with --seed."
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            autocompletion=completion.words(*completion.BACKENDS),
            help="vllm, transformers, or auto: vllm on a GPU that the models fit on, else transformers.",
        ),
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            autocompletion=completion.words("auto", *completion.DTYPES),
            help="float32, bfloat16, float16, or auto: bfloat16 on a GPU, float32 on a CPU.",
        ),
    ] = "auto",
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, show_default=False, help="Prompts per forward pass.  [default: the backend's choice]"
        ),
    ] = None,
    apply_chat_template: Annotated[
        str,
        typer.Option(help="Put prompts into the models' chat template: yes, no, or auto: if all have one."),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of --limit, of examples and of sampled answers.")] = 0,
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code", help="Allow tasks that run the code which the model writes, as HumanEval."
        ),
    ] = False,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            show_default=False,
            help="Put results into DIR/LABEL.  [default: the models' own directories]",
        ),
    ] = None,
    engine_arg: EngineArgOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score models on tasks through lm-evaluation-harness.

    Results stay with each model as bench.json.
    """
    from trainer import BenchSettings, bench_models

    settings = BenchSettings(
        tasks=tuple(word.strip() for word in tasks.split(",")) if tasks else (),
        suite=suite,
        task_dirs=tuple(task_dir or ()),
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        dtype=dtype,
        backend=backend,
        apply_chat_template=apply_chat_template,
        seed=seed,
        allow_code=allow_code,
        engine_args=parse_engine_args(engine_arg),
        out=out,
    )
    report = bench_models(named(models, "models", "LABEL=DIR"), settings, ConsoleProgress())
    show_report(report, as_json=as_json)
