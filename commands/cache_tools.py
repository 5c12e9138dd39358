"""`anneal cache inspect`, `verify`, `merge`, `export`, `convert`, `push`, `pull`: what needs a cache."""

from pathlib import Path
from typing import Annotated

import typer

from commands import completion
from commands.options import CacheArgument, EngineArgOption, JsonOption
from commands.parsing import parse_engine_args, require_owner, typed
from commands.terminal import show, show_report
from formats.errors import ConfigError
from formats.progress import ConsoleProgress


def cache_inspect(
    cache: CacheArgument,
    row: Annotated[
        int | None,
        typer.Option(show_default=False, help="Show the tokens of this row with their top alternatives."),
    ] = None,
    as_json: JsonOption = False,
    plot: Annotated[
        Path | None,
        typer.Option(show_default=False, help="Write the distributions as one picture (PNG, SVG, PDF)."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(show_default=False, help="Check that this model is the one the cache was built with."),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Read every row for the distributions instead of a sample.")
    ] = False,
) -> None:
    """Print what a cache holds, and with --row one row of it.

    Identity, sizes, head sizes, covered mass, entropy.
    """
    from formats.inspect.inspect_cache import inspect_cache

    show(inspect_cache(cache, row=row, as_json=as_json, plot=plot, model=model, full=full))


def cache_verify(
    cache: CacheArgument,
    model: Annotated[
        str | None,
        typer.Option(
            show_default=False, help="The teacher: also compute random rows again with the other engine."
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1, show_default=False, help="With --model: how many rows to compute again.  [default: 32]"
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            autocompletion=completion.words(*completion.ENGINES),
            show_default=False,
            help="With --model: vllm or transformers.  [default: the other one]",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, show_default=False, help="With --model: seed of the choice of rows.  [default: 0]"
        ),
    ] = None,
    engine_arg: EngineArgOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check every checksum of a cache.

    With --model, also compute rows of it again with the other engine and compare.
    """
    from cache_builder import verify_cache

    require_owner(
        "--model",
        model is not None,
        {"--rows": rows, "--engine": engine, "--seed": seed, "--engine-arg": engine_arg},
    )
    report = verify_cache(
        cache,
        model,
        engine=engine,
        engine_args=parse_engine_args(engine_arg),
        progress=ConsoleProgress(),
        **typed(rows=rows, seed=seed),
    )
    show_report(report, as_json=as_json)
    if not report.ok:
        raise typer.Exit(1)


def cache_merge(
    caches: Annotated[
        list[str],
        typer.Argument(
            metavar="CACHE", autocompletion=completion.caches, help="Caches of one teacher and settings."
        ),
    ],
    out: Annotated[str, typer.Option(help="Directory of the joined cache; new or empty.")],
) -> None:
    """Join caches that differ in nothing but their corpus.

    Repeated rows are kept once.
    """
    from cache_builder import merge_caches

    show(merge_caches(caches, out, progress=ConsoleProgress()).text())


def cache_export(
    cache: CacheArgument,
    parquet: Annotated[Path, typer.Option("--parquet", metavar="FILE", help="The .parquet file to write.")],
    layout: Annotated[
        str,
        typer.Option(
            autocompletion=completion.words(*completion.LAYOUTS),
            help="positions: one line per position, for DuckDB, Polars and friends; topk: one line per row with "
            "rectangles of token ids and logprobs, for other trainers.",
        ),
    ] = "positions",
    k: Annotated[
        int | None,
        typer.Option(
            "--k",
            min=1,
            show_default=False,
            help="With --layout topk: entries of every position.  [default: the most that a position keeps]",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, show_default=False, help="Export only N rows.")] = None,
) -> None:
    """Write the decoded values of a cache to one Parquet file."""
    from cache_builder import export_parquet, export_topk

    if layout not in ("positions", "topk"):
        raise ConfigError(f"--layout must be positions or topk, got {layout!r}")
    if layout == "topk":
        show(export_topk(cache, parquet, k=k, limit=limit, progress=ConsoleProgress()).text())
        return
    if k is not None:
        raise ConfigError(f"--k belongs to --layout topk, got it with --layout {layout}")
    show(export_parquet(cache, parquet, limit=limit, progress=ConsoleProgress()).text())


def cache_convert(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE",
            help="Parquet files of DistillKit, compressed; or JSON lines of responses of an OpenAI-style API.",
        ),
    ],
    parquet: Annotated[Path, typer.Option("--parquet", metavar="FILE", help="The .parquet file to write.")],
    compression: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", show_default=False, help="The compression_config.yaml of DistillKit's files."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            autocompletion=completion.models,
            show_default=False,
            help="The model whose tokens the responses are: a directory or name.",
        ),
    ] = None,
    k: Annotated[
        int | None,
        typer.Option(
            "--k",
            min=1,
            show_default=False,
            help="Entries of every position.  [default: the files' own, or 20]",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, show_default=False, help="Read only N lines.")] = None,
    skip_refused: Annotated[
        bool,
        typer.Option(
            "--skip-refused",
            help="Leave out responses that would be refused, as of requests that failed, and say how many and why.",
        ),
    ] = False,
) -> None:
    """Write teacher logprobs of others to one Parquet file.

    In the layout of `export --layout topk`. They are DistillKit's (--compression), or the logprobs of an API's
    responses (--tokenizer). Both are known at T = 1 only, and nobody recorded whose they are: the file says so.
    """
    from cache_builder import convert_distillkit, convert_responses

    if (compression is None) == (tokenizer is None):
        raise ConfigError(
            "convert takes --compression for DistillKit's files or --tokenizer for responses of an API, got "
            + ("neither" if tokenizer is None else "both")
        )
    if compression is not None:
        if skip_refused:
            raise ConfigError("--skip-refused is for responses of an API, got --compression; leave it out")
        show(
            convert_distillkit(
                files, compression, parquet, k=k, limit=limit, progress=ConsoleProgress()
            ).text()
        )
        return
    from cache_builder.rows.tokenizer_files import load_tokenizer
    from formats.identity.fingerprint import resolve_model

    loaded = load_tokenizer(resolve_model(str(tokenizer), what="--tokenizer"))
    show(
        convert_responses(
            files,
            loaded,
            parquet,
            k=k,
            limit=limit,
            skip_refused=skip_refused,
            progress=ConsoleProgress(),
        ).text()
    )


def cache_push(
    cache: CacheArgument,
    repository: Annotated[
        str, typer.Argument(metavar="REPOSITORY", help="Data set repository, such as me/my-cache.")
    ],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    revision: Annotated[str | None, typer.Option(show_default=False, help="Branch to commit to.")] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/MODEL",
            show_default=False,
            help="The teacher's name on the Hub, which the card links.  [default: the name that the cache was built "
            "with, if the Hub has it]",
        ),
    ] = None,
) -> None:
    """Check a cache and upload it to the Hugging Face Hub.

    The card opens the shards in the Hub's viewer; what others wrote in it stays.
    """
    from cache_builder import push_cache

    progress = ConsoleProgress()
    show(
        push_cache(
            cache,
            repository,
            private=not public,
            revision=revision,
            base_model=base_model,
            progress=progress,
        )
    )


def cache_pull(
    repository: Annotated[
        str, typer.Argument(metavar="REPOSITORY", help="Data set repository, such as me/my-cache.")
    ],
    out: Annotated[str, typer.Argument(metavar="DIRECTORY", help="Where to put the cache; new or empty.")],
    revision: Annotated[str | None, typer.Option(show_default=False, help="Branch, tag or commit.")] = None,
) -> None:
    """Download a cache from the Hugging Face Hub and check it."""
    from cache_builder import pull_cache

    show(str(pull_cache(repository, out, revision=revision, progress=ConsoleProgress())))
