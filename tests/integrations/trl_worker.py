"""A run of TRL's trainer on one of several ranks; the first one writes what it came to (see processes.py)."""

import json
from pathlib import Path

from safetensors.torch import save_file


def run(model: str, cache: str, out: str, changed: dict) -> None:
    """Train on the rows of the cache in their order."""
    from test_trl import data_set, theirs, trainer_of
    from transformers import AutoTokenizer

    trainer = trainer_of(
        model,
        Path(out),
        data_set(Path(cache)),
        AutoTokenizer.from_pretrained(model),
        cache_dir=cache,
        **changed,
    )
    losses = theirs(trainer)
    if trainer.args.process_index == 0:
        save_file(
            {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()},
            Path(out) / "weights.safetensors",
        )
        (Path(out) / "losses.json").write_text(json.dumps(losses))
