"""`anneal doctor` and `anneal init`, as typer sees them; `cli.py` registers both."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text; its keys are stable.")]


def doctor(as_json: Json = False) -> None:
    """Look at versions, devices and engine; say what is wrong.

    And the one command that mends it. Exit code 1 if something is wrong. Nothing is changed, and no network is used.
    """
    from onboarding.doctor.facts import collect
    from onboarding.doctor.findings import judge

    report = judge(collect())
    print(json.dumps(report.to_dict(), indent=2, sort_keys=True) if as_json else report.text())
    if report.wrong:
        sys.exit(1)


def init(
    corpus: Annotated[
        str,
        typer.Argument(
            metavar="CORPUS", help="What you want to teach: a file, directory, glob or data set name."
        ),
    ],
    model: Annotated[str, typer.Option("--model", help="Model directory or Hugging Face name.")],
    file: Annotated[str, typer.Option(metavar="FILE", help="The settings file to write.")] = "train.yaml",
    cache: Annotated[str, typer.Option(metavar="DIR", help="Where the cache will be.")] = "cache",
    out: Annotated[str, typer.Option(metavar="DIR", help="Where the tuned model will be.")] = "tuned",
    text_column: Annotated[
        str | None, typer.Option(show_default=False, help="Train on this column as plain text.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(show_default=False, help="Split of a data set.  [default: train]")
    ] = None,
) -> None:
    """Look at a corpus and a model, and write settings for both.

    A commented file, whose first lines are the two commands that use it. No weights are loaded.
    """
    from onboarding.init.look import look_at
    from onboarding.init.settings_file import write

    path = Path(file)
    write(look_at(corpus, model, text_column=text_column, split=split), path, cache=cache, out=out)
    lines = path.read_text(encoding="utf-8").splitlines()
    commands = [line.removeprefix("#").strip() for line in lines if line.startswith("#   anneal ")]
    print("\n".join([f"{path} written; next:", *commands]))
