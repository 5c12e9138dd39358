"""`run_restore`: from tuned models and general text to what comes back of their loss.

Order: everything that can be wrong; the cache of the text; which rows of it; the control and every tuned model trained
on them, the same rows in the same order; the evaluations. The same command continues what was stopped.

text/            the cache of a corpus, the chosen rows, and which they are
control/NAME     the initial model after the same text, at the rate of a tuned model
restored/LABEL   a tuned model after the text: an ordinary run directory
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from formats.cache import TeacherCache
from formats.disk.durable import atomic_write_json
from formats.errors import AnnealError, ConfigError, IdentityMismatchError, naming
from formats.named_path import short_name
from formats.progress import Progress
from trainer.chain.caches import Build, CacheMaker, Look, require_caches
from trainer.chain.plan import PlacedRun
from trainer.chain.readings import read_model
from trainer.config import TrainConfig
from trainer.config_file import RESOLVED_NAME, load_config
from trainer.evaluation.evaluate import Result
from trainer.loading import load_tokenizer
from trainer.merging.models import find_model, identity_of, require_descendant
from trainer.preflight.combinations import NO_WARMUP, word
from trainer.recipe import resolve_training
from trainer.restore.config import AUTO_FACTOR, RestoreConfig
from trainer.restore.report import REPORT_NAME, Restored, RestoreReport
from trainer.restore.text import drawn, easiest, write_rows
from trainer.sweep.pools import LocalPool, Pool
from trainer.sweep.runs import Runs, decisive, is_finished, require_same
from trainer.sweep.sweep import held

KEPT_ARGUMENTS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim_args",
    "optim_target_modules",
    "bf16",
    "fp16",
    "use_cpu",
)
"""Arguments of the tuning run that restoring takes over."""
OF_ONE = {
    "optim": ("optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon"),
    "lr_scheduler_type": ("lr_scheduler_kwargs",),
    "bf16": ("fp16",),
    "fp16": ("bf16",),
}
"""Argument -> others that are about its value: they are not taken over where it is another one here."""
KEPT_SETTINGS = ("packing", "pack_length", "group_by_length")
"""Settings of the tuning run, beside `training`, that make its batches."""


def tuning_run(model: Path) -> TrainConfig | None:
    """The settings with which a model was tuned, of a checkpoint those of its run; None for one of another tool."""
    for place in (model, model.parent):
        if (place / RESOLVED_NAME).is_file() and (place == model or model.name.startswith("checkpoint-")):
            return load_config(place / RESOLVED_NAME)
    return None


def run_restore(
    config: RestoreConfig,
    *,
    build: Build | None = None,
    look: Look | None = None,
    pool: Pool | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> RestoreReport:
    """Restore every tuned model, and the initial one as the control, and measure what came back.

    Args:
        config: what to restore.
        build: builds the cache of a corpus; without it the text must be a cache.
        look: opens that corpus before anything runs.
        pool: what trains; one run after another on this machine by default.
        limit: only the first rows of each source text.
        progress: silent by default.

    Raises:
        AnnealError: before anything runs, what is wrong. A run that fails is no error: it is in the report.
        SweepStopped: SIGINT or SIGTERM ended it.
    """
    progress, out = progress or Progress(), Path(config.out)
    tuned = {label: find_model(model, "TUNED") for label, model in config.tuned.items()}
    initial = find_model(config.initial, "--initial")
    identity = identity_of(initial, config.initial, load_tokenizer(initial))
    for model in tuned.values():
        require_descendant(model, identity)
    settings = {label: tuning_run(model) for label, model in tuned.items()}
    maker = CacheMaker(out=out, options=config.build, build=build, look=look)
    text = maker.place("text", config.text)
    maker.check(config.text, "--text", text)
    maker.refuse_idle(config.text)
    require_caches(config.source, "--source")
    rates = {label: rate_of(config, label, found) for label, found in settings.items()}
    num_tokens = tokens_of(config, settings)
    place = out / "text" / "rows"
    planned = {
        label: plan_run(config, f"restored/{label}", str(tuned[label]), place, rates[label], found)
        for label, found in settings.items()
    }
    controls = {
        label: plan_run(config, f"control/{label}", str(initial), place, rates[label], found)
        for label, found in settings.items()
    }
    twins = shared_controls(controls, out)
    with held(out, "restoring"):
        maker.make(config.text, config.initial, text)
        rows = choose(config, initial, text, num_tokens, progress)
        require_room(TeacherCache(text).lengths()[rows], settings)
        write_rows(
            TeacherCache(text), rows, place, {"rank": config.rank, "seed": config.seed, "tokens": num_tokens}
        )
        runs = Runs(out, pool or LocalPool(), progress)
        wanted = [controls[label] for label in dict.fromkeys(twins.values())] + list(planned.values())
        for run in wanted:
            require_same(run, out)
        runs.complete(wanted, "restoring")
        report = measure(
            config, initial, tuned, settings, planned, controls, twins, runs, rates, limit, progress
        )
        atomic_write_json(out / REPORT_NAME, report.to_dict())
    return report


def rate_of(config: RestoreConfig, label: str, found: TrainConfig | None) -> float:
    """The restoring rate of one model.

    Raises:
        ConfigError: the model does not say how it was tuned, and no rate is given.
    """
    if config.learning_rate is not None:
        return config.learning_rate
    if found is None:
        raise ConfigError(
            f"without --lr the rate is {AUTO_FACTOR:g} times that of tuning, but {label} has no {RESOLVED_NAME} that "
            "says it; give --lr"
        )
    return AUTO_FACTOR * float(resolve_training(found)["learning_rate"])


def tokens_of(config: RestoreConfig, settings: Mapping[str, TrainConfig | None]) -> int:
    """How many tokens of text: those of one epoch of the (first) tuning text.

    Raises:
        ConfigError: nobody says.
    """
    if config.tokens is not None:
        return config.tokens
    for path in tuning_texts(config, settings).values():
        return TeacherCache(path).manifest.num_tokens
    raise ConfigError(
        "without --tokens it is one epoch of the tuning text, but no model's record names a cache that is there; give "
        "--tokens, or --memory CACHE"
    )


def tuning_texts(config: RestoreConfig, settings: Mapping[str, TrainConfig | None]) -> dict[str, str]:
    """Label -> cache of the text that a model was tuned on, where it is there."""
    found = {}
    for label, typed in settings.items():
        path = config.memory or (typed.cache if typed is not None else None)
        if path is None:
            continue
        try:
            TeacherCache(path)
        except AnnealError:
            if config.memory:
                raise
            continue
        found[label] = path
    return found


def plan_run(
    config: RestoreConfig, name: str, model: str, place: Path, rate: float, tuning: TrainConfig | None
) -> PlacedRun:
    """One epoch of plain fine-tuning on the restoring text, with the batch of the tuning run."""
    given = dict(tuning.training) if tuning is not None else {}
    others = {
        name
        for key in OF_ONE
        if config.training.get(key, given.get(key)) != given.get(key)
        for name in OF_ONE[key]
    }
    schedules = {word(which.get("lr_scheduler_type")) for which in (given, {**given, **config.training})}
    # A warm-up is of its schedule: one without takes none over, nor does one from a schedule without.
    if len(schedules) > 1 and not schedules.isdisjoint(NO_WARMUP):
        others.add("warmup_steps")
    training = {key: given[key] for key in KEPT_ARGUMENTS if given.get(key) is not None and key not in others}
    training |= {"seed": config.seed, "num_train_epochs": 1, "save_strategy": "no", **config.training}
    training["learning_rate"] = rate
    settings: dict[str, Any] = {
        "cache": str(place),
        "model": model,
        "kl_coef": 0.0,
        "save_dtype": "float32",
        "training": training,
        **({} if tuning is None else {key: getattr(tuning, key) for key in KEPT_SETTINGS}),
    }
    run = PlacedRun(name=name, settings=settings, varied={}, direct=True)
    with naming(name):
        resolve_training(run.config(Path(config.out)))
    return run


def require_room(lengths_N: np.ndarray, settings: Mapping[str, TrainConfig | None]) -> None:
    """Refuse rows that the packs of a tuning run do not hold.

    Args:
        lengths_N: int [rows], tokens of each row of the restoring text.

    Raises:
        ConfigError: naming the run.
    """
    for label, tuning in settings.items():
        if (
            tuning is not None
            and tuning.pack_length is not None
            and int(lengths_N.max()) > tuning.pack_length
        ):
            raise ConfigError(
                f"rows of --text must fit the packs of {label}'s tuning run (pack_length {tuning.pack_length}), got "
                f"one of {int(lengths_N.max())} tokens; cut it with --build max_length={tuning.pack_length}"
            )


def shared_controls(controls: Mapping[str, PlacedRun], out: Path) -> dict[str, str]:
    """Label -> label of the control that it is measured against: equal controls are trained once."""
    computed = {label: decisive(run, out) for label, run in controls.items()}
    return {
        label: next(other for other in controls if computed[other] == computed[label]) for label in controls
    }


def choose(config: RestoreConfig, initial: Path, text: str, num_tokens: int, progress: Progress) -> list[int]:
    """Row numbers of the restoring text."""
    cache = TeacherCache(text)
    lengths = cache.lengths()
    work = Path(config.out) / "evaluations"
    read = read_model("initial", initial, {"restoring text": text}, work, progress=progress)["restoring text"]
    ce, counts = (np.asarray(read[key], np.float64) for key in ("row_ce", "row_tokens"))
    if config.rank == "random":
        return drawn(counts, lengths, num_tokens, config.seed)
    return easiest(ce, counts, lengths, num_tokens)


def measure(
    config: RestoreConfig,
    initial: Path,
    tuned: Mapping[str, Path],
    settings: Mapping[str, TrainConfig | None],
    planned: Mapping[str, PlacedRun],
    controls: Mapping[str, PlacedRun],
    twins: Mapping[str, str],
    runs: Runs,
    rates: Mapping[str, float],
    limit: int | None,
    progress: Progress,
) -> RestoreReport:
    """Evaluate every model that is there."""
    out = Path(config.out)
    memory = tuning_texts(config, settings)

    def read(label: str, directory: Path) -> dict[str, Result]:
        try:
            return read_model(
                label, directory, config.source, out / "evaluations", limit=limit, progress=progress, kl=True
            )
        except (
            IdentityMismatchError
        ):  # texts of another model: their tokens are read, and nothing is said of `kept`
            return read_model(
                label, directory, config.source, out / "evaluations", limit=limit, progress=progress
            )

    def remembered(label: str, directory: Path, text: str | None) -> float | None:
        if text is None:
            return None
        found = read_model(label, directory, {"tuning text": text}, out / "evaluations", progress=progress)
        return float(found["tuning text"]["accuracy"])

    models = []
    for label, directory in tuned.items():
        twin = controls[twins[label]].directory(out)
        after = planned[label].directory(out)
        if not (is_finished(twin) and is_finished(after)):
            continue
        text = memory.get(label)
        models.append(
            Restored(
                label=label,
                directory=str(directory),
                tuned=read(label, directory),
                restored=read(f"{label} restored", after),
                control=read(f"control {twins[label]}", twin),
                memorised=remembered(label, directory, text),
                memorised_after=remembered(f"{label} restored", after, text),
            )
        )
    cache = TeacherCache(str(out / "text" / "rows"))
    base = read("initial", initial)
    first = next(iter(memory.values()), None)
    return RestoreReport(
        initial_label=short_name(config.initial),
        initial=base,
        models=models,
        memorised_by_initial=remembered("initial", initial, first),
        num_rows=len(cache),
        num_tokens=int(cache.lengths().sum()),
        learning_rates=rates,
        failed=dict(runs.failed),
    )
