"""Training from a teacher cache: dataset, collator, loss, Trainer, evaluation.

Importing this package loads nothing heavy; names are looked up on first use.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "CachedDataset": "dataset",
    "Comparison": "comparison",
    "Ewc": "retention.ewc",
    "EwcSettings": "retention.settings",
    "L2": "retention.l2",
    "L2Settings": "retention.settings",
    "LabelAnnealingCollator": "collator",
    "LabelAnnealingOutput": "loss",
    "LabelAnnealingTrainer": "label_annealing_trainer",
    "LoraSettings": "config",
    "MergeConfig": "merging.settings",
    "MergeReport": "merging.run",
    "MixedCache": "config",
    "OutputHead": "head",
    "compare": "comparison",
    "count_targets": "collator",
    "Sfa": "retention.sfa",
    "SfaSettings": "retention.settings",
    "TeacherBatch": "teacher_batch",
    "TrainConfig": "config",
    "TrainReport": "run",
    "evaluate": "evaluation",
    "label_annealing_loss": "loss",
    "load_config": "config_file",
    "merge": "merging.run",
    "shift_labels": "loss",
    "split_batch": "collator",
    "train": "run",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    value = getattr(import_module(f"trainer.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
