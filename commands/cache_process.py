"""Caches that a command needs on its way, each built in a process of its own: the engine's memory is gone when it ends.

Settings go in as one line of JSON on stdin; progress and messages go to stderr, where those of the command go. The
process is stopped as `anneal cache build` is, by SIGTERM, and stops in the same way when stdin ends: then the command
that started it was stopped or is gone.
"""

import contextlib
import json
import signal
import sys
from collections.abc import Mapping
from typing import Any

from formats.errors import AnnealError, ConfigError, one_line
from formats.interruption import Interrupted

PROGRAM = "from commands.cache_process import main; main()"


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse what is no setting of a build.

    Raises:
        ConfigError: names the first one.
    """
    from dataclasses import fields

    from cache_builder.config import BuildConfig

    known = {entry.name for entry in fields(BuildConfig)} - {
        "corpus",
        *("model", "revision"),  # of the command itself
        "out",
        "generate",
        "codec",
        "shards",
    }
    for name in options:
        if name not in known:
            raise ConfigError(
                f"build must hold settings of a cache, got {name}; there are {', '.join(sorted(known))}"
            )
    BuildConfig(corpus="corpus", model="model", out="out", **options)


def typed_settings(
    command: str, overrides: list[str] | None, build: list[str] | None
) -> dict[str, dict[str, Any]]:
    """`--set training.KEY=VALUE` and `--build KEY=VALUE` of a command: their settings under `training` and `build`.

    Raises:
        ConfigError: one is not of that form, or no setting of a build.
    """
    from trainer.config_file import apply_override

    settings: dict[str, dict[str, Any]] = {"training": {}, "build": {}}
    for word in overrides or []:
        if not word.startswith("training."):
            raise ConfigError(f"--set of {command} takes training.KEY=VALUE, got {word!r}")
        apply_override(settings, word)
    for word in build or []:
        apply_override(settings["build"], word)
    if settings["build"]:
        check_options(settings["build"])
    return settings


def look_at_corpus(corpus: str, options: Mapping[str, Any]) -> None:
    """Open a corpus as a build of it would.

    Args:
        corpus: file, directory, glob or name of a data set.
        options: of the build.

    Raises:
        AnnealError: there is none, no layout fits, or the options are none for it.
    """
    from cache_builder.corpus.corpus import CorpusConfig, open_corpus

    asked = {name: options[name] for name in ("text_column", "split", "limit", "seed") if name in options}
    open_corpus(CorpusConfig(source=corpus, **asked))


def build_in_process(corpus: str, model: str, out: str, options: Mapping[str, Any]) -> None:
    """Build a cache as `anneal cache build` does; the same call continues a stopped build.

    Raises:
        AnnealError: it could not be built; the first line says why.
        Interrupted: a signal ended it.
    """
    from trainer.sweep.pools import start_process

    print(f"cache {out}: {corpus} by {model}", file=sys.stderr, flush=True)
    settings = {**options, "corpus": corpus, "model": model, "out": out}
    process = start_process(PROGRAM, {}, text=True)
    assert process.stdin is not None and process.stdout is not None
    stopped: KeyboardInterrupt | None = None
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(settings) + "\n")
            process.stdin.flush()
        try:
            lines = process.stdout.read().splitlines()
        except KeyboardInterrupt as error:
            stopped = error
            process.stdin.close()
            lines = process.stdout.read().splitlines()
    except KeyboardInterrupt:  # the second one
        process.kill()
        raise
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        code = process.wait()
    found = json.loads(lines[-1]) if lines else {"error": f"the process of the build ended with {code}"}
    if stopped is not None or "interrupted" in found:
        # The process alone gets no other signal than this.
        number = signal.SIGTERM if stopped is None else getattr(stopped, "exit_code", 130) - 128
        raise Interrupted(number, f"stopped while the cache {out} was built; the same command continues")
    if "error" in found:
        raise AnnealError(f"cache {out} of {corpus}: {found['error']}")


def main() -> None:
    """Entry point of the process."""
    from trainer.sweep.worker import read_line, stop_when_stdin_ends, take_stdout

    outcome = take_stdout()
    settings = json.loads(read_line())
    stop_when_stdin_ends()
    found: dict[str, Any] = {"done": True}
    try:
        from cache_builder import BuildConfig, build_cache
        from formats.progress import ConsoleProgress

        build_cache(BuildConfig(**settings), progress=ConsoleProgress())
    except KeyboardInterrupt:
        found = {"interrupted": True}
    except (AnnealError, OSError, RuntimeError, MemoryError, ImportError) as error:
        found = {"error": one_line(error, None, whole=True)}
    with contextlib.suppress(BrokenPipeError), outcome:  # nobody reads it, where the command is gone
        print(json.dumps(found), file=outcome)
