"""`anneal cache build` and `anneal cache estimate`: what needs a teacher."""

from typing import Annotated, Any, cast

import typer

from commands import completion
from commands.options import (
    CorpusArgument,
    DtypeOption,
    EngineArgOption,
    EngineOption,
    HeadDtypeOption,
    JsonOption,
    LimitOption,
    MaxKOption,
    MaxLengthOption,
    ModelOption,
    OptionalCorpusArgument,
    PositionsOption,
    RevisionOption,
    SeedOption,
    SplitOption,
    TailDrawsOption,
    TemplateArgOption,
    TextColumnOption,
)
from commands.parsing import parse_engine_args, parse_shards, parse_template_args, require_owner, typed
from commands.terminal import show, show_report
from formats.capture_settings import CaptureSettings
from formats.errors import ConfigError
from formats.progress import ConsoleProgress


def cache_build(
    model: ModelOption,
    out: Annotated[str, typer.Option(help="Directory of the cache; made if missing.")],
    corpus: OptionalCorpusArgument = None,
    generate: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            show_default=False,
            help="Instead of a CORPUS: let the model write N rows, then capture them. A chat model writes what a user "
            "asks, and answers it.",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="With --generate: what rows begin with, in turn. A .txt file of one prompt per line, or a "
            "corpus, whose answers are left out.",
        ),
    ] = None,
    generate_from: Annotated[
        str | None,
        typer.Option(
            metavar="START",
            show_default=False,
            autocompletion=completion.words(*completion.STARTS),
            help="With --generate: what rows begin with. dialogue: a user's turn that the model writes too; "
            "empty-turn: a user's turn of nothing; bos: the start of a text.  [default: dialogue with a chat template, "
            "bos without]",
        ),
    ] = None,
    generate_temperature: Annotated[
        float | None,
        typer.Option(
            metavar="T",
            show_default=False,
            help="With --generate: temperature of the distribution that tokens are drawn from.  [default: 1]",
        ),
    ] = None,
    engine: EngineOption = "vllm",
    max_length: MaxLengthOption = None,
    min_prob: Annotated[
        float, typer.Option(help="Keep entries with at least this probability.")
    ] = CaptureSettings.min_prob,
    max_k: MaxKOption = CaptureSettings.max_k,
    tail_draws: TailDrawsOption = CaptureSettings.draw_rate,
    positions: PositionsOption = CaptureSettings.positions,
    limit: LimitOption = None,
    text_column: TextColumnOption = None,
    split: SplitOption = None,
    template_arg: TemplateArgOption = None,
    template_time: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            show_default=False,
            help="What a chat template that tells the time (strftime_now) says, such as 2026-11-25T08:00.  "
            "[default: now, or as the unfinished build in --out has it]",
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    head_dtype: HeadDtypeOption = "float32",
    seed: SeedOption = None,
    revision: RevisionOption = None,
    engine_arg: EngineArgOption = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print rows, tokens, estimated bytes and the identity; start no engine."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard the cache or build that --out holds.")
    ] = False,
    shards: Annotated[
        str | None,
        typer.Option(metavar="A:B", show_default=False, help="Capture only the shards A to B - 1."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            show_default=False,
            help="Capture with a pool of engines on this Ray cluster; `auto` finds one, `local` starts one.",
        ),
    ] = None,
    ray_workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=False,
            help="At most so many engines in the Ray pool.  [default: as many as there is room for]",
        ),
    ] = None,
) -> None:
    """Run the initial model over CORPUS once and store its logprobs.

    The same command continues a build that was stopped or killed.
    """
    from cache_builder import BuildConfig, GenerationConfig, build_cache, plan_build

    generation = None
    if generate is not None:
        generation = GenerationConfig(
            num_rows=generate,
            prompts=prompts,
            start=cast(Any, generate_from),
            **typed(temperature=generate_temperature, seed=seed),
        )
        seed = None
    else:
        of_generate = {
            "--prompts": prompts,
            "--generate-from": generate_from,
            "--generate-temperature": generate_temperature,
        }
        require_owner("--generate N", False, of_generate)
        if corpus is None:
            raise ConfigError("a build needs a CORPUS or --generate N, got neither; see --help")
    require_owner("--ray", ray is not None, {"--ray-workers": ray_workers})
    config = BuildConfig(
        corpus=corpus or "",
        generate=generation,
        model=model,
        out=out,
        engine=engine,
        revision=revision,
        max_length=max_length,
        min_prob=min_prob,
        max_k=max_k,
        draw_rate=tail_draws,
        positions=positions,
        limit=limit,
        text_column=text_column,
        split=split,
        chat_template_kwargs=parse_template_args(template_arg),
        template_time=template_time,
        dtype=dtype,
        head_dtype=head_dtype,
        seed=seed,
        engine_args=parse_engine_args(engine_arg),
        overwrite=overwrite,
        shards=parse_shards(shards),
    )
    progress = ConsoleProgress()
    if dry_run:
        if ray is not None:
            from cache_builder.build_on_ray import require_corpus

            require_corpus(config)
        show(plan_build(config, progress=progress).text())
    elif ray is not None:
        from cache_builder import build_cache_with_ray

        show(
            build_cache_with_ray(
                config, None if ray == "local" else ray, num_workers=ray_workers, progress=progress
            ).text()
        )
    else:
        show(build_cache(config, progress=progress).text())


def cache_estimate(
    corpus: CorpusArgument,
    model: ModelOption,
    rows: Annotated[int, typer.Option(min=1, help="How many random rows go through the engine.")] = 64,
    engine: EngineOption = "vllm",
    max_length: MaxLengthOption = None,
    max_k: MaxKOption = CaptureSettings.max_k,
    tail_draws: TailDrawsOption = CaptureSettings.draw_rate,
    positions: PositionsOption = CaptureSettings.positions,
    limit: LimitOption = None,
    text_column: TextColumnOption = None,
    split: SplitOption = None,
    template_arg: TemplateArgOption = None,
    dtype: DtypeOption = "auto",
    head_dtype: HeadDtypeOption = "float32",
    step_tokens: Annotated[
        int,
        typer.Option(min=1, help="Tokens with KL per training step, which the expected angle falls with."),
    ] = 65_536,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of rows.")] = 0,
    revision: RevisionOption = None,
    engine_arg: EngineArgOption = None,
    as_json: JsonOption = False,
) -> None:
    """Capture a sample of CORPUS and print what a cache would cost.

    And how exact its gradients would be, for several pairs of --min-prob and --tail-draws, and the cheapest whose
    gradient is within one degree.
    """
    from cache_builder import BuildConfig, estimate_cache

    config = BuildConfig(
        corpus=corpus,
        model=model,
        out="unused",
        engine=engine,
        revision=revision,
        max_length=max_length,
        max_k=max_k,
        draw_rate=tail_draws,
        positions=positions,
        limit=limit,
        text_column=text_column,
        split=split,
        chat_template_kwargs=parse_template_args(template_arg),
        dtype=dtype,
        head_dtype=head_dtype,
        engine_args=parse_engine_args(engine_arg),
    )
    report = estimate_cache(config, rows=rows, step_tokens=step_tokens, seed=seed, progress=ConsoleProgress())
    show_report(report, as_json=as_json)
