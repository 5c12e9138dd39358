"""The runs of a sweep: entries, what is crossed with all of them and seeds in; settings and names out.

Everything is checked here, with the checks that `anneal train` makes, before anything runs.
"""

import copy
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from formats.cache import TeacherCache
from formats.errors import ConfigError, naming
from trainer.comparison.records import without_seed
from trainer.config import TrainConfig
from trainer.config_file import SECTIONS, config_from_dict
from trainer.data.mixture import amount_of, unit_weights
from trainer.objective import Objective
from trainer.recipe import DEFAULTS, resolve_training
from trainer.sweep.config import SweepConfig
from trainer.sweep.entries import RunEntry
from trainer.sweep.names import run_name

OF_KL = (
    "temperature",
    "tail_draws",
    *(
        entry.name
        for entry in fields(TrainConfig)
        if entry.name.startswith("kl_") and entry.name != "kl_coef"
    ),
)
"""Settings that do nothing where kl_coef is 0."""


WHERE = ("kl_budget", *(name for name in Objective.__dataclass_fields__ if name.startswith("kl_")))
"""Those that say where and how it acts, which `anneal train` refuses at kl_coef 0."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run: its name and the settings that `anneal train` would be given."""

    name: str
    settings: Mapping[str, Any]
    """As in YAML, without `out`."""
    varied: Mapping[str, Any]
    """Setting, with dots -> value: what the sweep put over the base, `training.seed` included."""
    direct: bool
    """Direct fine-tuning: the yardstick. What the base or `every` sets, adapters for instance, is part of it."""
    entry: str | None = None
    """Name of its entry."""
    crossed: tuple[tuple[str, str], ...] = ()
    """What it shares with the direct run that it is measured against: everything varied but its method and seed."""

    def config(self, out: Path) -> TrainConfig:
        """The run of this name in a sweep's directory."""
        return config_from_dict({**copy.deepcopy(dict(self.settings)), "out": str(self.directory(out))})

    def directory(self, out: Path) -> Path:
        """Where the run is."""
        return out / "runs" / self.name

    @property
    def seedless(self) -> str:
        """The name that it shares with the runs of other seeds."""
        return without_seed(self.name)


def plan_runs(config: SweepConfig) -> list[PlannedRun]:
    """Every run once, direct fine-tuning first.

    Raises:
        ConfigError: a setting or value that `anneal train` refuses; the message names the run. Two runs of one name. A
            search beside `kl_budget`.
    """
    if config.search and (config.base.get("kl_budget") is not None or "kl_budget" in config.every):
        raise ConfigError(
            "a search is for the kl_coef of a whole run, got kl_budget, which moves it; remove kl_budget or --search"
        )
    refuse_idle_every(config)
    direct = RunEntry(settings={"kl_coef": (0.0,)})
    found: dict[str, PlannedRun] = {}
    seen: set[str] = set()
    for entry in [direct, *entries_of(config)]:
        refuse_idle(entry)
        for varied in combinations(config, entry):
            run = make_run(config, varied, entry.name)
            key = content_of(run)
            if key in seen:
                continue
            seen.add(key)
            if run.name in found:
                raise ConfigError(
                    f"runs must have different names, got {run.name} twice with different settings; "
                    "give one of their entries a name"
                )
            found[run.name] = run
    return list(found.values())


def entries_of(config: SweepConfig) -> list[RunEntry]:
    """The entries of a sweep, and before them the base as a run of its own where it has a `kl_coef` that nothing else
    takes up: an ordinary settings file of `anneal train` is a base too.
    """
    crossed, common = config.every.get("kl_coef", ()), config.base.get("kl_coef", 0)
    entries = list(config.runs)
    if config.search or any("kl_coef" in entry.settings for entry in entries) or (crossed and entries):
        return entries
    values = crossed or ((common,) if common else ())
    return [RunEntry(settings={"kl_coef": tuple(values)}), *entries] if values else entries


def combinations(config: SweepConfig, entry: RunEntry) -> Iterator[dict[str, Any]]:
    """The product of an entry's values, of what is crossed with every run, and of the seeds."""
    axes: dict[str, tuple[Any, ...]] = {"kl_coef": (0.0,)}
    axes |= {k: v for k, v in config.every.items() if k not in entry.settings}
    axes |= entry.settings
    axes["training.seed"] = config.seed_list
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def kl_settings(config: SweepConfig) -> list[dict[str, Any]]:
    """The product of the values in `every` of settings of the KL term, which direct fine-tuning has not."""
    axes = {key: values for key, values in config.every.items() if key in OF_KL}
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def refuse_idle(entry: RunEntry) -> None:
    """Refuse an entry that sets a setting of the KL term and has none."""
    for name in OF_KL:
        if name in entry.settings and "kl_coef" not in entry.settings:
            raise ConfigError(
                f"{name} acts on the KL term, and an entry without kl_coef has none; add kl_coef to the entry"
            )


def refuse_idle_every(config: SweepConfig) -> None:
    """Refuse what is crossed with every run and reaches none: all set it themselves, or none has the KL term that it
    acts on. A search has one.
    """
    entries = entries_of(config)
    with_kl = config.search or any(any(entry.settings.get("kl_coef", ())) for entry in entries)
    with_kl = with_kl or any(config.every.get("kl_coef", ()))
    for key in config.every:
        if key in OF_KL and not with_kl:
            raise ConfigError(
                f"every {key} would have no effect: it acts on the KL term, and no run has one; add runs with kl_coef "
                "(--grid kl_coef=1,4)"
            )
        # The one entry of a sweep without others takes the values of kl_coef that are crossed.
        reached = (
            not config.runs and not config.search if key == "kl_coef" else key not in OF_KL or config.search
        )
        if not reached and all(key in entry.settings for entry in entries):
            raise ConfigError(
                f"every {key} would have no effect: each run has a value of its own; keep one of them"
            )


