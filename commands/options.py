"""Options and arguments that several commands have, typed once."""

from pathlib import Path
from typing import Annotated, Any

import typer

from commands import completion
from formats.capture_settings import MAX_RATE

CORPORA = (
    "A .jsonl, .json, .csv, .parquet, .arrow or .txt file, a directory or glob of them, or a "
    "Hugging Face data set name"
)
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
        help=f"{CORPORA}.",
    ),
]
OptionalCorpusArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="CORPUS",
        show_default=False,
        help=f"{CORPORA}; none with --generate.",
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
    str | None,
    typer.Option(show_default=False, help="Revision of a Hugging Face model; a directory has none."),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        autocompletion=completion.words("auto", *completion.DTYPES),
        help="auto, float32, bfloat16 or float16: the engine's weights.",
    ),
]
HeadDtypeOption = Annotated[
    str,
    typer.Option(
        autocompletion=completion.words("float32", "model"),
        help="float32, or model: as the other weights, for an output head that is quantised.",
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
RetainOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CACHE[:WEIGHT]",
        autocompletion=completion.caches,
        show_default=False,
        help="Hold the model to the initial one on this text too, without learning it; WEIGHT rows of it per row of "
        "CACHE. May be repeated.  [default weight: 0.25]",
    ),
]
EvalLimitOption = Annotated[
    int | None, typer.Option(min=1, show_default=False, help="Read only N rows of each text.")
]
ComparedArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL",
        autocompletion=completion.models,
        help="Models to compare; LABEL=DIR gives one a label of its own.",
    ),
]
SourceOption = Annotated[
    list[str],
    typer.Option(
        metavar="CACHE|TASK",
        autocompletion=completion.caches,
        help="What the initial model knew: a cache of held-out text, or a task of bench.json (TASK, TASK:METRIC or "
        "TASK:SHOTS); NAME=... gives it a name of its own. May be repeated.",
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
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text; its keys are stable.")]
EvalDtypeOption = Annotated[
    str,
    typer.Option(
        autocompletion=completion.words(*completion.DTYPES),
        help="float32, bfloat16 or float16: the model's weights.",
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", show_default=False, help="Also draw it to a .png, .svg or .pdf file."),
]
PageOption = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        show_default=False,
        help="Also write picture and tables as one .html page that needs nothing else.",
    ),
]
PositionsOption = Annotated[
    str,
    typer.Option(
        autocompletion=completion.words(*completion.POSITIONS),
        help="loss: positions whose next token carries loss; all: every position.",
    ),
]


def set_option(help_text: str, metavar: str = "KEY=VALUE") -> Any:
    """`--set`, which every command that trains has."""
    return typer.Option(
        "--set", autocompletion=completion.settings, metavar=metavar, show_default=False, help=help_text
    )


def build_option(help_text: str) -> Any:
    """`--build`, of every command that builds caches on its way."""
    return typer.Option(metavar="KEY=VALUE", show_default=False, help=help_text)


def caches_option(help_text: str) -> Any:
    """Caches of held-out text, with names."""
    return typer.Option(
        metavar="NAME=CACHE", autocompletion=completion.caches, show_default=False, help=help_text
    )


RunSettingsOption = Annotated[list[str] | None, set_option("A setting of all runs. May be repeated.")]
