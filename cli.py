"""The `anneal` command line: parses, calls one function, prints.

Results go to stdout, progress and messages to stderr. Bad input is one line on stderr and exit code 1 (2 for
wrong usage), without a traceback unless `--debug` is given. Heavy packages are imported inside the commands,
so that `--help` and `cache inspect` start fast on a machine without torch or vLLM.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

PACKAGES = ("formats", "cache_builder", "trainer", "onboarding", "commands")


def stranger() -> str | None:
    """What is wrong if one of our packages is not the one that Python would import under its name, else None.

    The names are plain words, and others use them too (`trainer` is also a text-to-speech library): in an
    environment shared with such a package, the one that comes first on Python's path wins without a word.
    """
    home = Path(__file__).resolve().parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        places = list(spec.submodule_search_locations or [spec.origin or ""]) if spec else []
        if [Path(place).resolve() for place in places if place] != [home / name]:
            found = ", ".join(map(str, places)) or "no package of that name"
            return (
                f"the package {name} must be {home / name}, got {found}; install anneal into an environment of its "
                "own (uv tool install, pipx, or a new venv) and start it outside directories that hold such a package"
            )
    return None


if _wrong := stranger():  # before anything of them is imported
    sys.exit(f"error: {_wrong}")

from commands import completion  # noqa: E402
from commands.chain import chain_command  # noqa: E402
from commands.probe import probe_app  # noqa: E402
from commands.restore import restore_command  # noqa: E402
from commands.terminal import (  # noqa: E402
    EvalDtypeOption,
    JsonOption,
    console_progress,
    named,
    note,
    quiet_imports,
    show,
    show_json,
)
from formats.capture_settings import MAX_RATE, CaptureSettings  # noqa: E402
from formats.errors import AnnealError, ConfigError  # noqa: E402
from formats.install import how_to_install  # noqa: E402
from onboarding import commands as onboarding  # noqa: E402


class InterruptibleGroup(TyperGroup):
    """Commands that a signal ends say how far they came; typer alone exits with 130 and not a word."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            note(str(error) or "interrupted")
            sys.exit(getattr(error, "exit_code", 130))


