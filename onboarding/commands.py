"""`anneal doctor` and `anneal init`, as typer sees them; `cli.py` registers both."""

import json
import sys
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text; its keys are stable.")]


def doctor(as_json: Json = False) -> None:
    """Look at versions, devices and engine; say what is wrong and the one command that mends it.

    Exit code 1 if something is wrong. Nothing is changed, and no network is used.
    """
    from onboarding.doctor.facts import collect
    from onboarding.doctor.findings import judge

    report = judge(collect())
    print(json.dumps(report.to_dict(), indent=2, sort_keys=True) if as_json else report.text())
    if report.wrong:
        sys.exit(1)
