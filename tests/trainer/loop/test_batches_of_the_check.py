"""The check before the first step takes batches as training has them: packed, and of its size."""

import pytest
from runs import trainer_of

SIZES = ("training.per_device_train_batch_size=4", "training.per_device_eval_batch_size=1")


@pytest.mark.parametrize("packing", (True, False))
def test_size_and_packing_are_those_of_training(packing, tmp_path, tiny_llama_dir, llama_cache):
    overrides = ("packing=true", "pack_length=64") if packing else ()
    trainer = trainer_of(llama_cache, tiny_llama_dir, tmp_path / "run", *SIZES, *overrides)
    trained, first = next(iter(trainer.get_train_dataloader())), None
    for batch in trainer.loader_of_rows(trainer.train_dataset, range(16), as_trained=True):
        first = first or batch
    assert first is not None
    assert len(first["input_ids"]) == len(trained["input_ids"]) == 4
    assert first.keys() == trained.keys() and ("position_ids" in first) == packing
    alone = next(iter(trainer.loader_of_rows(trainer.train_dataset, range(16), as_trained=False)))
    assert len(alone["input_ids"]) == 1 and "position_ids" not in alone
