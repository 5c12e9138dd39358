"""`anneal eval`: one model on the texts of caches."""

from typing import Annotated

import typer

from commands import completion
from commands.options import EvalDtypeOption, EvalLimitOption, JsonOption, ModelOption
from commands.terminal import named, note, show, show_json
from formats.progress import ConsoleProgress


def eval_command(
    caches: Annotated[
        list[str],
        typer.Argument(
            metavar="CACHE",
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
    """Print perplexity, accuracy and KL of a model on cached texts.

    KL is to the model that built the caches.
    """
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
        progress=ConsoleProgress(),
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
