"""What a sweep is asked for: frozen, checked when it is made, from one YAML file or from options that mean the same.

base:    settings of `anneal train` that all runs share (cache, model, training, ...)
runs:    entries; each maps settings to a value or a list of values, whose product it stands for
every:   settings crossed with every run, direct fine-tuning included
merges:  merges of finished runs
seeds:   how many, or which
source:  name -> held-out text (a cache) or task that the initial model knew
target:  name -> held-out text or task that the runs learn
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from formats.errors import ConfigError
from trainer.bench.settings import BenchSettings
from trainer.checks import (
    check_at_least,
    check_flag,
    check_fraction,
    check_label,
    check_number,
    check_one_of,
    check_output,
    check_path,
)
from trainer.config import DTYPES, TrainConfig
from trainer.config_file import (
    SECTIONS,
    add_retained,
    apply_override,
    first_missing,
    mapping_of,
    put_over,
    read_config_file,
    refuse_unknown,
)
from trainer.merging.settings import DEFAULTS
from trainer.plain_yaml import parse_yaml
from trainer.sweep.entries import MergeEntry, RunEntry, Values

NESTED = ("training", *SECTIONS)
"""Settings that hold settings."""
LISTS = ("caches", "ewc", "freeze", "lora.target_modules", "training.report_to")
"""Settings whose value may be a list itself: only a list of lists is several values of them."""
OF_THE_SWEEP = {
    "out": "the sweep gives every run its own directory",
    "model": "all runs of a sweep start from base.model",
    "revision": "all runs of a sweep start from base.revision",
    "training.seed": "use seeds (--seeds)",
    "training.output_dir": "the sweep gives every run its own directory",
}
"""Settings that no entry may set, and why."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """One sweep. Direct fine-tuning (kl_coef 0) is always part of it.

    Raises:
        ConfigError: a field is out of range or contradicts another one.
    """

    base: Mapping[str, Any]
    """Settings of `anneal train` that all runs share, nested as in YAML; without `out`."""
    out: str
    """Directory of the sweep: runs/, merges/, logs/ and sweep.json."""
    source: Mapping[str, str]
    """Name -> cache or task of what is to be kept."""
    target: Mapping[str, str]
    """Name -> cache or task of what is to be learnt."""
    runs: Sequence[RunEntry] = ()
    every: Mapping[str, Values] = field(default_factory=dict)
    """Setting -> values, crossed with every run whose entry does not set it."""
    merges: Sequence[MergeEntry] = ()
    seeds: int | Sequence[int] = 1
    """How many, counted from base.training.seed; or the seeds themselves."""
    keep_gain: float = 0.9
    """The share of direct fine-tuning's gain that a recommended run must keep, in (0, 1]."""
    bench: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `anneal bench` for sources and targets that are tasks: task_dirs, limit, backend, ..."""
    eval_dtype: str = "float32"
    """Of the weights while the models are evaluated on texts; bfloat16 is several times faster on a GPU."""
    search: bool = False
    """Look for the largest kl_coef that keeps it."""
    search_runs: int = 8
    """Most values of kl_coef that the search tries."""

    def __post_init__(self) -> None:
        check_output("out", self.out, "the directory of the sweep (--out)")
        for name in ("source", "target"):
            texts = getattr(self, name)
            if not isinstance(texts, Mapping) or not texts:
                raise ConfigError(
                    f"{name} must name at least one cache or task, got {texts!r}; write --{name} NAME=CACHE"
                )
            for key, value in texts.items():
                check_label(name, key)
                check_path(f"{name}.{key}", value, "a cache directory or a task")
        if not isinstance(self.bench, Mapping) or "out" in self.bench:
            raise ConfigError(f"bench must hold settings of anneal bench but out, got {self.bench!r}")
        refuse_unknown(self.bench, [entry.name for entry in fields(BenchSettings)], "bench.")
        for key in ("out", "output_dir"):
            if key in self.base or key in mapping_of("base.training", self.base.get("training") or {}):
                raise ConfigError(f"base must not set {key}: {OF_THE_SWEEP['out']}; remove it")
        common = {**self.base, **{key.split(".")[0]: values for key, values in self.every.items()}}
        for key in ("l2", "ewc", "sfa"):
            if common.get(key) is not None:
                what = f"base and every must not set {key}, since direct fine-tuning is made from them too"
                raise ConfigError(f"{what}; put it into an entry of runs (--also)")
        if isinstance(self.seeds, int) and not isinstance(self.seeds, bool):
            check_at_least("seeds", self.seeds, 1, "2 runs everything twice", integer=True)
        elif not isinstance(self.seeds, list | tuple) or not self.seeds:
            raise ConfigError(f"seeds must be a number of seeds or a list of them, got {self.seeds!r}")
        else:
            for seed in self.seeds:
                check_at_least("seeds", seed, 0, "seeds count from 0", integer=True)
            if len(set(self.seeds)) < len(self.seeds):
                raise ConfigError(f"seeds must differ, got {list(self.seeds)}")
            object.__setattr__(self, "seeds", tuple(self.seeds))
        check_fraction("keep_gain", self.keep_gain, "0.9 keeps nine tenths of direct fine-tuning's gain")
        check_one_of("eval_dtype", self.eval_dtype, DTYPES)
        check_flag("search", self.search)
        check_at_least("search_runs", self.search_runs, 2, "five are usual", integer=True)

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds themselves."""
        if isinstance(self.seeds, int):
            first = (self.base.get("training") or {}).get("seed", 0)
            check_number("base.training.seed", first, integer=True)
            return tuple(range(first, first + self.seeds))
        return tuple(self.seeds)


