"""What a chain is asked for: frozen, checked when it is made, from one YAML file or from options that mean the same."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from formats.errors import ConfigError
from formats.named_path import split_name
from trainer.checks import check_number, check_one_of, check_output, check_path
from trainer.config import TrainConfig
from trainer.config_file import apply_override, first_missing, mapping_of, read_config_file, refuse_unknown

ANCHORS = ("previous", "initial")
CONTROLS = ("direct", "multitask", "never-seen")
METRICS = ("ce", "accuracy")
OF_A_METHOD = ("kl_coef", "kl_budget", "l2", "ewc", "sfa")
MAPPINGS = ("tasks", "general", "method", "training", "base", "build")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
OF_THE_CHAIN = {
    "cache": "it is that of each task",
    "model": "every stage starts from the one before",
    "revision": "a chain starts from a directory or a hub name; download the revision first",
    "out": "the chain gives every stage its own directory",
    "eval_caches": "the chain evaluates every stage itself",
    "allow_different_student": "the stages of a chain are of one family",
}
"""Settings of `anneal train` that no part of a chain's file may set, and why."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of a chain.

    Raises:
        ConfigError: a field is missing or contradicts another one.
    """

    heldout: str
    """Held-out text of the task: a cache, or a corpus of which one is built."""
    train: str | None = None
    """What the stage learns: a cache, or a corpus."""
    model: str | None = None
    """Instead of `train`: the finished model of this stage, of any origin."""
    method: Mapping[str, Any] | None = None
    """Instead of the chain's method, for this stage."""

    def __post_init__(self) -> None:
        check_path("tasks.heldout", self.heldout, "a cache or corpus of held-out text")
        if (self.train is None) == (self.model is None):
            raise ConfigError(
                "a task needs train (what its stage learns) or model (a finished stage), and not both; "
                f"got train {self.train!r} and model {self.model!r}"
            )
        check_path("tasks.train", self.train or self.model, "a cache, a corpus or a model")


@dataclass(frozen=True, kw_only=True)
class ChainConfig:
    """One chain.

    Raises:
        ConfigError: a field is out of range or contradicts another one.
    """

    tasks: Mapping[str, Task]
    """Name -> task, in the order in which they are learnt."""
    out: str
    """Directory of the chain: stages/, controls/, caches/, logs/ and matrix.json."""
    model: str | None = None
    """The initial model."""
    general: Mapping[str, str] = field(default_factory=dict)
    """Name -> held-out text that no task is about: columns of their own."""
    method: Mapping[str, Any] = field(default_factory=dict)
    """How each stage holds on: settings of `anneal train`. Without `kl_coef` there is no KL; empty is direct
    fine-tuning, one task after another."""
    anchor: str = "previous"
    """What KL holds to: the model of the `previous` stage (a cache is built per stage, from a corpus), or the `initial`
    one. L2, EWC and SFA hold to the previous one."""
    replay: float = 0.0
    """Share of the mixture, by tokens, that is text of earlier tasks, in [0, 1): all of them alike."""
    compare: Sequence[str] = ()
    """Controls: `direct` (the chain without method and replay), `multitask` (all tasks at once), `never-seen` (a model
    without each task)."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """`transformers.TrainingArguments` of every run."""
    base: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of `anneal train` that all runs share, controls too."""
    build: Mapping[str, Any] = field(default_factory=dict)
    """Options of `anneal cache build` for corpora: engine, max_length, ..."""
    metric: str = "ce"
    """`ce`: nats; `accuracy`: share of tokens that are the most likely one."""

    def __post_init__(self) -> None:
        check_output("out", self.out, "the directory of the chain (--out)")
        if not self.tasks:
            raise ConfigError(
                "a chain needs tasks, got none; write `tasks: {NAME: {train: ..., heldout: ...}}`"
            )
        for name in [*self.tasks, *self.general]:
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise ConfigError(
                    f"the name of a task must be letters, digits, dots and dashes (40 at most), got {name!r}"
                )
        if both := set(self.tasks) & set(self.general):
            raise ConfigError(f"general must have other names than tasks, got {sorted(both)[0]!r} in both")
        for name, text in self.general.items():
            check_path(f"general.{name}", text, "a cache or corpus of held-out text")
        if self.finished not in (0, len(self.tasks)):
            raise ConfigError(
                "tasks must all be trained here (train) or all be finished models (model), got both kinds"
            )
        check_one_of("anchor", self.anchor, ANCHORS)
        check_one_of("metric", self.metric, METRICS)
        check_number("replay", self.replay)
        if not 0 <= self.replay < 1:
            raise ConfigError(
                f"replay must lie in [0, 1), got {self.replay:g}; 0.1 is a tenth of the mixture"
            )
        for control in self.compare:
            check_one_of("compare", control, CONTROLS)
        if "never-seen" in self.compare and len(self.tasks) < 2:
            raise ConfigError(
                "compare never-seen is a model without one of the tasks, got one task; remove it"
            )
        if self.finished:
            self._check_finished()
            return
        check_path("model", self.model, "the initial model (--model)")
        for where, settings in [
            ("base", self.base),
            ("method", self.method),
            *((f"tasks.{name}.method", task.method) for name, task in self.tasks.items()),
        ]:
            check_settings(where, settings)
        if self.anchor != "previous" and not any(self.method_of(task).get("kl_coef") for task in self.tasks):
            raise ConfigError(
                f"anchor is what KL holds to, got {self.anchor} and no method with kl_coef; add it, or remove anchor"
            )

    def _check_finished(self) -> None:
        given = {
            "method": self.method,
            "replay": self.replay,
            "compare": self.compare,
            "training": self.training,
            "base": self.base,
            "anchor": self.anchor if self.anchor != "previous" else None,
        }
        for name, value in given.items():
            if value:
                raise ConfigError(
                    f"{name} is for stages that are trained here, got finished models; remove it"
                )

    @property
    def finished(self) -> int:
        """How many tasks are finished models."""
        return sum(task.model is not None for task in self.tasks.values())

    def method_of(self, task: str) -> dict[str, Any]:
        """The method of a task's stage."""
        own = self.tasks[task].method
        return dict(self.method if own is None else own)


