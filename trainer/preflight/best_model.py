"""The metric that chooses the best checkpoint: which there will be, and which direction is better.

Evaluation gives `eval_{cache}_{metric}`. Every metric of ours that speaks about the model is better when it is
lower; transformers would take each name that does not end in `loss` for better when higher, and then keep the worst.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from formats.errors import ConfigError
from trainer.preflight.combinations import BY_METRIC, word

OF_LABELS = ("loss", "ce", "perplexity")
"""Metrics that need tokens that carry loss; the loss only of a run that has a cross-entropy."""
OF_TEACHER = ("kl",)
"""Metrics that need teacher positions."""
METRICS = (*OF_LABELS, *OF_TEACHER)
"""All metrics that may choose a checkpoint; lower is better for each."""
PREFIX = "eval_"


def chooses(resolved: Mapping[str, Any]) -> str | None:
    """The setting that needs a metric, None where none does."""
    if resolved.get("load_best_model_at_end"):
        return "load_best_model_at_end"
    if word(resolved.get("save_strategy")) == "best":
        return "save_strategy: best"
    schedule = word(resolved.get("lr_scheduler_type"))
    return f"lr_scheduler_type: {schedule}" if schedule in BY_METRIC else None


def known_metrics(caches: Sequence[str]) -> list[str]:
    """`{cache}_{metric}` of all metrics that there will be; a single nameless cache gives the bare metrics."""
    return [f"{cache}_{metric}" if cache else metric for cache in caches for metric in METRICS]


def full_name(name: str | None, caches: Sequence[str]) -> str | None:
    """`eval_{cache}_{metric}` for what a person may write: with or without the prefix, and with a single evaluation
    cache without its name; None when it is no such metric.
    """
    known = {PREFIX + metric for metric in known_metrics(caches)}
    candidates = [] if name is None else [f"{PREFIX}{name}", name]
    if len(caches) == 1:
        bare = (name or "loss").removeprefix(PREFIX)
        candidates.append(f"{PREFIX}{caches[0]}_{bare}" if caches[0] else PREFIX + bare)
    return next((candidate for candidate in candidates if candidate in known), None)


def settle(given: Mapping[str, Any], resolved: dict[str, Any], caches: Iterable[str]) -> None:
    """Fill in metric, direction and the strategies that go with them, in place.

    Args:
        given: `training` as typed.
        resolved: the same over the defaults.
        caches: names of the evaluation caches.

    Raises:
        ConfigError: there is no such metric, its direction is contradicted, or checkpoints and evaluations do not
            meet.
    """
    need, names = chooses(resolved), list(caches)
    if need is None:
        return
    if not names:
        raise ConfigError(f"training.{need} needs eval_caches, got none; add `eval_caches: {{name: CACHE}}`")
    _meet(given, resolved, need)
    name = given.get("metric_for_best_model")
    metric = full_name(name, names)
    if metric is None:
        known = ", ".join(known_metrics(names))
        raise ConfigError(f"training.metric_for_best_model must be one of {known}; got {name!r}")
    if given.get("greater_is_better"):
        raise ConfigError(
            f"training.greater_is_better contradicts metric_for_best_model {metric.removeprefix(PREFIX)}, which is "
            "better when lower, got true; remove it"
        )
    mode = (resolved.get("lr_scheduler_kwargs") or {}).get("mode", "min")
    if word(resolved.get("lr_scheduler_type")) in BY_METRIC and mode != "min":
        raise ConfigError(
            f"training.lr_scheduler_kwargs.mode contradicts metric_for_best_model {metric.removeprefix(PREFIX)}, "
            f"which is better when lower, got {mode!r}; remove it"
        )
    resolved["metric_for_best_model"], resolved["greater_is_better"] = metric, False


def require_steady(metric: str | None) -> None:
    """Refuse to choose by the loss of a run with `kl_budget`: its coefficient is another one in every evaluation.

    Args:
        metric: full name; None where nothing is chosen.

    Raises:
        ConfigError: it is a loss.
    """
    if metric is not None and metric.endswith("loss"):
        name = metric.removeprefix(PREFIX)
        raise ConfigError(
            f"metric_for_best_model must mean the same in every evaluation, got {name} beside kl_budget, which moves "
            f"its coefficient; use {name.removesuffix('loss')}ce"
        )


def _meet(given: Mapping[str, Any], resolved: dict[str, Any], need: str) -> None:
    """Let evaluations and checkpoints meet where only one of them was typed; refuse where they cannot."""
    evaluates, saves = word(resolved["eval_strategy"]), word(resolved["save_strategy"])
    best = bool(resolved.get("load_best_model_at_end"))
    if best and "eval_strategy" not in given and saves in ("steps", "epoch"):
        evaluates = resolved["eval_strategy"] = saves
    elif best and "save_strategy" not in given and evaluates != "no":
        saves = resolved["save_strategy"] = evaluates
    if best and evaluates == saves == "steps":
        if "save_steps" not in given and resolved.get("eval_steps"):
            resolved["save_steps"] = resolved["eval_steps"]
        resolved["eval_steps"] = resolved.get("eval_steps") or resolved["save_steps"]
    if evaluates == "no":
        raise ConfigError(f"training.{need} needs evaluations, got eval_strategy: no; use steps or epoch")
    if best and saves not in (evaluates, "best"):
        raise ConfigError(
            "training.load_best_model_at_end needs a checkpoint at every evaluation, got "
            f"eval_strategy: {evaluates} and save_strategy: {saves}; make them equal, or save_strategy: best"
        )


def require_meetings(
    *,
    eval_steps: int,
    save_steps: int,
    eval_delay: float,
    max_steps: int,
    save_strategy: str,
    eval_strategy: str,
) -> None:
    """Refuse a run in which no checkpoint would ever be judged, or one would be saved and not judged.

    Args:
        eval_steps, save_steps: steps between two of them, shares already resolved.
        eval_delay: steps (or epochs) before the first evaluation.
        max_steps: steps of the run.
        save_strategy, eval_strategy: as in TrainingArguments.

    Raises:
        ConfigError: says what does not meet.
    """
    if eval_strategy != "steps":
        return
    if eval_delay > max_steps:
        raise ConfigError(
            f"training.eval_delay must leave an evaluation, got {eval_delay:g} in a run of {max_steps} steps"
        )
    if save_strategy == "steps" and save_steps % eval_steps and save_steps < max_steps:
        raise ConfigError(
            "training.load_best_model_at_end needs an evaluation at every checkpoint, got one every "
            f"{eval_steps} and a checkpoint every {save_steps} of {max_steps} steps; make save_steps a multiple "
            "of eval_steps"
        )


def require_metric(metric: str, counts: Mapping[str, tuple[int, int]], *, learns: bool = True) -> None:
    """Refuse a metric that the evaluation caches cannot give.

    Args:
        metric: `eval_{cache}_{metric}`.
        counts: name of a cache -> (tokens that carry loss, teacher positions).
        learns: whether the run has a cross-entropy; its loss is the KL alone without one.

    Raises:
        ConfigError: says what the cache lacks.
    """
    of_teacher = OF_TEACHER if learns else ("loss", *OF_TEACHER)
    of_labels = tuple(kind for kind in OF_LABELS if kind not in of_teacher)
    for cache, (num_labels, num_positions) in counts.items():
        kind = metric.removeprefix(f"{PREFIX}{cache}_")
        if kind in of_labels and metric.endswith(f"{cache}_{kind}") and not num_labels:
            raise ConfigError(
                f"training.metric_for_best_model {metric} needs tokens that carry loss, got none in {cache}; "
                f"use {cache}_kl"
            )
        if kind in of_teacher and metric.endswith(f"{cache}_{kind}") and not num_positions:
            raise ConfigError(
                f"training.metric_for_best_model {metric} needs teacher positions, got none in {cache}; use {cache}_ce"
            )
