"""Several models on the same two texts: one line each, what was learnt beside what was kept.

Every model is evaluated here and now. The evaluation that a run records is not reused: it was measured on the
weights before they were rounded to the saved dtype, and on rows that the record does not name. What can be
wrong is looked for in all models before the first of them is evaluated.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.cache import TeacherCache
from formats.errors import ConfigError, IdentityMismatchError
from formats.identity.fingerprint import resolve_model
from formats.progress import Progress
from trainer.evaluation.evaluate import Result, evaluate, require_related
from trainer.evaluation.recorded_method import AppliedMethod, method_of
from trainer.evaluation.tradeoff_picture import pareto_front, plot_tradeoff
from trainer.loading import given_as, load_tokenizer, open_cache, quiet_transformers

TEXTS = ("source", "target")


@dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """One line of the table."""

    label: str
    """Its name in this comparison."""
    path: str
    """Directory or hub name, as given."""
    method: AppliedMethod | None
    """How it was made; None if its directory does not tell."""
    results: Mapping[str, Result]
    """`source` and `target` -> what `evaluate` found."""

    def perplexity(self, text: str) -> float:
        """On `source` or `target`; infinity for a model that has diverged."""
        value = self.results[text]["perplexity"]
        return math.inf if value is None or math.isnan(value) else float(value)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Models side by side, in the given order, the initial one first."""

    caches: Mapping[str, str]
    """`source` and `target` -> cache."""
    initial: str | None
    """Label of the initial model, if it was given."""
    models: tuple[ComparedModel, ...]

    @property
    def front(self) -> list[str]:
        """Labels that no other model beats on both texts, the initial one included."""
        return pareto_front(self._points())

    def change(self, model: ComparedModel, text: str) -> float | None:
        """Perplexity against the initial model's in percent; None without one, or if either is infinite."""
        if self.initial is None:
            return None
        change = 100 * (model.perplexity(text) / self.models[0].perplexity(text) - 1)
        return change if math.isfinite(change) else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values under stable keys; what is not finite is None."""
        front = self.front
        return {
            "caches": dict(self.caches),
            "initial": self.initial,
            "models": [
                {
                    "label": model.label,
                    "model": model.path,
                    "method": self._method(model),
                    "strengths": model.method.strengths if model.method else {},
                    "front": model.label in front,
                    **{text: {k: _finite(v) for k, v in model.results[text].items()} for text in TEXTS},
                    "change_percent": {text: self.change(model, text) for text in TEXTS},
                }
                for model in self.models
            ],
        }

    def text(self) -> str:
        """A table for people."""
        front, changes = self.front, self.initial is not None
        header = ["", "model", "method"]
        for text in TEXTS:
            header += [f"{text} ppl", *(["change"] if changes else [])]
        rows = [[*header, "KL to initial: source", "target"]]
        for model in self.models:
            row = ["*" if model.label in front else "", model.label, self._method(model) or "-"]
            for text in TEXTS:
                row.append(f"{model.perplexity(text):.2f}")
                if changes:
                    change = None if self._first(model) else self.change(model, text)
                    row.append("" if change is None else f"{change:+.1f}%")
            kls = [model.results[text]["kl"] for text in TEXTS]
            rows.append([*row, *("-" if kl is None else f"{kl:.4f}" for kl in kls)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 3 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, "", "* Pareto front: no other model here is better on both texts"])

    def plot(self, path: str | Path) -> Path:
        """Draw the models that have not diverged; those of one method have one colour and one line.

        Raises:
            ConfigError: all have, matplotlib is missing, or the file cannot be written.
        """
        points = self._points()
        families: dict[str, list[str]] = {}
        for model in self.models:
            if model.method is not None and model.label in points and not self._first(model):
                families.setdefault(model.method.name, []).append(model.label)
        for labels in families.values():  # from the one that learnt most: a line, not a zigzag
            labels.sort(key=lambda label: points[label]["target"])
        return plot_tradeoff(points, path, initial=self.initial or "", families=families)

    def _first(self, model: ComparedModel) -> bool:
        return self.initial is not None and model is self.models[0]

    def _method(self, model: ComparedModel) -> str | None:
        if self._first(model):
            return "initial model"
        return model.method.text() if model.method else None

    def _points(self) -> dict[str, dict[str, float]]:
        points = {model.label: {text: model.perplexity(text) for text in TEXTS} for model in self.models}
        return {label: point for label, point in points.items() if all(map(math.isfinite, point.values()))}


def compare(
    models: Mapping[str, str | Path],
    *,
    source: str | Path,
    target: str | Path,
    initial: Mapping[str, str | Path] | None = None,
    dtype: str = "float32",
    device: str | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Evaluate every model once on both caches.

    Args:
        models: label -> model directory or hub name.
        source: cache of held-out text that the initial model knew.
        target: cache of held-out text that the models learn.
        initial: label -> the initial model, one entry; its line comes first and changes are relative to it.
        dtype, device, limit: as for `evaluate`.
        progress: a phase `label: source` and one `label: target` for each model; silent by default.

    Raises:
        ConfigError: no models, two equal labels, not a finished model, a cache without tokens that carry
            loss.
        FormatError: a cache is missing, unfinished or broken.
        IdentityMismatchError: the caches, or a model and a cache, come from different initial models.
    """
    if not models:
        raise ConfigError("a comparison needs at least one model, got none; name its directory")
    known = dict(initial or {})
    for label in known:
        if label in models:
            raise ConfigError(
                f"models must have different labels, got {label!r} for --initial and MODEL; write LABEL=DIR"
            )
    paths = {"source": str(source), "target": str(target)}
    caches = {text: TeacherCache(path) for text, path in paths.items()}
    _require_one_teacher(caches)
    quiet_transformers()
    found: dict[str, Path] = {}
    for label, name in {**known, **models}.items():
        what = "--initial" if label in known else "MODEL"
        with given_as(what):
            found[label] = directory = resolve_model(name)
            if not any((directory / file).is_file() for file in ("config.json", "adapter_config.json")):
                raise ConfigError(f"{what} must be a finished model, got no config.json in {directory}")
            tokenizer = load_tokenizer(directory)
            for cache in caches.values():
                require_related(cache, directory, tokenizer)
                if label in known:
                    open_cache(str(cache.path), directory, tokenizer)

    lines = []
    for label, directory in found.items():
        with given_as("--initial" if label in known else "MODEL"):
            results = evaluate(
                directory,
                paths,
                dtype=dtype,
                device=device,
                limit=limit,
                progress=progress,
                label=f"{label}: ",
            )
        for text, result in results.items():
            if result["perplexity"] is None:
                raise ConfigError(f"--{text} needs tokens that carry loss, got none in {paths[text]}")
        path = str({**known, **models}[label])
        lines.append(ComparedModel(label=label, path=path, method=method_of(directory), results=results))
    return Comparison(caches=paths, initial=next(iter(known), None), models=tuple(lines))


def _require_one_teacher(caches: Mapping[str, TeacherCache]) -> None:
    weights = {text: cache.identity.teacher.get("weights") for text, cache in caches.items()}
    if None not in weights.values() and len(set(weights.values())) > 1:
        raise IdentityMismatchError(
            "--source and --target must be caches of one initial model, got "
            + " and ".join(f"{caches[text].path} ({str(weights[text])[:12]})" for text in TEXTS)
            + "; build both with the initial model"
        )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
