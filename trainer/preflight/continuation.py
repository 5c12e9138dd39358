"""What decides the steps of a run, as plain values under the names that a person knows: recorded at the start, and
compared when the run continues.

Computed, not typed: 2 x 4 rows per step are 4 x 2, three epochs of three steps are nine steps, and a default that
another version of transformers changed is a difference.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from formats.cache import TeacherCache
from formats.errors import ConfigError
from trainer.config import TrainConfig
from trainer.preflight import best_model
from trainer.preflight.arguments import ARGUMENTS

if TYPE_CHECKING:
    from trainer.loop.label_annealing_trainer import LabelAnnealingTrainer

FREE_SETTINGS = frozenset(
    {"cache", "model", "revision", "out", "eval_caches", "keep_checkpoints", "save_dtype", "training"}
    | {"step0_threshold", "step0_rows", "verify_saved"}
)
"""Settings that may change: caches and model are compared by what is in them, `training` name by name."""
JUDGING = ("eval_strategy", "eval_steps", "eval_delay")
"""Arguments that decide the steps or the result where a metric does."""
SAVING = ("save_strategy", "save_steps", "load_best_model_at_end")
COUNTED = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps")
"""Arguments that decide by what they come to: rows per step, and steps."""
SPLIT = "rows per step"
WEIGHTS = "weights of the model"


def run_facts(
    trainer: "LabelAnnealingTrainer",
    config: TrainConfig,
    caches: Mapping[str, Sequence[TeacherCache]],
    weights: str | None = None,
) -> dict[str, Any]:
    """Name -> value of everything that decides what the steps of this run compute. JSON-ready.

    Args:
        trainer: built, not trained yet.
        config: the run's settings.
        caches: `training`, `mixed` and `evaluation` -> the opened caches.
        weights: fingerprint of the model's weights, where the cache's identity does not say it.
    """
    args = trainer.args
    max_steps, per_epoch = trainer.planned_steps()
    facts: dict[str, Any] = {
        SPLIT: args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "steps": max_steps,
        "steps per epoch": per_epoch,
        "precision": args.mixed_precision,
        "data seed": args.seed if args.data_seed is None else args.data_seed,
        WEIGHTS: weights,
    }
    facts |= _methods(config.to_dict())
    covered = {"bf16", "fp16", "data_seed"}
    for name, argument in ARGUMENTS.items():
        if argument.decides and name not in covered and hasattr(args, name):
            facts[f"training.{name}"] = getattr(args, name)
    judged = ["training", "mixed"]  # the Fisher information of ewc remembers its own cache
    if best_model.chooses(vars(args)) is not None:
        judged.append("evaluation")
        names = (*JUDGING, "metric_for_best_model", *(SAVING if args.load_best_model_at_end else ()))
        facts |= {f"training.{name}": getattr(args, name) for name in names}
    for group in judged:
        facts |= cache_contents(group, caches.get(group, ()))
    return json.loads(json.dumps(facts, default=_plain))


def comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The typed settings that decide what a run computes, flat: `training.NAME` beside the others.

    Args:
        settings: `TrainConfig.to_dict()`.
    """
    flat = _methods(settings)
    for name, value in settings.get("training", {}).items():
        if name in COUNTED or (name in ARGUMENTS and ARGUMENTS[name].decides):
            flat[f"training.{name}"] = value
    return flat


def _methods(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings beside `training` that decide what a run computes, without where its caches are."""
    found = {key: value for key, value in settings.items() if key not in FREE_SETTINGS}
    for section, entries in (("lora", ("merge",)), ("ewc", ("cache", "keep_fisher"))):
        if value := found.get(section):
            several = value if isinstance(value, list) else [value]
            kept = [{k: v for k, v in one.items() if k not in entries and v is not None} for one in several]
            found[section] = kept if isinstance(value, list) else kept[0]
    if not found.get("freeze"):
        found.pop("freeze", None)
    found["caches"] = [
        {key: value for key, value in cache.items() if key != "path" and value is not None}
        for cache in settings.get("caches", [])
    ]
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return getattr(value, "value", None) or str(value)


def cache_contents(group: str, caches: Iterable[TeacherCache]) -> dict[str, str]:
    """Name -> contents of the caches that a run reads as its `training`, `mixed` or `evaluation` ones."""
    return {
        f"the {group} cache{f' {number + 1}' if number else ''}": contents_of(cache)
        for number, cache in enumerate(caches)
    }


def contents_of(cache: TeacherCache) -> str:
    """What a cache is and holds: the digest of its identity, and of the checksums of its shards."""
    from formats.identity.fingerprint import sha256_json

    shards = [shard.sha256 for shard in cache.manifest.shards]
    return f"{cache.identity.digest()[:16]}-{sha256_json(shards)[:16]}"


def ewc_contents(caches: Sequence[TeacherCache], weights: Sequence[str | None]) -> dict[str, str]:
    """Name -> what the tasks of `ewc` were estimated from, for the record of a finished run.

    Args:
        caches: one per task.
        weights: fingerprint of each task's model; None for the model that the run starts from.
    """
    found = {}
    for number, (cache, theta_k) in enumerate(zip(caches, weights, strict=True)):
        of = f" {number + 1}" if number else ""
        found[f"the cache of ewc{of}"] = contents_of(cache)
        if theta_k is not None:
            found[f"the weights of ewc.model{of}"] = theta_k
    return found


def require_same_run(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to continue a run that would be another one.

    Raises:
        ConfigError: names the first difference and both values.
    """
    for key in (*now, *(key for key in before if key not in now)):
        was, is_now = before.get(key), now.get(key)
        if was != is_now:
            hint = "; batch x accumulation x processes must give the same" if key == SPLIT else ""
            raise ConfigError(
                f"an interrupted run continues with its own settings, but {key} was {was!r} and is {is_now!r}{hint}; "
                "use the same settings or another --out"
            )
