"""Training from a teacher cache: dataset, collator, loss, Trainer, evaluation.

Importing this package loads nothing heavy; names are looked up on first use.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "BenchSettings": "bench.settings",
    "CachedDataset": "data.dataset",
    "Comparison": "comparison.comparison",
    "Ewc": "retention.ewc",
    "EwcSettings": "retention.settings",
    "L2": "retention.l2",
    "L2Settings": "retention.settings",
    "LabelAnnealingCollator": "data.collator",
    "LabelAnnealingOutput": "loss.label_annealing_loss",
    "LabelAnnealingTrainer": "loop.label_annealing_trainer",
    "LoraSettings": "config",
    "MergeConfig": "merging.settings",
    "MergedModel": "merging.merge_models",
    "MixedCache": "config",
    "OutputHead": "loop.output_head",
    "bench_models": "bench.bench",
    "compare": "comparison.compare",
    "count_targets": "data.collator",
    "Selection": "selection.selection",
    "Sfa": "retention.sfa",
    "SfaSettings": "retention.settings",
    "SweepConfig": "sweep.config",
    "TeacherBatch": "data.teacher_batch",
    "TrainConfig": "config",
    "TrainReport": "run",
    "TrainingPlan": "dry_run",
    "evaluate": "evaluation.evaluate",
    "label_annealing_loss": "loss.label_annealing_loss",
    "load_bench": "bench.paired",
    "load_config": "config_file",
    "merge": "merging.merge_models",
    "paired": "bench.paired",
    "plan_sweep": "sweep.sweep",
    "plan_training": "dry_run",
    "run_sweep": "sweep.sweep",
    "select": "selection.selection",
    "split_batch": "data.collator",
    "train": "run",
    "weight_distance": "evaluation.weight_distance",
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