def check_settings(where: str, settings: Any) -> None:
    """Refuse what is no setting of `anneal train`, or one that is the chain's to set."""
    if settings is None:
        return
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{where} must map settings of anneal train to values, got {settings!r}")
    for name in settings:
        if name in OF_THE_CHAIN:
            raise ConfigError(f"{where} must not set {name}: {OF_THE_CHAIN[name]}; remove it")
        if where == "base" and name in ("training", *OF_A_METHOD):
            advice = (
                "it is a setting of the chain itself; move it up"
                if name == "training"
                else "put it into method"
            )
            raise ConfigError(f"base must not set {name}, of which controls are made too: {advice}")
    refuse_unknown(settings, [entry.name for entry in fields(TrainConfig)], f"{where}.")


def chain_from_dict(plain: Mapping[str, Any]) -> ChainConfig:
    """A ChainConfig from plain values, as in YAML.

    Raises:
        ConfigError: an unknown or missing key, or a value out of range.
    """
    refuse_unknown(plain, [entry.name for entry in fields(ChainConfig)])
    values = {key: value for key, value in plain.items() if value is not None}
    if (missing := first_missing(ChainConfig, values)) is not None:
        flag = "--task NAME=TRAIN,HELDOUT" if missing == "tasks" else f"--{missing}"
        raise ConfigError(f"a chain needs {missing}; give {flag} or `{missing}:` in the chain's file")
    values |= _mappings(values)
    if isinstance(values.get("compare"), str):
        values["compare"] = [values["compare"]]
    if not isinstance(values.get("compare", []), list | tuple):
        raise ConfigError(f"compare must be a list of {', '.join(CONTROLS)}, got {values['compare']!r}")
    values["tasks"] = {name: task_of(name, entry) for name, entry in values["tasks"].items()}
    return ChainConfig(**values)


def _mappings(plain: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What is given of `MAPPINGS`, as dicts; a `general` that is a text is called so."""
    given = {key: plain[key] for key in MAPPINGS if plain.get(key) is not None}
    if isinstance(given.get("general"), str):
        given["general"] = {"general": given["general"]}
    return {key: mapping_of(key, value) for key, value in given.items()}


def task_of(name: Any, plain: Any) -> Task:
    """One entry of `tasks`."""
    if not isinstance(plain, Mapping):
        raise ConfigError(f"tasks.{name} must be a mapping of train and heldout, got {plain!r}")
    refuse_unknown(plain, [entry.name for entry in fields(Task)], f"tasks.{name}.")
    if plain.get("heldout") is None:
        raise ConfigError(f"tasks.{name} needs heldout, a text that is not trained on; add it")
    try:
        return Task(**plain)
    except ConfigError as error:
        raise ConfigError(f"tasks.{name}: {error}") from None


def chain_from_options(
    file: str | Path | None,
    *,
    tasks: Iterable[str] = (),
    general: Iterable[str] = (),
    method: Iterable[str] = (),
    overrides: Iterable[str] = (),
    build: Iterable[str] = (),
    **values: Any,
) -> ChainConfig:
    """The chain that a command line asks for; options add to the file and win.

    Args:
        file: the chain's YAML file.
        tasks: `NAME=TRAIN,HELDOUT`.
        general: `NAME=TEXT`, or a text.
        method, overrides, build: `KEY=VALUE`: of `method`; of `training.` and `base`; of `build`.
        values: further fields of ChainConfig; None and empty are not given.

    Raises:
        ConfigError: an option is not of that form, or as `chain_from_dict`.
    """
    plain: dict[str, Any] = read_config_file(file) if file is not None else {}
    plain |= {key: {} for key in MAPPINGS} | _mappings(plain)
    typed: dict[str, str] = {}

    def once(name: str, word: str) -> None:
        if name in typed:
            raise ConfigError(
                f"texts must have different names, got {name!r} in {typed[name]} and {word}; rename one"
            )
        typed[name] = word

    for word in tasks:
        name, separator, texts = word.partition("=")
        train, comma, heldout = texts.partition(",")
        if not (separator and comma and name and train and heldout):
            raise ConfigError(f"--task takes NAME=TRAIN,HELDOUT, got {word!r}")
        once(name, word)
        plain["tasks"][name] = {"train": train, "heldout": heldout}
    for word in general:
        name, text = split_name(word)
        once(name or "general", word)
        plain["general"][name or "general"] = text
    for assignment in method:
        apply_override(plain["method"], assignment)
    for assignment in build:
        apply_override(plain["build"], assignment)
    for assignment in overrides:
        apply_override(plain if assignment.startswith("training.") else plain["base"], assignment)
    given = {key: value for key, value in values.items() if value not in (None, [], ())}
    return chain_from_dict({key: value for key, value in plain.items() if value not in ({}, None)} | given)