app = typer.Typer(
    cls=InterruptibleGroup,
    help="Fine-tune open-weight language models without forgetting.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
cache_app = typer.Typer(
    help="Build, inspect, check and move caches of teacher logprobs.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(cache_app, name="cache")
app.command("doctor")(onboarding.doctor)
app.command("init")(onboarding.init)

CacheArgument = Annotated[
    str,
    typer.Argument(
        metavar="CACHE", autocompletion=completion.caches, help="Directory (or fsspec URL) of a cache."
    ),
]
CorpusArgument = Annotated[
    str,
    typer.Argument(
        metavar="CORPUS",
        help="A .jsonl, .json, .csv, .parquet, .arrow or .txt file, a directory or glob of them, or a "
        "Hugging Face data set name.",
    ),
]
OptionalCorpusArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[CORPUS]",
        show_default=False,
        help="A .jsonl, .json, .csv, .parquet, .arrow or .txt file, a directory or glob of them, or a "
        "Hugging Face data set name; none with --generate.",
    ),
]
ModelOption = Annotated[
    str,
    typer.Option("--model", autocompletion=completion.models, help="Model directory or Hugging Face name."),
]
EngineOption = Annotated[
    str,
    typer.Option(
        autocompletion=completion.words(*completion.ENGINES),
        help="vllm, or transformers where vLLM cannot be installed.",
    ),
]
MaxLengthOption = Annotated[
    int | None,
    typer.Option(
        min=2,
        show_default=False,
        help="Longest row in tokens.  [default: 2048, or the model's context where that is shorter]",
    ),
]
MaxKOption = Annotated[int, typer.Option(min=1, help="Keep at most so many entries per position.")]
TailDrawsOption = Annotated[
    int,
    typer.Option(
        metavar="RATE",
        min=0,
        max=MAX_RATE,
        help="Tail tokens drawn per position: rate times the sum of p^(3/4) over the tail; they make the KL "
        "gradient unbiased; 0 draws none.",
    ),
]
LimitOption = Annotated[
    int | None, typer.Option(min=1, show_default=False, help="Read only N records of the corpus.")
]
TextColumnOption = Annotated[
    str | None, typer.Option(show_default=False, help="Train on this column as plain text.")
]
TemplateArgOption = Annotated[
    list[str] | None,
    typer.Option(
        "--template-arg",
        metavar="KEY=VALUE",
        show_default=False,
        help="Variable of the chat template for every conversation, such as enable_thinking=false. May be repeated.",
    ),
]
SplitOption = Annotated[
    str | None, typer.Option(show_default=False, help="Split of a data set.  [default: train]")
]
RevisionOption = Annotated[
    str | None, typer.Option(show_default=False, help="Revision of a Hugging Face model.")
]
DtypeOption = Annotated[
    str,
    typer.Option(
        autocompletion=completion.words("auto", *completion.DTYPES),
        help="auto, float32, bfloat16 or float16: the engine's weights.",
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        show_default=False,
        help="With --limit: draw the records at random with this seed. With --generate: seed of the rows.  [default "
        "there: 0]",
    ),
]
EvalLimitOption = Annotated[
    int | None, typer.Option(min=1, show_default=False, help="Read only N rows of each cache.")
]
ComparedArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        autocompletion=completion.models,
        help="Models to compare; LABEL=DIR gives one a label of its own.",
    ),
]
SourceOption = Annotated[
    list[str],
    typer.Option(
        metavar="CACHE|TASK",
        autocompletion=completion.caches,
        help="What the initial model knew: a cache of held-out text, or a task of bench.json (TASK or TASK:METRIC); "
        "NAME=... gives it a name of its own. May be repeated.",
    ),
]
TargetOption = Annotated[
    list[str],
    typer.Option(
        metavar="CACHE|TASK",
        autocompletion=completion.caches,
        help="What the models learn, in the same way. May be repeated.",
    ),
]
InitialOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        autocompletion=completion.models,
        show_default=False,
        help="The initial model: its line comes first, and differences are to it.",
    ),
]
DirectOption = Annotated[
    str | None,
    typer.Option(
        metavar="LABEL",
        show_default=False,
        help="Direct fine-tuning, which shares are of.  [default: the one model whose record says so]",
    ),
]
NoGroupOption = Annotated[
    bool, typer.Option("--no-group", help="Show runs that differ in their seed alone as a line each.")
]
WorkOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        show_default=False,
        help="Remember evaluations here.  [default: the models' own directories]",
    ),
]
BenchOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        show_default=False,
        help="Where anneal bench --out put the results.  [default: the models' own directories]",
    ),
]
EngineArgOption = Annotated[
    list[str] | None,
    typer.Option(
        "--engine-arg",
        metavar="KEY=VALUE",
        show_default=False,
        help="Setting passed to the engine, such as tensor_parallel_size=2. May be repeated.",
    ),
]


def parse_template_args(pairs: list[str] | None) -> dict[str, Any]:
    """`KEY=VALUE` pairs for the chat template; names as they are written.

    Raises:
        ConfigError: a pair has no `=` or no key.
    """
    return parse_pairs(pairs, "--template-arg", "enable_thinking=false")


def parse_engine_args(pairs: list[str] | None) -> dict[str, Any]:
    """`KEY=VALUE` pairs for an engine; a hyphen in a name is an underscore.

    Raises:
        ConfigError: a pair has no `=` or no key.
    """
    parsed = parse_pairs(pairs, "--engine-arg", "tensor_parallel_size=2")
    return {key.replace("-", "_"): value for key, value in parsed.items()}


def parse_pairs(pairs: list[str] | None, option: str, example: str) -> dict[str, Any]:
    """`KEY=VALUE` pairs as a mapping; values are JSON where they parse as JSON, else text.

    Raises:
        ConfigError: a pair has no `=` or no key.
    """
    parsed: dict[str, Any] = {}
    for pair in pairs or []:
        key, separator, value = pair.partition("=")
        key = key.strip()
        if not separator or not key:
            raise ConfigError(f"{option} takes KEY=VALUE, got {pair!r}; for example {example}")
        try:
            parsed[key] = json.loads(value)
        except json.JSONDecodeError:
            parsed[key] = {"True": True, "False": False, "None": None}.get(value, value)
    return parsed


