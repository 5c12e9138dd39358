"""The runs of a chain and of its controls: tasks, method and anchor in; settings, places and the caches they need out.

stages/K-TASK            the chain itself
controls/direct/K-TASK   without method and replay; a stage that would be the same run is not made twice
controls/multitask       all tasks at once, from the initial model
controls/without-TASK    all tasks but one at once

Every one is an ordinary run directory, the same as `anneal train` makes with these settings.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from formats.errors import ConfigError, naming
from trainer.chain.caches import CacheMaker
from trainer.chain.config import ChainConfig
from trainer.config_file import mapping_of
from trainer.data.label_terms import reads_initial
from trainer.data.packing import best_fit, capacity_of
from trainer.recipe import resolve_training
from trainer.sweep.plan import PlannedRun


@dataclass(frozen=True, kw_only=True)
class Need:
    """A cache that a run reads."""

    place: str
    """Where it is, or will be."""
    text: str
    """The cache itself, or the corpus of which it is built."""
    model: str
    """What builds it."""
    after: str | None = None
    """Name of the stage that builds it; None for the initial model."""


@dataclass(frozen=True, kw_only=True)
class PlacedRun(PlannedRun):
    """A run whose name is its place below the directory of what asked for it."""

    def directory(self, out: Path) -> Path:
        """Where the run is."""
        return out / self.name


@dataclass(frozen=True, kw_only=True)
class Stage(PlacedRun):
    """One run of a chain."""

    task: str
    needs: Sequence[Need]
    """The caches that must be there before it starts."""
    after: str | None = None
    """Name of the stage from which it starts; None for the initial model."""


def plan_stages(config: ChainConfig, maker: CacheMaker) -> list[Stage]:
    """The chain itself, in order.

    Raises:
        ConfigError: `anneal train` refuses the settings of a stage, or KL to the previous stage has no corpus to build
            a cache of.
    """
    return _sequence(
        config, maker, "stages", {name: config.method_of(name) for name in config.tasks}, config.replay
    )


def plan_direct(config: ChainConfig, maker: CacheMaker, stages: Sequence[Stage]) -> list[Stage]:
    """The control `direct`: the chain's own stages as long as they are the same runs, then others. Of a cache only the
    tokens count here, so it takes those of the chain.
    """
    return _sequence(
        config, maker, "controls/direct", {name: {} for name in config.tasks}, 0.0, shared=stages
    )


def _sequence(
    config: ChainConfig,
    maker: CacheMaker,
    folder: str,
    methods: Mapping[str, Mapping[str, Any]],
    replay: float,
    shared: Sequence[Stage] = (),
) -> list[Stage]:
    found: list[Stage] = []
    for number, task in enumerate(config.tasks):
        before = found[-1] if found else None
        made = shared[number].needs[0] if shared else None
        name = f"{folder}/{number + 1}-{task}"
        stage = _stage(config, maker, name, methods[task], before, found, replay, made)
        if shared and all(earlier.name.startswith("stages/") for earlier in found):
            twin = shared[number]
            if _settings(twin) == _settings(stage):
                stage = twin
        if stage.name.startswith("controls/"):
            _require_readable(config, stage)
        found.append(stage)
    return found


def _settings(stage: Stage) -> dict[str, Any]:
    return stage.config(Path("unused")).to_dict() | {"out": ""}


def _stage(
    config: ChainConfig,
    maker: CacheMaker,
    name: str,
    method: Mapping[str, Any],
    before: Stage | None,
    earlier: Sequence[Stage],
    replay: float,
    made: Need | None,
) -> Stage:
    task = name.rsplit("/", 1)[-1].partition("-")[2]
    out, model = Path(config.out), str(config.model)
    start = model if before is None else str(before.directory(out))
    settings, own = _shared(config), copy.deepcopy(dict(method))
    if "training" in own:
        own["training"] = settings["training"] | mapping_of("method.training", own["training"] or {})
    settings |= own
    builder = _builder(config, settings, before)
    need = made if made is not None and builder is None else train_need(config, maker, task, builder)
    settings |= {"cache": need.place, "model": start}
    replayed = [
        {"path": stage.settings["cache"], "share": replay / len(earlier), "loss": "ce"}
        for stage in earlier
        if replay
    ]
    if replayed:
        settings["caches"] = [*(settings.get("caches") or []), *replayed]
    _fill_ewc(settings, earlier, out)
    stage = Stage(
        name=name,
        settings=settings,
        varied={},
        direct=not method,
        task=task,
        needs=[need],
        after=None if before is None else before.name,
    )
    return checked(stage, out)


def _shared(config: ChainConfig) -> dict[str, Any]:
    """What all runs have in common. Saved in float32: the next stage starts from exactly where this one ended."""
    found = {"kl_coef": 0.0, "save_dtype": "float32", **copy.deepcopy(dict(config.base))}
    return found | {"training": copy.deepcopy(dict(config.training))}


def _builder(config: ChainConfig, settings: Mapping[str, Any], before: Stage | None) -> Stage | None:
    """The stage whose model builds the cache; None for the initial model."""
    return before if settings.get("kl_coef") and config.anchor == "previous" else None


def train_need(config: ChainConfig, maker: CacheMaker, task: str, builder: Stage | None = None) -> Need:
    """The cache of a task's training text.

    Raises:
        ConfigError: it would have to be built by a stage, and there is a finished one instead of a corpus.
    """
    text, what = str(config.tasks[task].train), f"tasks.{task}.train"
    by = "" if builder is None else builder.name.rsplit("/", 1)[-1]
    place = maker.place(task, text, by)
    maker.check(text, what, place)
    if builder is None:
        return Need(place=place, text=text, model=str(config.model))
    if place == text:
        raise ConfigError(
            f"KL to the previous stage needs a cache that this stage builds, so {what} must be a corpus, got the "
            f"finished cache {text}; name the corpus, or hold to the initial model (anchor: initial)"
        )
    model = str(builder.directory(Path(config.out)))
    return Need(place=place, text=text, model=model, after=builder.name)


def heldout_needs(config: ChainConfig, maker: CacheMaker) -> dict[str, Need]:
    """Name of a column -> the cache of its held-out text, tasks first."""
    texts = {name: (task.heldout, f"tasks.{name}.heldout") for name, task in config.tasks.items()}
    texts |= {name: (text, f"general.{name}") for name, text in config.general.items()}
    found = {}
    for name, (text, what) in texts.items():
        place = maker.place(f"{name}-heldout", text)
        maker.check(text, what, place)
        found[name] = Need(place=place, text=text, model=str(config.model))
    return found


def _fill_ewc(settings: dict[str, Any], earlier: Sequence[Stage], out: Path) -> None:
    """EWC that names no text holds to every earlier task: one penalty each, around that stage's weights (Kirkpatrick et
    al. 2017). The first stage then has none.
    """
    ewc = settings.get("ewc")
    if not isinstance(ewc, Mapping) or ewc.get("cache") is not None:
        return
    settings["ewc"] = [
        {**ewc, "cache": stage.settings["cache"], "model": str(stage.directory(out))} for stage in earlier
    ] or None


def checked(stage: Stage, out: Path) -> Stage:
    """The stage, when `anneal train` takes its settings.

    Raises:
        ConfigError: it does not, or the stage would leave adapters alone.
    """
    with naming(stage.name):
        config = stage.config(out)
        resolve_training(config)
    if config.lora is not None and not config.lora.merge:
        raise ConfigError(
            f"{stage.name}: a stage starts from a whole model, got lora.merge: false; remove it"
        )
    return stage


def _require_readable(config: ChainConfig, control: Stage) -> None:
    """Refuse a weight that would be read from a cache whose teacher is a stage, of which a control knows nothing.

    Raises:
        ConfigError: naming the weight.
    """
    typed = control.config(Path(config.out))
    for number, need in enumerate(control.needs):
        if need.after is not None and reads_initial(typed.weighting, target=number == 0):
            raise ConfigError(
                f"{control.name}: ce_weight {typed.ce_weight} reads the cache's teacher, which is {need.after} and no "
                "model of this control; use anchor: initial, or leave the control out of compare"
            )


def plan_mixture(
    config: ChainConfig,
    stages: Sequence[Stage],
    tasks: Sequence[str],
    name: str,
    lengths: Callable[[str], np.ndarray] | None,
) -> Stage:
    """Direct fine-tuning of the initial model on several tasks at once: every row of all of them once per epoch, also
    packed, and as many steps as the chain takes for them where steps are given.

    Args:
        stages: those of the chain, whose caches are taken: only their tokens count.
        tasks: which, in order.
        name: of the run.
        lengths: place of a cache -> int [rows], tokens of each; None before they are known, for checks alone.
    """
    needs = [next(stage.needs[0] for stage in stages if stage.task == task) for task in tasks]
    settings = _shared(config)
    first, *others = zip(tasks, needs, strict=True)
    settings |= {"kl_coef": 0.0, "cache": first[1].place, "model": str(config.model)}
    mixed = [*(settings.get("caches") or [])]
    weights = [1.0] * len(others)
    if lengths is not None:
        others_of = [lengths(str(entry["path"])) for entry in mixed]
        counts = _num_units([lengths(need.place) for need in needs], settings, others_of)
        weights = [count / counts[0] for count in counts[1:]]
    settings["caches"] = [
        *mixed,
        *(
            {"path": need.place, "weight": weight, "loss": "ce"}
            for (_, need), weight in zip(others, weights, strict=True)
        ),
    ]
    steps = settings["training"].get("max_steps")
    if isinstance(steps, int) and steps > 0:
        settings["training"]["max_steps"] = steps * len(tasks)
    stage = Stage(name=name, settings=settings, varied={}, direct=True, task="+".join(tasks), needs=needs)
    _require_readable(config, stage)
    return checked(stage, Path(config.out))


def _num_units(
    lengths_of: Sequence[np.ndarray], settings: Mapping[str, Any], others_of: Sequence[np.ndarray]
) -> list[int]:
    """Units of each cache in a run with these settings: rows, or the packs that its Trainer makes of them.

    Args:
        lengths_of: of each cache int [rows], tokens of each row.
        others_of: the same of the other caches of the run, which set the length of a pack too.
    """
    if not settings.get("packing"):
        return [len(lengths_N) for lengths_N in lengths_of]
    capacity = capacity_of([*lengths_of, *others_of], settings.get("pack_length"))
    return [len(best_fit(lengths_N, capacity)) for lengths_N in lengths_of]


def mixtures(config: ChainConfig) -> dict[str, list[str]]:
    """Name of a run -> its tasks, for the controls that are asked for."""
    tasks = list(config.tasks)
    found = {"controls/multitask": tasks} if "multitask" in config.compare else {}
    if "never-seen" in config.compare and len(tasks) > 1:
        found |= {f"controls/without-{task}": [t for t in tasks if t != task] for task in tasks}
    return found
