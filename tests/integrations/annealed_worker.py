"""A Trainer of one's own on one of several ranks; the first one writes what it came to (see processes.py)."""

import json
from pathlib import Path


def run(model: str, cache: str, out: str, num_shards: int, changed: dict) -> None:
    """Train on the rows of the cache, as a stream of so many shards."""
    from datasets import Dataset
    from test_annealed import losses, rows_in, trainer_of

    rows = Dataset.from_dict(rows_in(Path(cache))).to_iterable_dataset(num_shards)
    trainer = trainer_of(Path(model), Path(out), Path(cache), rows, optim="sgd", **changed)
    found = losses(trainer)
    if trainer.args.process_index == 0:
        Path(out).mkdir(exist_ok=True)
        (Path(out) / "losses.json").write_text(json.dumps(found))


def write(cache: str, out: str) -> None:
    """`write_rows` as a script calls it, on every rank."""
    from datasets import Dataset
    from test_annealed import rows_in

    from integrations.row_file import write_rows

    print(write_rows(Dataset.from_dict(rows_in(Path(cache))), Path(out) / "rows.parquet"))