def parse_numbers(text: str | None, option: str) -> list[float] | None:
    """`0.75,0.25` as numbers.

    Raises:
        ConfigError: a part is not a number.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{option} takes numbers with commas, got {text!r}; for example 0.75,0.25"
        ) from None


def parse_shards(text: str | None) -> tuple[int, int] | None:
    """`A:B` as a pair of numbers.

    Raises:
        ConfigError: the text is not two whole numbers with a colon between them.
    """
    if text is None:
        return None
    first, separator, last = text.partition(":")
    if not (separator and first.isdecimal() and last.isdecimal()):
        raise ConfigError(f"--shards takes A:B, got {text!r}; 0:10 captures the shards 0 to 9")
    return int(first), int(last)


def print_version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        from formats.install import installed_version

        show(f"anneal {installed_version()}")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and the engines' own logs.")
    ] = False,
) -> None:
    """Settings that belong to no single command."""
    if debug:
        os.environ["ANNEAL_DEBUG"] = "1"


@cache_app.command("build")
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
            help="Instead of a CORPUS: let the model write N rows, then capture them. From the chat template's empty "
            "user turn, or from BOS without a template.",
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
    positions: Annotated[
        str,
        typer.Option(
            autocompletion=completion.words(*completion.POSITIONS),
            help="loss: positions whose next token carries loss; all: every position.",
        ),
    ] = CaptureSettings.positions,
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
        int | None, typer.Option(min=1, show_default=False, help="Engines in the Ray pool.")
    ] = None,
) -> None:
    """Run the initial model over CORPUS once and store its compressed top-k logprobs."""
    from cache_builder import BuildConfig, GenerationConfig, build_cache, plan_build

    generation = None
    if generate is not None:
        temperature = 1.0 if generate_temperature is None else generate_temperature
        generation = GenerationConfig(
            num_rows=generate, prompts=prompts, temperature=temperature, seed=seed or 0
        )
        seed = None
    else:
        for option, value in (("--prompts", prompts), ("--generate-temperature", generate_temperature)):
            if value is not None:
                raise ConfigError(
                    f"{option} needs --generate N, got {value} without it; add it or leave it out"
                )
        if corpus is None:
            raise ConfigError("a build needs a CORPUS or --generate N, got neither; see --help")
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
        seed=seed,
        engine_args=parse_engine_args(engine_arg),
        overwrite=overwrite,
        shards=parse_shards(shards),
    )
    progress = console_progress()
    if dry_run:
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


@cache_app.command("inspect")
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
    """Print what a cache holds: identity, sizes, head sizes, covered mass, entropy."""
    from formats.inspect.inspect_cache import inspect_cache

    show(inspect_cache(cache, row=row, as_json=as_json, plot=plot, model=model, full=full))


@cache_app.command("verify")
def cache_verify(
    cache: CacheArgument,
    model: Annotated[
        str | None,
        typer.Option(
            show_default=False, help="The teacher: also compute random rows again with the other engine."
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="With --model: how many rows to compute again.")] = 32,
    engine: Annotated[
        str | None,
        typer.Option(
            autocompletion=completion.words(*completion.ENGINES),
            show_default=False,
            help="With --model: vllm or transformers.  [default: the other one]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of rows.")] = 0,
    engine_arg: EngineArgOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check every checksum of a cache and, with --model, its numbers against the other engine."""
    from cache_builder import verify_cache

    report = verify_cache(
        cache,
        model,
        rows=rows,
        engine=engine,
        seed=seed,
        engine_args=parse_engine_args(engine_arg),
        progress=console_progress(),
    )
    if as_json:
        show_json(report.to_dict())
    else:
        show(report.text())
    if not report.ok:
        raise typer.Exit(1)


