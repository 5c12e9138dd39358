"""`anneal probe`: how fragile, how sure, how well-memorised."""

from pathlib import Path
from typing import Annotated

import typer

from commands.terminal import console_progress, named, note, show, show_json
from formats.errors import ConfigError

probe_app = typer.Typer(
    help="Probe models: noise on their weights, answers to questions, memorised text, learning rates.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
ModelsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        help="Models in the order of training: directory, hub name, NAME@REVISION or LABEL=MODEL.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text; its keys are stable.")]
LimitOption = Annotated[
    int | None, typer.Option(min=1, show_default=False, help="Read only N rows of each text.")
]
PlotOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", show_default=False, help="Also draw it to a .png, .svg or .pdf file."),
]


def gammas_of(text: str) -> list[float]:
    """`A:B`, doubling from A to B, or `A,B,C`.

    Raises:
        ConfigError: it is neither.
    """
    try:
        if ":" in text:
            first, last = (float(part) for part in text.split(":"))
            if not 0 < first <= last:
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
    source: Annotated[
        list[str],
        typer.Option(metavar="NAME=CACHE", help="Held-out text; only its tokens are read. May be repeated."),
    ],
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
    limit: LimitOption = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16: the model's weights.")
    ] = "float32",
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print what Gaussian noise on the weights costs: how fragile a model is, and whether it became more so."""
    from formats.identity.fingerprint import resolve_model
    from trainer.checks import check_one_of
    from trainer.config import DTYPES
    from trainer.evaluation.tradeoff_picture import require_plottable
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
        initial=resolve_model(init) if init is not None else None,
        only=only,
        dtype=dtype,
        limit=limit,
        progress=console_progress(),
    )
    report = NoiseReport(curves=curves, draws=draws)
    if as_json:
        show_json(report.to_dict())
    else:
        show(report.text())
    if plot is not None:
        note(f"picture in {report.plot(plot)}")
