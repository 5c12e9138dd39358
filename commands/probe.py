"""`anneal probe`: how fragile, how sure, how well-memorised."""

from pathlib import Path
from typing import Annotated

import typer

from commands import completion
from commands.options import (
    EvalDtypeOption,
    EvalLimitOption,
    JsonOption,
    PlotOption,
    build_option,
    caches_option,
    set_option,
)
from commands.parsing import parse_numbers
from commands.terminal import named, note, show, show_json, show_report
from formats.errors import ConfigError
from formats.picture_file import require_plottable
from formats.progress import ConsoleProgress

probe_app = typer.Typer(
    help="Probe models: noise, questions, memory, learning rates.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
ModelsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL",
        autocompletion=completion.models,
        help="Models in the order of training: directory, hub name, NAME@REVISION or LABEL=MODEL.",
    ),
]


def gammas_of(text: str) -> list[float]:
    """`A:B`, doubling from A to B, or `A,B,C`.

    Raises:
        ConfigError: it is neither.
    """
    try:
        if ":" in text:
            first, last = (float(part) for part in text.split(":"))
            if not 0 < first <= last < float("inf"):
                raise ValueError
            found = [first]
            while found[-1] * 2 <= last * (1 + 1e-9):
                found.append(found[-1] * 2)
            return found
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--gamma takes A:B (doubling) or A,B,C, got {text!r}; for example 0.025:0.8"
        ) from None


@probe_app.command("noise")
def noise_command(
    models: ModelsArgument,
    source: Annotated[list[str], caches_option("Held-out text; only its tokens are read. May be repeated.")],
    gamma: Annotated[
        str,
        typer.Option(
            metavar="A:B|A,B,C", help="Strengths, in units of initialisation; A:B doubles from A to B."
        ),
    ] = "0.025:0.8",
    draws: Annotated[int, typer.Option(min=1, help="Pairs of noise (+ and -) for each strength.")] = 4,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            autocompletion=completion.models,
            show_default=False,
            help="The model before training: noise is scaled by the spread of each tensor there.  [default: the "
            "configuration's initializer_range for matrices, none for vectors]",
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(metavar="REGEX", show_default=False, help="Noise on parameters with such names alone."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    limit: EvalLimitOption = None,
    dtype: EvalDtypeOption = "float32",
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print what Gaussian noise on the weights costs.

    It tells how fragile a model is, and whether it became more so.
    """
    from formats.identity.fingerprint import resolve_model
    from trainer.checks import check_one_of
    from trainer.config import DTYPES
    from trainer.probe.models import resolved
    from trainer.probe.noise import probe_noise
    from trainer.probe.noise_report import NoiseReport

    check_one_of("--dtype", dtype, DTYPES)
    if plot is not None:
        require_plottable(plot)
    curves = probe_noise(
        resolved(models),
        named(source, "--source", "NAME=CACHE"),
        gammas=gammas_of(gamma),
        draws=draws,
        seed=seed,
        initial=resolve_model(init, what="--init") if init is not None else None,
        only=only,
        dtype=dtype,
        limit=limit,
        progress=ConsoleProgress(),
    )
    report = NoiseReport(curves=curves, draws=draws)
    show_report(report, as_json=as_json)
    if plot is not None:
        note(f"picture in {report.plot(plot)}")


@probe_app.command("answers")
def answers_command(
    models: ModelsArgument,
    questions: Annotated[
        Path,
        typer.Option(
            metavar="FILE.jsonl",
            help='A question a line: {"prompt": TEXT, "choices": [TEXT, ...], "answer": NUMBER}, counted from 0.',
        ),
    ],
    limit: Annotated[
        int | None, typer.Option(min=1, show_default=False, help="Ask only the first N.")
    ] = None,
    dtype: EvalDtypeOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """Print how models answer questions with choices.

    In the right form, rightly, and how sure of it.
    """
    from trainer.checks import check_one_of
    from trainer.config import DTYPES
    from trainer.probe.answers import answers_text, answers_to_dict, probe_answers, read_questions
    from trainer.probe.models import resolved

    check_one_of("--dtype", dtype, DTYPES)
    asked = read_questions(questions)[:limit]
    found = probe_answers(resolved(models), asked, dtype=dtype, progress=ConsoleProgress())
    if as_json:
        show_json(answers_to_dict(found))
    else:
        show(answers_text(found))


@probe_app.command("memory")
def memory_command(
    models: ModelsArgument,
    text: Annotated[
        str,
        typer.Option(
            metavar="CACHE",
            autocompletion=completion.caches,
            help="The text that the models were trained on.",
        ),
    ],
    control: Annotated[
        str | None,
        typer.Option(
            metavar="CACHE",
            autocompletion=completion.caches,
            show_default=False,
            help="Text of the same kind that they were not trained on: the difference is memory.",
        ),
    ] = None,
    limit: EvalLimitOption = None,
    dtype: EvalDtypeOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """Print how much of its training text a model knows by heart.

    Of how many tokens it knows what follows, beside text that it has not seen.
    """
    from trainer.probe.memory import memory_text, memory_to_dict, probe_memory
    from trainer.probe.models import resolved

    found = probe_memory(
        resolved(models), text, control, limit=limit, dtype=dtype, progress=ConsoleProgress()
    )
    if as_json:
        show_json(memory_to_dict(found))
    else:
        show(memory_text(found))


@probe_app.command("tune")
def tune_command(
    models: ModelsArgument,
    text: Annotated[
        str, typer.Option(metavar="TEXT", help="What is learnt: a corpus; or, without KL, a cache.")
    ],
    source: Annotated[list[str], caches_option("Held-out text like that of pretraining. May be repeated.")],
    target: Annotated[list[str], caches_option("Held-out text of what is learnt. May be repeated.")],
    lr: Annotated[
        str, typer.Option("--lr", metavar="A,B,C", help="Learning rates, the same for every model.")
    ],
    out: Annotated[str, typer.Option(help="Directory of the runs; the same one continues them.")],
    kl_coef: Annotated[
        str, typer.Option(metavar="A,B,C", help="Strengths of label annealing beside each rate; 0 is direct.")
    ] = "0",
    overrides: Annotated[
        list[str] | None,
        set_option("An argument of all runs.", "training.KEY=VALUE"),
    ] = None,
    build: Annotated[
        list[str] | None, build_option("A setting of the caches that are built of TEXT.")
    ] = None,
    limit: EvalLimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tune models at the same learning rates; print what each forgets.

    Does more pretraining make it worse?
    """
    from commands.cache_process import build_in_process, look_at_corpus, typed_settings
    from trainer.probe.models import named_models
    from trainer.probe.tune import TuneConfig, probe_tune

    settings = typed_settings("probe tune", overrides, build)
    config = TuneConfig(
        models=named_models(models),
        text=text,
        source=named(source, "--source", "NAME=CACHE"),
        target=named(target, "--target", "NAME=CACHE"),
        out=out,
        learning_rates=parse_numbers(lr, "--lr"),
        kl_coefs=parse_numbers(kl_coef, "--kl-coef"),
        training=settings["training"],
        build=settings["build"],
    )
    report = probe_tune(
        config, build=build_in_process, look=look_at_corpus, limit=limit, progress=ConsoleProgress()
    )
    show_report(report, as_json=as_json)
    if report.failed:
        raise typer.Exit(1)