@cache_app.command("estimate")
def cache_estimate(
    corpus: CorpusArgument,
    model: ModelOption,
    rows: Annotated[int, typer.Option(min=1, help="How many random rows go through the engine.")] = 64,
    engine: EngineOption = "vllm",
    max_length: MaxLengthOption = None,
    max_k: MaxKOption = CaptureSettings.max_k,
    tail_draws: TailDrawsOption = CaptureSettings.draw_rate,
    positions: Annotated[
        str,
        typer.Option(
            autocompletion=completion.words(*completion.POSITIONS),
            help="loss: positions whose next token carries loss; all: every position.",
        ),
    ] = CaptureSettings.positions,
    limit: LimitOption = None,
    text_column: TextColumnOption = None,
    split: SplitOption = None,
    template_arg: TemplateArgOption = None,
    dtype: DtypeOption = "auto",
    step_tokens: Annotated[
        int,
        typer.Option(min=1, help="Tokens with KL per training step, which the expected angle falls with."),
    ] = 65_536,
    seed: Annotated[int, typer.Option(help="Seed of the choice of rows.")] = 0,
    revision: RevisionOption = None,
    engine_arg: EngineArgOption = None,
    as_json: JsonOption = False,
) -> None:
    """Capture a sample of CORPUS and print what a cache would cost and how exact its gradients would be.

    For several pairs of --min-prob and --tail-draws, and the cheapest whose gradient is within one degree.
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
        engine_args=parse_engine_args(engine_arg),
    )
    report = estimate_cache(
        config, rows=rows, step_tokens=step_tokens, seed=seed, progress=console_progress()
    )
    if as_json:
        show_json(report.to_dict())
    else:
        show(report.text())


@cache_app.command("merge")
def cache_merge(
    caches: Annotated[
        list[str],
        typer.Argument(
            metavar="CACHE...", autocompletion=completion.caches, help="Caches of one teacher and settings."
        ),
    ],
    out: Annotated[str, typer.Option(help="Directory of the joined cache; new or empty.")],
) -> None:
    """Join caches that differ in nothing but their corpus; repeated rows are kept once."""
    from cache_builder import merge_caches

    show(merge_caches(caches, out, progress=console_progress()).text())


@cache_app.command("export")
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
        show(export_topk(cache, parquet, k=k, limit=limit, progress=console_progress()).text())
        return
    if k is not None:
        raise ConfigError(f"--k belongs to --layout topk, got it with --layout {layout}")
    show(export_parquet(cache, parquet, limit=limit, progress=console_progress()).text())


@cache_app.command("convert")
def cache_convert(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
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
) -> None:
    """Write teacher logprobs of others in the layout of `export --layout topk`.

    They are DistillKit's (--compression), or the logprobs of an API's responses (--tokenizer). Both are known at T = 1
    only, and nobody recorded whose they are: the file says so.
    """
    from cache_builder import convert_distillkit, convert_responses

    if (compression is None) == (tokenizer is None):
        raise ConfigError(
            "convert takes --compression for DistillKit's files or --tokenizer for responses of an API, got "
            + ("neither" if tokenizer is None else "both")
        )
    if compression is not None:
        show(
            convert_distillkit(
                files, compression, parquet, k=k, limit=limit, progress=console_progress()
            ).text()
        )
        return
    from cache_builder.rows.tokenizer_files import load_tokenizer
    from formats.identity.fingerprint import resolve_model

    loaded = load_tokenizer(resolve_model(str(tokenizer)))
    show(convert_responses(files, loaded, parquet, k=k, limit=limit, progress=console_progress()).text())


@cache_app.command("push")
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
    """Check a cache and upload it to the Hugging Face Hub as a data set.

    The card opens the shards in the Hub's viewer; what others wrote in it stays.
    """
    from cache_builder import push_cache

    progress = console_progress()
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


@cache_app.command("pull")
def cache_pull(
    repository: Annotated[
        str, typer.Argument(metavar="REPOSITORY", help="Data set repository, such as me/my-cache.")
    ],
    out: Annotated[str, typer.Argument(metavar="DIRECTORY", help="Where to put the cache; new or empty.")],
    revision: Annotated[str | None, typer.Option(show_default=False, help="Branch, tag or commit.")] = None,
) -> None:
    """Download a cache from the Hugging Face Hub and check all of it."""
    from cache_builder import pull_cache

    show(str(pull_cache(repository, out, revision=revision, progress=console_progress())))


@app.command("train")
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
        typer.Option(
            "--set",
            autocompletion=completion.settings,
            metavar="KEY=VALUE",
            show_default=False,
            help="Any setting, such as training.learning_rate=1e-5. May be repeated; wins over the file.",
        ),
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
    asked = load_config(config, flags=flags, overrides=overrides or [])
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


@app.command("merge")
def merge_command(
    tuned: Annotated[
        list[str],
        typer.Argument(
            metavar="TUNED...",
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
    """Merge tuned models with the initial one: WiSE-FT, task arithmetic, TIES, a soup or Fisher merging."""
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
        weights=parse_numbers(weights, "--weights"),
        by=by,
        fisher=fisher or None,
        fisher_rows=fisher_rows,
    )
    show(merge(config, console_progress()).line())


@app.command("eval")
def eval_command(
    caches: Annotated[
        list[str],
        typer.Argument(
            metavar="CACHE...",
            autocompletion=completion.caches,
            help="Caches of evaluation texts; NAME=CACHE gives one a name of its own.",
        ),
    ],
    model: ModelOption,
    no_kl: Annotated[
        bool,
        typer.Option("--no-kl", help="Read the caches' tokens alone, whichever model built them: no KL."),
    ] = False,
    distance_to: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            autocompletion=completion.models,
            show_default=False,
            help="Also print how far the weights are from those of this model: directory or Hugging Face name.",
        ),
    ] = None,
    quantize: Annotated[
        str,
        typer.Option(
            metavar="INT:SIZE",
            autocompletion=completion.words(*completion.INTEGERS),
            help="Evaluate with linear weights rounded to int4 or int8 in groups of SIZE inputs, such as int4:32.",
        ),
    ] = "none",
    as_json: JsonOption = False,
    dtype: EvalDtypeOption = "float32",
    limit: EvalLimitOption = None,
) -> None:
    """Print perplexity, accuracy, calibration and KL to the model that built them on the texts of CACHE..."""
    from trainer import evaluate
    from trainer.evaluation.evaluate import add_to_card, format_evaluation, name_caches
    from trainer.evaluation.weight_distance import weight_distance

    caches_by_name = name_caches(named(caches))
    distance = None if distance_to is None else weight_distance(model, distance_to, what="--distance-to")
    results = evaluate(
        model,
        caches_by_name,
        dtype=dtype,
        limit=limit,
        kl=not no_kl,
        quantize=quantize,
        progress=console_progress(),
    )
    if quantize == "none" and add_to_card(model, caches_by_name, results):
        note(f"added to {model}/README.md, the model's card")
    if as_json:
        found = {} if distance is None else {"distance": {"to": distance_to, **distance.to_dict()}}
        show_json({"model": model, "caches": results, **found})
    else:
        show(format_evaluation(results))
        if distance is not None:
            show(f"distance of the weights to {distance_to}: {distance.line()}")


@app.command("compare")
def compare_command(
    models: ComparedArgument,
    source: SourceOption,
    target: TargetOption,
    initial: InitialOption = None,
    direct: DirectOption = None,
    no_group: NoGroupOption = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", show_default=False, help="Also draw the trade-off to a .png, .svg or .pdf file."
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            show_default=False,
            help="Also write picture and tables as one .html page that needs nothing else.",
        ),
    ] = None,
    as_json: JsonOption = False,
    work: WorkOption = None,
    bench: BenchOption = None,
    dtype: EvalDtypeOption = "float32",
    limit: EvalLimitOption = None,
) -> None:
    """Print what MODEL... learnt and what they kept, on texts and on tasks: a line per model.

    A word of --source and --target is a cache (perplexity and KL are evaluated, once) or a task of each model's
    bench.json. docs/compare.md says how to read the columns.
    """
    from trainer import compare
    from trainer.comparison.page import require_page
    from trainer.evaluation.tradeoff_picture import require_plottable

    if plot is not None:
        require_plottable(plot)
    if page is not None:
        require_page(page)
    comparison = compare(
        named(models, "models", "LABEL=DIR"),
        source=named(source, "--source", "NAME=CACHE"),
        target=named(target, "--target", "NAME=CACHE"),
        initial=named([initial], "models", "LABEL=DIR") if initial is not None else None,
        direct=direct,
        group=not no_group,
        work=work,
        bench=bench,
        dtype=dtype,
        limit=limit,
        progress=console_progress(),
    )
    if as_json:
        show_json(comparison.to_dict())
    else:
        show(comparison.text())
    if plot is not None:
        note(f"picture in {comparison.plot(plot)}")
    if page is not None:
        note(f"page in {comparison.page(page)}")


@app.command("select")
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
            help="The rule that recommends: keep-gain:SHARE (of direct's gain), budget:PERCENT% (lost), or paper.",
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
    """Print which of MODEL... to take, by each rule: what it keeps of direct fine-tuning's gain, and what it loses.

    docs/select.md has the rules.
    """
    from trainer import compare, select
    from trainer.selection.rules import Rule

    Rule.parse(rule)
    if initial is None:
        raise ConfigError("a selection needs the initial model, got none; name it with --initial MODEL")
    comparison = compare(
        named(models, "models", "LABEL=DIR"),
        source=named(source, "--source", "NAME=CACHE"),
        target=named(target, "--target", "NAME=CACHE"),
        initial=named([initial], "models", "LABEL=DIR"),
        direct=direct,
        group=not no_group,
        work=work,
        bench=bench,
        dtype=dtype,
        limit=limit,
        progress=console_progress(),
    )
    selection = select(comparison, rule, min_gain=min_gain)
    if as_json:
        show_json(selection.to_dict())
    else:
        show(selection.text())


@app.command("bench")
def bench_command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
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
    """Score MODEL... on tasks through lm-evaluation-harness; results stay with the model as bench.json."""
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
    report = bench_models(named(models, "models", "LABEL=DIR"), settings, console_progress())
    if as_json:
        show_json(report.to_dict())
    else:
        show(report.text())


@app.command("sweep")
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
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            autocompletion=completion.settings,
            metavar="KEY=VALUE",
            show_default=False,
            help="A setting of all runs. May be repeated.",
        ),
    ] = None,
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
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", show_default=False, help="Also draw the trade-off to a .png, .svg or .pdf file."
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            show_default=False,
            help="Also write picture and tables as one .html page that needs nothing else.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train every combination of settings from one cache, merge, and compare; the same command continues."""
    from trainer.sweep.compared import require_writable
    from trainer.sweep.config import sweep_from_options
    from trainer.sweep.pools import LocalPool
    from trainer.sweep.sweep import plan_sweep, run_sweep

    asked = sweep_from_options(
        place,
        base_file=config,
        model=model,
        overrides=overrides or [],
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
    require_writable(plot, page)
    if dry_run:
        show(plan_sweep(asked).text())
        return
    if ray is not None:
        from trainer.sweep.on_ray import RayPool

        with RayPool(None if ray == "local" else ray, parallel) as cluster:
            report = run_sweep(asked, pool=cluster, progress=console_progress())
    else:
        report = run_sweep(asked, pool=LocalPool(parallel or 1), progress=console_progress())
    if as_json:
        show_json(report.to_dict())
    else:
        show(report.text())
    if plot is not None and report.comparison is not None:
        note(f"picture in {report.comparison.plot(plot)}")
    if page is not None and report.comparison is not None:
        note(f"page in {report.comparison.page(page)}")
    if report.failed:
        raise typer.Exit(1)


app.command("chain")(chain_command)
app.command("restore")(restore_command)
app.add_typer(probe_app, name="probe")


def main() -> None:
    """Entry point of the console script: runs the app, turns known errors into one line."""
    quiet_imports()
    try:
        app()
    except AnnealError as error:
        fail(str(error), error)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if not missing or missing in (*PACKAGES, "cli"):
            raise
        fail(f"this command needs the package {missing}, which is not installed; {how_to_install()}", error)
    except OSError as error:
        what = f" {error.filename}" if error.filename else ""
        fail(f"the file system refused{what}: {error.strerror or error}", error)


def fail(message: str, error: BaseException, code: int = 1) -> None:
    """Print one line on stderr and exit; with `--debug`, the traceback instead."""
    if os.environ.get("ANNEAL_DEBUG") == "1":
        raise error
    note("error: " + " ".join(message.split()))
    sys.exit(code)


if __name__ == "__main__":
    main()