# --- from plain values -------------------------------------------------------------------------------------


def flatten(settings: Any, where: str) -> dict[str, Values]:
    """Settings with dots -> their values, from a mapping nested as in YAML, or written with dots, or both.

    Raises:
        ConfigError: not a mapping, an unknown setting, one given twice, an empty list, one of the sweep's own.
    """
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{where} must map settings to values, got {settings!r}")
    found: dict[str, Values] = {}
    for key, value in settings.items():
        if key == "ewc" and isinstance(value, list | tuple):
            pairs = [(key, value)]
        elif key in NESTED:
            if not isinstance(value, Mapping) or not value:
                raise ConfigError(
                    f"{where}: {key} must hold settings, got {value!r}; write {key}.NAME: VALUES"
                )
            pairs = [(f"{key}.{name}", entry) for name, entry in value.items()]
        else:
            pairs = [(str(key), value)]
        for name, entry in pairs:
            check_setting(name, where)
            if name in found:
                raise ConfigError(f"{where} sets {name} twice; give all its values at once")
            found[name] = values_of(name, entry, where)
    return found


def check_setting(name: str, where: str) -> None:
    """Refuse what is no setting of `anneal train`, or one that is the sweep's to set."""
    if name in OF_THE_SWEEP:
        raise ConfigError(f"{where} must not set {name}: {OF_THE_SWEEP[name]}")
    section, _, rest = name.partition(".")
    if name == "ewc":  # a list of tasks; `ewc.coef` is of the one task
        return
    if section in SECTIONS:
        refuse_unknown([rest], [entry.name for entry in fields(SECTIONS[section])], f"{section}.")
    elif section != "training" or not rest:
        refuse_unknown([name], [entry.name for entry in fields(TrainConfig)])


def values_of(name: str, value: Any, where: str) -> Values:
    """The values of one setting: those of a list, or the one value."""
    listed = isinstance(value, list | tuple)
    if listed and name in LISTS and value and not any(isinstance(entry, list | tuple) for entry in value):
        return (list(value),)
    values = tuple(value) if listed else (value,)
    if not values:
        raise ConfigError(f"{where}: {name} must have at least one value, got an empty list")
    return values


def sweep_from_dict(plain: Mapping[str, Any]) -> SweepConfig:
    """A SweepConfig from plain values, as in YAML.

    Raises:
        ConfigError: an unknown or missing key, or a value out of range.
    """
    refuse_unknown(plain, [entry.name for entry in fields(SweepConfig)])
    values = {key: value for key, value in plain.items() if value is not None}
    if (missing := first_missing(SweepConfig, values)) is not None:
        flag = "CACHE and --model" if missing == "base" else f"--{missing}"
        raise ConfigError(f"a sweep needs {missing}; give {flag} or `{missing}:` in the sweep's file")
    if "search_runs" in values and not values.get("search"):
        raise ConfigError(
            f"search_runs (--search-runs) needs search: true (--search), got {values['search_runs']!r}; remove it"
        )
    values["base"] = mapping_of("base", values["base"])
    values["runs"] = [_run_entry(entry) for entry in _list("runs", values.get("runs", []))]
    values["merges"] = [_merge_entry(entry) for entry in _list("merges", values.get("merges", []))]
    values["every"] = flatten(values["every"], "every") if values.get("every") else {}
    return SweepConfig(**values)


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name} must be a list, got {value!r}")
    return list(value)


def _run_entry(plain: Any) -> RunEntry:
    if not isinstance(plain, Mapping):
        raise ConfigError(f"an entry of runs must map settings to values, got {plain!r}")
    name = plain.get("name")
    where = f"the entry {name} of runs" if name else "an entry of runs"
    return RunEntry(name=name, settings=flatten({k: v for k, v in plain.items() if k != "name"}, where))


