"""What this project is called on the package index, and the one sentence that says how to install a part of it."""

from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "label-annealing"
"""`anneal`, `trainer` and `formats` on the package index are other people's packages: never name them to a user."""


def how_to_install(*extras: str) -> str:
    """The command that adds optional parts: `how_to_install("plot")` is `pip install 'label-annealing[plot]'`.

    Without extras, the command that completes an installation. pip takes the installed distribution where there is
    one, editable or not, and adds what is missing to it.
    """
    return f"pip install '{DISTRIBUTION}[{','.join(extras)}]'" if extras else f"pip install {DISTRIBUTION}"


def installed_version() -> str:
    """The version that is installed, or that none is: a source tree on the path has no metadata."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "(not installed, run from its source)"
