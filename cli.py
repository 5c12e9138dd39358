"""The `anneal` command line: which commands there are, and what becomes of their errors.

Results go to stdout, progress and messages to stderr. Bad input is one line on stderr and exit code 1 (2 for
wrong usage), without a traceback unless `--debug` is given. The commands are in `commands/`; heavy packages are
imported inside them, so that `--help` and `cache inspect` start fast on a machine without torch or vLLM.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

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

UNFINISHED = "interrupted: nothing is left half-written; the same command goes on, or starts again"

try:
    import typer
    from typer.core import TyperGroup

    from commands.bench import bench_command
    from commands.cache_build import cache_build, cache_estimate
    from commands.cache_tools import (
        cache_convert,
        cache_export,
        cache_inspect,
        cache_merge,
        cache_pull,
        cache_push,
        cache_verify,
    )
    from commands.chain import chain_command
    from commands.compare import compare_command, select_command
    from commands.evaluate import eval_command
    from commands.merge import merge_command
    from commands.probe import probe_app
    from commands.restore import restore_command
    from commands.sweep import sweep_command
    from commands.terminal import escape_unprintable, note, show
    from commands.train import train_command
    from formats.errors import AnnealError
    from formats.install import how_to_install
    from formats.interruption import raise_on_sigterm
    from formats.quiet import quiet_imports
    from onboarding import commands as onboarding
except KeyboardInterrupt:  # half a second, in which nothing has begun
    print(UNFINISHED, file=sys.stderr)
    sys.exit(130)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """What a signal ends in this block says how far it came, and exits with the signal's code."""
    try:
        yield
    except KeyboardInterrupt as error:
        note(str(error) or UNFINISHED)
        sys.exit(getattr(error, "exit_code", 130))


class InterruptibleGroup(TyperGroup):
    """Commands in which a signal has a word; typer alone exits with 130 without one, SIGTERM too."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Parse the words."""
        with interruptible():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with interruptible():
            return super().invoke(ctx)


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
OF_CACHES: dict[str, Callable[..., None]] = {
    "build": cache_build,
    "inspect": cache_inspect,
    "verify": cache_verify,
    "estimate": cache_estimate,
    "merge": cache_merge,
    "export": cache_export,
    "convert": cache_convert,
    "push": cache_push,
    "pull": cache_pull,
}
COMMANDS: dict[str, Callable[..., None]] = {
    "doctor": onboarding.doctor,
    "init": onboarding.init,
    "train": train_command,
    "merge": merge_command,
    "eval": eval_command,
    "compare": compare_command,
    "select": select_command,
    "bench": bench_command,
    "sweep": sweep_command,
    "chain": chain_command,
    "restore": restore_command,
}
app.add_typer(cache_app, name="cache")
for _name, _command in OF_CACHES.items():
    cache_app.command(_name)(_command)
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
app.add_typer(probe_app, name="probe")


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


IMPORT_FAILED = "Could not import module"
"""What transformers says of a class of its own where another package, torchvision for one, does not import."""


def main() -> None:
    """Entry point of the console script: runs the app, turns known errors into one line."""
    quiet_imports()
    escape_unprintable()
    raise_on_sigterm()
    try:
        with interruptible():
            app()
    except AnnealError as error:
        fail(str(error), error)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if not missing and IMPORT_FAILED in str(error):
            fail(str(error), error)
        if not missing or missing in (*PACKAGES, "cli"):
            raise
        fail(f"this command needs the package {missing}, which is not installed; {how_to_install()}", error)
    except OSError as error:
        what = f" {error.filename}" if error.filename else ""
        fail(f"the file system refused{what}: {error.strerror or error}", error)


def fail(message: str, error: BaseException) -> None:
    """Print one line on stderr and exit; with `--debug`, the traceback instead."""
    if os.environ.get("ANNEAL_DEBUG") == "1":
        raise error
    if IMPORT_FAILED in message:
        message = message.split(" Are this object's")[0]
        message += " anneal doctor says which package is broken, and what mends it"
    note("error: " + " ".join(message.split()))
    sys.exit(1)


if __name__ == "__main__":
    main()