def _merge_entry(plain: Any) -> MergeEntry:
    if not isinstance(plain, Mapping) or "method" not in plain:
        raise ConfigError(f"an entry of merges must have a method, got {plain!r}")
    values = dict(plain)
    method, of = values.pop("method"), values.pop("of", "direct")
    check_one_of("merges.method", method, tuple(DEFAULTS))
    if "values" in values:
        first = next(iter(DEFAULTS[method]))
        if first in values:
            raise ConfigError(f"merges.{method}.values are those of {first}, which is given too; keep one")
        values[first] = values.pop("values")
    strengths = {name: values_of(name, value, f"merges.{method}") for name, value in values.items()}
    return MergeEntry(method=method, strengths=strengths, of=of)


# --- from options ------------------------------------------------------------------------------------------


def sweep_from_options(
    place: str | None,
    *,
    base_file: Path | None = None,
    model: str | None = None,
    overrides: Iterable[str] = (),
    retain: Iterable[str] = (),
    grid: Iterable[str] = (),
    also: Iterable[str] = (),
    every: Iterable[str] = (),
    merge: Iterable[str] = (),
    merge_of: Sequence[str] = (),
    bench: Iterable[str] = (),
    seeds: str | None = None,
    **values: Any,
) -> SweepConfig:
    """The sweep that a command line asks for.

    Args:
        place: a cache, or a sweep's YAML file, to which the options add.
        base_file: ordinary settings of `anneal train` (--config).
        model, overrides, retain: settings of the base, as in `load_config`.
        grid: `KEY=V1,V2`, crossed with each other; they make one entry of runs.
        also: `KEY=V1,V2 [KEY=...]`, an entry each.
        every: `KEY=V1,V2`.
        merge: `METHOD:V1,V2` or `METHOD:STRENGTH=V1,V2[:STRENGTH=...]`.
        merge_of: what they merge.
        bench: `KEY=VALUE`, settings of `anneal bench`.
        seeds: a number.
        values: further fields of SweepConfig; None is not given.

    Raises:
        ConfigError: an option is not of that form, or as `sweep_from_dict`.
    """
    plain: dict[str, Any] = {}
    if place is not None and place.endswith((".yaml", ".yml")):
        plain = read_config_file(place)
    elif place is not None:
        plain["base"] = {"cache": place}
    for key in ("base", "every", "bench"):
        plain[key] = {} if plain.get(key) is None else mapping_of(key, plain[key])
    if base_file is not None:
        plain["base"] = put_over(read_config_file(base_file), plain["base"])
    if model is not None:
        plain["base"]["model"] = model
    for assignment in overrides:
        apply_override(plain["base"], assignment)
    add_retained(plain["base"], retain)
    for assignment in bench:
        apply_override(plain["bench"], assignment)
    entries = [*_list("runs", plain.get("runs") or [])]
    if crossed := _assignments(grid, "--grid"):
        kl_coef = plain["base"].get("kl_coef", TrainConfig.kl_coef)
        entries.append({"kl_coef": kl_coef, **crossed})
    entries += [_assignments(_words(text), "--also") for text in also]
    plain["runs"] = entries
    plain["every"] |= _assignments(every, "--every")
    merges = [_merge_option(text, merge_of) for text in merge]
    plain["merges"] = [*_list("merges", plain.get("merges") or []), *merges]
    if seeds is not None:
        plain["seeds"] = parse_yaml(seeds, "--seeds")
    for side in ("source", "target"):  # beside those of the file
        if side in values and plain.get(side) is not None:
            values[side] = {**mapping_of(side, plain[side]), **(values[side] or {})}
    given = {key: value for key, value in values.items() if value not in (None, {})}
    return sweep_from_dict(plain | given)


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--also takes KEY=V1,V2, got {text!r}: {error}") from None


def _assignments(texts: Iterable[str], option: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for text in texts:
        key, values = _assignment(text, option)
        if key in found:
            raise ConfigError(
                f"{option} must name a setting once, got {key} twice; write {option} {key}=V1,V2"
            )
        found[key] = values
    return found


def _assignment(text: str, option: str) -> tuple[str, list[Any]]:
    key, separator, values = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"{option} takes KEY=V1,V2, got {text!r}; for example {option} kl_coef=0.5,1,2")
    found = parse_yaml(f"[{values}]", f"the values of {option} {key.strip()}")
    if not found or any(value is None for value in found):
        raise ConfigError(f"{option} {key.strip()} needs values, got {values!r}; for example 0.5,1,2")
    return key.strip(), found


def _merge_option(text: str, of: Sequence[str]) -> dict[str, Any]:
    method, _, rest = text.partition(":")
    check_one_of("--merge", method, tuple(DEFAULTS))
    found: dict[str, Any] = {"method": method, "of": list(of) or "direct"}
    if list(of) in (["direct"], ["all"]):
        found["of"] = of[0]
    for part in filter(None, rest.split(":")):
        first = next(iter(DEFAULTS[method]))
        key, values = _assignment(part if "=" in part else f"{first}={part}", "--merge")
        if key in found:
            raise ConfigError(f"--merge {method} must name {key} once, got it twice")
        found[key] = values
    return found
