"""Settings from three places, the later winning: a YAML file, the command line's flags, `--set key=value`.

Unknown keys are errors that name the nearest right one. Values of `--set` are read as YAML, so `true`, `3`
and `[q_proj, v_proj]` mean what they look like, and so does `1e-5`, which YAML 1.1 would read as a string.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from formats.disk.durable import atomic_write_bytes
from formats.errors import ConfigError
from trainer.config import LoraSettings, MixedCache, TrainConfig
from trainer.plain_yaml import parse_yaml, yaml_text
from trainer.preflight.arguments import ARGUMENTS
from trainer.retention.settings import EwcSettings, L2Settings, SfaSettings

RESOLVED_NAME = "anneal.yaml"
RETAINED_WEIGHT = 0.25
"""Rows of a text to retain per row of the new one, as in docs/results.md and arXiv 2605.26097 (32 beside 128)."""
SECTIONS: Mapping[str, Any] = {"lora": LoraSettings, "l2": L2Settings, "ewc": EwcSettings, "sfa": SfaSettings}
"""Nested groups of settings, each None unless it is given."""


def refuse_unknown(keys: Iterable[str], known: Iterable[str], prefix: str = "") -> None:
    """Raise ConfigError at the first key that is not known, naming the nearest known one, or where it belongs."""
    choices = sorted(known)
    for key in keys:
        if key not in choices:
            near = difflib.get_close_matches(str(key), choices, n=1, cutoff=0.5)
            if not prefix and "training" in choices and key in ARGUMENTS:
                near = [f"training.{key}"]
            advice = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(choices)}"
            raise ConfigError(f"unknown setting {prefix}{key}; {advice}")


def first_missing(kind: type, given: Mapping[str, Any]) -> str | None:
    """The first field of a dataclass that has no default and no value; None where all have one."""
    for entry in fields(kind):
        required = entry.default is MISSING and entry.default_factory is MISSING
        if required and given.get(entry.name) is None:
            return entry.name
    return None


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, unreadable, not YAML, or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"--config must name a readable YAML file, got {path}: {reason}") from None
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, got {type(value).__name__}")
    return value


def put_over(settings: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others over them; `training` and sections that both have, name by name."""
    found = {**settings, **others}
    for key in ("training", *SECTIONS):
        both = [given[key] for given in (settings, others) if isinstance(given.get(key), Mapping)]
        if len(both) == 2:
            found[key] = {**both[0], **both[1]}
    return found


def apply_override(settings: dict[str, Any], assignment: str) -> None:
    """Apply one `a.b=c` to nested dicts (and lists, by index), in place.

    Raises:
        ConfigError: there is no `=`, or the path runs through something that has no keys.
    """
    key, separator, text = assignment.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(
            f"--set takes KEY=VALUE, got {assignment!r}; for example --set training.learning_rate=1e-5"
        )
    value = parse_yaml(text, f"the value of --set {key}")
    node: Any = settings
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"--set {key}: {part} must be an index below {len(node)}")
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
            if not last and node.get(part) is None:
                node[part] = {}
        else:
            raise ConfigError(f"--set {key}: {'.'.join(parts[:depth])} is a plain value and has no {part}")
        if last:
            node[index] = value
        else:
            node = node[index]


def mapping_of(name: str, value: Any) -> dict[str, Any]:
    """What a setting maps, as a dict of its own.

    Raises:
        ConfigError: it is no mapping.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a mapping, got {value!r}")
    return dict(value)


def _section(name: str, kind: Any, value: Any) -> Any:
    """One nested group of settings, such as `lora`."""
    given = mapping_of(name, value)
    refuse_unknown(given, [entry.name for entry in fields(kind)], f"{name}.")
    if (missing := first_missing(kind, given)) is not None:
        raise ConfigError(f"{name}.{missing} is required, got {name} without it; add {name}.{missing}")
    return kind(**given)


def config_from_dict(settings: Mapping[str, Any]) -> TrainConfig:
    """A TrainConfig from plain dicts, as in YAML.

    Raises:
        ConfigError: an unknown or missing key, or a value out of range.
    """
    values = dict(settings)
    refuse_unknown(values, [entry.name for entry in fields(TrainConfig)])
    if (missing := first_missing(TrainConfig, values)) is not None:
        flag = "the CACHE argument" if missing == "cache" else f"--{missing}"
        raise ConfigError(f"{missing} is required; give {flag} or `{missing}:` in the --config file")
    for name in ("training", "eval_caches"):
        if name in values:
            values[name] = mapping_of(name, values[name] or {})
    for name, kind in SECTIONS.items():
        value = values.get(name)
        if name == "ewc" and isinstance(value, list | tuple):
            values[name] = [_section(f"{name}.{place}", kind, entry) for place, entry in enumerate(value)]
        elif value is not None:
            values[name] = _section(name, kind, value)
    caches = values.get("caches") or []
    if not isinstance(caches, list | tuple):
        raise ConfigError(f"caches must be a list of path, weight or share, and loss, got {caches!r}")
    mixed = []
    for entry in caches:
        cache = {"path": entry} if isinstance(entry, str) else mapping_of("an entry of caches", entry)
        refuse_unknown(cache, [item.name for item in fields(MixedCache)], "caches.")
        mixed.append(MixedCache(**{"path": "", **cache}))
    values["caches"] = mixed
    return TrainConfig(**values)


def load_config(
    path: str | Path | None = None,
    *,
    flags: Mapping[str, Any] | None = None,
    overrides: Iterable[str] = (),
    retain: Iterable[str] = (),
) -> TrainConfig:
    """The settings of a run: YAML file, then flags that are not None, then `KEY=VALUE` overrides, then `add_retained`.

    Raises:
        ConfigError: as `read_config_file`, `apply_override`, `add_retained` and `config_from_dict`.
    """
    settings = read_config_file(path) if path is not None else {}
    settings |= {key: value for key, value in (flags or {}).items() if value is not None}
    for assignment in overrides:
        apply_override(settings, assignment)
    add_retained(settings, retain)
    return config_from_dict(settings)


def add_retained(settings: dict[str, Any], retain: Iterable[str]) -> None:
    """Add caches whose text is held to the initial model and not learnt to `caches`, in place.

    Args:
        retain: `CACHE` or `CACHE:WEIGHT`, the rows taken from it per row of the target cache.

    Raises:
        ConfigError: the `caches` that are there are no list.
    """
    for text in retain:
        path, colon, number = text.rpartition(":")
        try:
            weight = float(number)
        except ValueError:
            colon = ""
        if not colon:
            path, weight = text, RETAINED_WEIGHT
        caches = settings.get("caches") or []
        if not isinstance(caches, list | tuple):
            raise ConfigError(f"caches must be a list for --retain to add to, got {caches!r}")
        settings["caches"] = [*caches, {"path": path, "loss": "kl", "weight": weight}]


def save_config(settings: Mapping[str, Any], path: Path) -> None:
    """Write plain settings as YAML, in their own order, atomically."""
    atomic_write_bytes(path, yaml_text(settings).encode())
