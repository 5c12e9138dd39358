"""Training from a teacher cache: dataset, collator, loss, Trainer, evaluation.

Importing this package loads nothing heavy; names are looked up on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what a type checker sees; `_HOME` is what Python does
    from trainer.bench.bench import bench_models as bench_models
    from trainer.bench.paired import load_bench as load_bench
    from trainer.bench.paired import paired as paired
    from trainer.bench.settings import BenchSettings as BenchSettings
    from trainer.comparison.compare import compare as compare
    from trainer.comparison.comparison import Comparison as Comparison
    from trainer.config import LoraSettings as LoraSettings
    from trainer.config import MixedCache as MixedCache
    from trainer.config import TrainConfig as TrainConfig
    from trainer.config_file import load_config as load_config
    from trainer.data.collator import LabelAnnealingCollator as LabelAnnealingCollator
    from trainer.data.collator import count_targets as count_targets
    from trainer.data.collator import split_batch as split_batch
    from trainer.data.dataset import CachedDataset as CachedDataset
    from trainer.data.teacher_batch import TeacherBatch as TeacherBatch
    from trainer.dry_run import TrainingPlan as TrainingPlan
    from trainer.dry_run import plan_training as plan_training
    from trainer.evaluation.evaluate import evaluate as evaluate
    from trainer.evaluation.weight_distance import weight_distance as weight_distance
    from trainer.loop.label_annealing_trainer import LabelAnnealingTrainer as LabelAnnealingTrainer
    from trainer.loop.output_head import OutputHead as OutputHead
    from trainer.loss.label_annealing_loss import LabelAnnealingOutput as LabelAnnealingOutput
    from trainer.loss.label_annealing_loss import label_annealing_loss as label_annealing_loss
    from trainer.merging.merge_models import MergedModel as MergedModel
    from trainer.merging.merge_models import merge as merge
    from trainer.merging.settings import MergeConfig as MergeConfig
    from trainer.retention.ewc import Ewc as Ewc
    from trainer.retention.l2 import L2 as L2
    from trainer.retention.settings import EwcSettings as EwcSettings
    from trainer.retention.settings import L2Settings as L2Settings
    from trainer.retention.settings import SfaSettings as SfaSettings
    from trainer.retention.sfa import Sfa as Sfa
    from trainer.run import TrainReport as TrainReport
    from trainer.run import train as train
    from trainer.selection.selection import Selection as Selection
    from trainer.selection.selection import select as select
    from trainer.sweep.config import SweepConfig as SweepConfig
    from trainer.sweep.sweep import plan_sweep as plan_sweep
    from trainer.sweep.sweep import run_sweep as run_sweep

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
