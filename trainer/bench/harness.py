"""lm-evaluation-harness, quietly and behind one import: what is missing is one line, its bars are ours."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from formats.errors import ConfigError, one_line
from formats.install import how_to_install
from formats.progress import Progress


def import_harness() -> Any:
    """The `lm_eval` package.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise ConfigError(
            f"anneal bench needs lm-evaluation-harness, which does not import ({one_line(error)}); run "
            f"{how_to_install('bench')}"
        ) from error
    return lm_eval


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep the harness's log, its prints and the bars of `datasets` out of the results; --debug shows them."""
    import datasets

    debug = os.environ.get("ANNEAL_DEBUG") == "1"
    bars = datasets.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "httpx")]
    before = [logger.level for logger in loggers]
    # Standard errors of metrics without a formula are bootstrapped: in this process, not in a pool of forks.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    if not debug:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        datasets.disable_progress_bars()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(sys.stderr if debug else nowhere):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def bars_of(progress: Progress, what: str, model: Any) -> Iterator[None]:
    """Show the harness's bars as phases of `progress`: what it calls `tqdm` is ours inside.

    It counts vLLM's requests when all of them are answered, so the engine counts them instead, one by one.

    Args:
        model: under the harness's interface.
    """
    by_engine = engine_of(model) is not None

    class Bar:
        """The part of tqdm that the harness uses."""

        def __init__(
            self, iterable: Iterable[Any] | None = None, total: int | None = None, **_: object
        ) -> None:
            self._iterable = iterable
            # What is iterated is quick (prompts, tokens); running requests announces its total instead.
            if iterable is None:
                progress.start(what, total, unit="request")

        def __iter__(self) -> Iterator[Any]:
            return iter(self._iterable or ())

        def update(self, count: int = 1) -> None:
            if not by_engine:
                progress.advance(int(count))

        def close(self) -> None:
            progress.finish()

    class EngineBar:
        """The part of tqdm that vLLM uses, within a phase that a `Bar` has started."""

        def __init__(self, iterable: Iterable[Any] = (), **_: object) -> None:
            self._iterable = iterable
            self.n, self.postfix, self.format_dict = 0, "", {"elapsed": 1.0}

        def __iter__(self) -> Iterator[Any]:
            return iter(self._iterable)

        def update(self, count: int = 1) -> None:
            self.n += count
            progress.advance(int(count))

        def refresh(self) -> None: ...

        def close(self) -> None: ...

    names = [
        f"lm_eval.{name}" for name in ("api.model", "api.task", "models.huggingface", "models.vllm_causallms")
    ]
    modules = [sys.modules[name] for name in names if name in sys.modules]
    before = [module.tqdm for module in modules]  # type: ignore[attr-defined]
    for module in modules:
        module.tqdm = Bar  # type: ignore[attr-defined]
    if by_engine:
        generate = model.model.generate
        model.model.generate = lambda *given, **named: generate(*given, **{**named, "use_tqdm": EngineBar})
    try:
        yield
    finally:
        for module, bar in zip(modules, before, strict=True):
            module.tqdm = bar  # type: ignore[attr-defined]
        if by_engine:
            del model.model.generate
        progress.finish()


def engine_of(model: Any) -> Any:
    """The vLLM engine behind a model of the harness; None with transformers, and where one is started per task."""
    return getattr(getattr(model, "model", None), "llm_engine", None)
