"""How the models of a sweep are compared: the only place that knows it. Finished models in, a comparison out.

evaluations/   what was computed before, so that a second comparison costs the new models only
bench/         results on tasks, where a source or target is one
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formats.cache import TeacherCache
from formats.errors import ConfigError, naming
from formats.identity.fingerprint import resolve_model
from formats.named_path import short_name
from formats.progress import Progress
from trainer.comparison.metric import SIDES, is_task, task_of
from trainer.sweep.config import SweepConfig

if TYPE_CHECKING:
    from trainer.bench.settings import BenchSettings
    from trainer.comparison.comparison import Comparison
    from trainer.selection.selection import Selection


def check_yardsticks(config: SweepConfig) -> None:
    """Open every text and find every task of `source` and `target`, and the texts that soups go by, before anything
    is trained.

    Raises:
        AnnealError: naming the one that is no cache, no task, or a cache of another model than the initial one.
    """
    from trainer.comparison.text_readings import open_text
    from trainer.evaluation.evaluate import require_related
    from trainer.loading import load_tokenizer, open_cache

    texts = [
        (side, name, word)
        for side in SIDES
        for name, word in getattr(config, side).items()
        if not is_task(word)
    ]
    for side, name, word in texts:
        with naming(f"{side}.{name} must be a cache"):
            open_text(word)
    model = resolve_model(config.base["model"], config.base.get("revision"))
    tokenizer = load_tokenizer(model)
    for side, name, word in texts:
        with naming(f"{side}.{name} must be of the initial model"):
            open_cache(word, model, tokenizer)
    for entry in config.merges:
        for word in entry.strengths.get("by", ()):
            with naming(f"merges.{entry.method}.by must be a cache"):
                require_related(TeacherCache(word), model, tokenizer, kl=False)
    if (settings := bench_settings(config)) is not None:
        from trainer.bench.catalogue import load_catalogue
        from trainer.bench.harness import import_harness

        import_harness()
        load_catalogue(settings.requests(), settings.task_dirs, allow_code=settings.allow_code)


def bench_settings(config: SweepConfig) -> "BenchSettings | None":
    """Settings of the benchmark that the sweep's tasks need; None without tasks.

    Raises:
        ConfigError: there are settings, and no task that they could be for.
    """
    words = [word for side in (config.source, config.target) for word in side.values() if is_task(word)]
    if not words:
        if config.bench:
            raise ConfigError(
                f"bench ({', '.join(config.bench)}) needs a task among source and target, got caches alone; name one "
                "or leave it out"
            )
        return None
    from trainer.bench.settings import BenchSettings

    asked = [task_of(word) for word in words]
    tasks = tuple(dict.fromkeys(task if shots is None else f"{task}:{shots}" for task, shots, _ in asked))
    given: dict[str, Any] = {"tasks": tasks, **config.bench, "out": str(Path(config.out) / "bench")}
    return BenchSettings(**given)


def initial_of(config: SweepConfig, models: Mapping[str, Path]) -> dict[str, str]:
    """Label -> the initial model; of a revision its directory, which every run starts from.

    Raises:
        ConfigError: there is no such model.
    """
    model, revision = str(config.base["model"]), config.base.get("revision")
    label = short_name(model)
    place = model if revision is None else str(resolve_model(model, revision))
    return {label if label and label not in models else "initial": place}


def comparison_of(
    config: SweepConfig,
    models: Mapping[str, Path],
    progress: Progress,
    *,
    yardsticks: Collection[str] = (),
) -> "Comparison":
    """Compare finished models with each other and with the initial one.

    Args:
        models: label -> directory.
        yardsticks: labels of the runs of direct fine-tuning, to which shares relate: of several, such as at several
            learning rates, to the one that gains most on the target, and to none that has diverged.
    """
    from trainer.comparison.compare import compare

    initial = initial_of(config, models)
    options: dict[str, Any] = {"work": Path(config.out) / "evaluations", "cards": True}
    if (settings := bench_settings(config)) is not None:
        from trainer.bench.bench import bench_models

        measured = bench_models({**initial, **models}, settings, progress)
        options["bench"] = settings.out
        # Results of earlier settings stand there too.
        options["bench_entries"] = {
            entry.key for model in measured.models for entry in model.entries.values()
        }
    options |= {"source": config.source, "target": config.target, "initial": initial, "progress": progress}
    options["dtype"] = config.eval_dtype
    known = [name for name in yardsticks if name in models]
    found = compare(models, **options)
    lines = [line for line in dict.fromkeys(found.line(name).label for name in known) if found.standing(line)]
    best = lines[0] if len(lines) == 1 else best_of(found, lines)
    return found if best is None else found.related_to(best)


def best_of(comparison: "Comparison", labels: Collection[str]) -> str | None:
    """The line that gains most on the target, of those of these models."""
    gains: dict[str, float] = {}
    for line in {comparison.line(label).label for label in labels}:
        found = comparison.standing(line)
        if found is not None and found.gain is not None:
            gains[line] = found.gain
    return max(sorted(gains), key=lambda label: gains[label]) if gains else None


def gain_kept(comparison: "Comparison", label: str) -> float | None:
    """The share of direct fine-tuning's gain on the target that a model keeps.

    With one text it is ln(ppl0 / ppl) / ln(ppl0 / ppl_direct). None where direct fine-tuning gains nothing, or a model
    has diverged.
    """
    found = comparison.standing(comparison.line(label).label)
    return None if found is None else found.gain_kept


def selection_of(config: SweepConfig, comparison: "Comparison") -> "Selection | None":
    """What the rules pick, `keep-gain` recommending; None where there is no direct fine-tuning to relate to."""
    if comparison.direct is None:
        return None
    from trainer.selection.selection import select

    try:
        return select(comparison, f"keep-gain:{config.keep_gain:g}")
    except ConfigError:  # direct fine-tuning gained nothing: the table says so
        return None
