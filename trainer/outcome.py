"""What a trained model came to, measured after the last step while it is still in memory."""

from collections.abc import Mapping
from typing import Any

from trainer.config import TrainConfig
from trainer.data.dataset import CachedDataset
from trainer.data.sampler import sample_rows
from trainer.inputs import Inputs, teacher_of
from trainer.loop.reporters import KL_TO_INITIAL
from trainer.running import RunningTrainer


def evaluate_rows(
    trainer: Any, datasets: Mapping[str, CachedDataset], inputs: Inputs
) -> dict[str, dict[str, Any]]:
    """Name -> what `Measurement.to_dict` says of the trained model. Collective."""
    results = {}
    for name, dataset in datasets.items():
        found = trainer.measure_rows(trainer.get_eval_dataloader(dataset)).require_finite(name)
        kl_to = teacher_of(dataset.cache, inputs.lineage).name if found.num_kl else None
        results[name] = {**found.to_dict(), "kl_to": kl_to}
    return results


def measure_new_text(
    trainer: RunningTrainer, config: TrainConfig, inputs: Inputs, vocab_size: int | None
) -> dict[str, Any]:
    """How far the model went on the text it learnt: KL(initial || model) at T = 1 over all captured positions of
    `step0_rows` rows of the target cache, whatever objective was trained; forgetting was found to follow this number
    (RL's Razor, arXiv 2509.04259). `kl_to` names the model that built the cache; both are None where it is neither an
    ancestor nor the teacher of the run. One forward pass. Collective.
    """
    dataset = CachedDataset(inputs.target)
    dataset.vocab_size = vocab_size
    chosen = sample_rows(dataset, config.step0_rows, trainer.args.seed)
    loader = trainer.loader_of_rows(dataset, chosen, as_trained=True)
    found = trainer.measure_rows(loader).require_finite("the new text")
    teacher = teacher_of(inputs.target, inputs.lineage)
    known = found.num_kl and (
        teacher in inputs.lineage or any(inputs.target is cache for cache in inputs.with_kl)
    )
    return {
        "kl": found.kl if known else None,
        "kl_to": teacher.name if known else None,
        "ce": found.ce if found.num_ce else None,
        "num_rows": len(chosen),
        "num_positions": found.num_kl,
    }


def figures_of(
    evaluation: Mapping[str, Mapping[str, Any]], new_text: Mapping[str, Any]
) -> dict[str, float | int | None]:
    """The same as reporters are told it, by the names that the Trainer's own evaluations have."""
    measured = {
        f"eval_{cache}_{name}": value
        for cache, result in evaluation.items()
        for name, value in result.items()
        if name != "kl_to"
    }
    return {KL_TO_INITIAL: new_text["kl"], **measured}
