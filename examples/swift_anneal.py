"""ms-swift with our loss: `swift sft --external_plugins swift_anneal.py ...`, the settings in a file beside it.

    ANNEAL=anneal.yaml swift sft --external_plugins swift_anneal.py --model MODEL --dataset data.jsonl ...

anneal.yaml holds `cache: cache` and whatever else of `kl_coef`, `temperature`, ...; or `write_rows: rows.parquet`, to
write its rows first, whose cache `anneal cache build` then builds. Not with packing or padding_free.
"""

import os
import sys
from pathlib import Path
from typing import Any

import transformers
import yaml
from swift.trainers import Seq2SeqTrainer
from swift.trainers.trainer_factory import TrainerFactory

from integrations.annealed import Annealed, refuse_arguments
from integrations.row_file import write_rows
from trainer import TrainConfig


class AnnealedTrainer(Annealed, Seq2SeqTrainer):
    """Theirs, with the loss in place as soon as it is made; the batch goes to the model as it is."""

    _prepare_inputs = transformers.Trainer._prepare_inputs

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = yaml.safe_load(Path(os.environ["ANNEAL"]).read_text(encoding="utf-8"))
        if "write_rows" in given:
            num_rows, longest = write_rows(self.train_dataset, given["write_rows"])
            sys.exit(f"{num_rows} rows in {given['write_rows']}; --max-length {longest} cuts none of them")
        refuse_arguments(self.args)
        self.anneal_with(TrainConfig(model="-", out="-", **given), self.template.tokenizer)


TrainerFactory.TRAINER_MAPPING["causal_lm"] = f"{__name__}.AnnealedTrainer"