def make_run(config: SweepConfig, varied: Mapping[str, Any], entry: str | None = None) -> PlannedRun:
    """The run with these settings over the base.

    Raises:
        ConfigError: `anneal train` refuses them.
    """
    varied = dict(varied)
    settings = copy.deepcopy(dict(config.base))
    if varied["kl_coef"] == 0:
        varied = {key: value for key, value in varied.items() if key not in OF_KL}
        idle = {key: settings.pop(key) for key in WHERE if key in settings}
        config_from_dict({"cache": "-", "model": "-", "out": "-", **idle})  # left out here, but not unchecked
    others = config.search or any(any(entry.settings.get("kl_coef", ())) for entry in entries_of(config))
    if varied["kl_coef"] == 0 and others:
        without_kl(settings)
    for name, value in varied.items():
        section, _, rest = name.partition(".")
        if rest:
            settings[section] = dict(settings.get(section) or {}) | {rest: copy.deepcopy(value)}
        else:
            settings[name] = copy.deepcopy(value)
    common = {
        key: value
        for key, value in varied.items()
        if key != "training.seed" and (key in config.every or key.startswith("training."))
    }
    direct = varied["kl_coef"] == 0 and not any(is_method(k, v) for k, v in varied.items() if k not in common)
    name = run_name(shown_of(config, varied), prefix=entry, direct=direct)
    run = PlannedRun(
        name=name,
        settings=settings,
        varied=varied,
        direct=direct,
        entry=entry,
        crossed=tuple(
            sorted((key, json.dumps(value, sort_keys=True, default=str)) for key, value in common.items())
        ),
    )
    with naming(f"run {name}"):
        resolve_training(run.config(Path(config.out)))
    return run


def is_method(setting: str, value: Any) -> bool:
    """Whether a setting makes a run something else than direct fine-tuning."""
    if setting in Objective.__dataclass_fields__:
        return bool(value != Objective.__dataclass_fields__[setting].default)
    return setting.split(".")[0] in (*SECTIONS, "caches", "freeze")


def without_kl(settings: dict[str, Any]) -> None:
    """Leave text that is only retained out of a base that other runs retain, in place, for direct fine-tuning."""
    caches = settings.get("caches")
    if isinstance(caches, list):
        settings["caches"] = [c for c in caches if not (isinstance(c, Mapping) and c.get("loss") == "kl")]


def shown_of(config: SweepConfig, varied: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a run's name shows: those that it does not have in common with the base."""
    shown = {}
    training = {**DEFAULTS, **(config.base.get("training") or {})}
    for name, value in varied.items():
        section, _, rest = name.partition(".")
        if name == "kl_coef":
            common: Any = 0.0
        elif section == "training":
            common = training.get(rest)
        elif section in SECTIONS:
            common = None
        else:
            common = config.base.get(name, getattr(TrainConfig, name, None))
        if value != common:
            shown[name] = value
    return shown


def content_of(run: PlannedRun) -> str:
    """What a run computes, as text: equal for equal runs, 1 and 1.0 being one number."""

    def plain(value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, Mapping):
            return {str(key): plain(entry) for key, entry in value.items()}
        return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value

    settings = run.config(Path("unused")).to_dict()
    training = {**DEFAULTS, **settings.pop("training")}
    settings.pop("out")
    return json.dumps(plain(settings | {"training": training}), sort_keys=True, default=str)


# --- how much work it is -----------------------------------------------------------------------------------


def estimated_tokens(run: PlannedRun) -> int:
    """Tokens that a run trains on, about: from the sizes of its caches, epochs or steps, and batches."""
    config = run.config(Path("unused"))
    training = {**DEFAULTS, **{key: value for key, value in config.training.items() if value is not None}}
    rows, tokens = _size(config.cache)
    per_row, weight = tokens / max(rows, 1), 1.0
    epoch_tokens = float(tokens)
    if rows:
        sizes = [(rows, tokens), *(_size(mixed.path) for mixed in config.caches)]
        amounts = [amount_of(mixed.share, mixed.weight) for mixed in config.caches]
        num_units, num_tokens = [max(size[0], 1) for size in sizes], [size[1] for size in sizes]
        weights = unit_weights([1.0, *amounts], num_units, num_tokens)
        weight = sum(weights)
        epoch_tokens = sum(w * rows * t / n for w, n, t in zip(weights, num_units, num_tokens, strict=True))
    max_steps = int(training.get("max_steps") or -1)
    if max_steps < 1:
        return round(epoch_tokens * float(training["num_train_epochs"]))
    rows_per_step = int(training["per_device_train_batch_size"]) * int(
        training["gradient_accumulation_steps"]
    )
    if config.packing:
        length = config.pack_length or int(TeacherCache(config.cache).lengths().max())
        return max_steps * rows_per_step * length
    return round(max_steps * rows_per_step * (epoch_tokens / (rows * weight) if rows else per_row))


def _size(path: str) -> tuple[int, int]:
    """(rows, tokens) of a cache."""
    manifest = TeacherCache(path).manifest
    return manifest.num_rows, manifest.num_tokens
