"""LLaMA-Factory with our loss: `python llamafactory_anneal.py train.yaml`, one key more in its YAML.

    anneal: {write_rows: rows.parquet}     first: write its rows, build their cache with `anneal cache build`
    anneal: {cache: cache, kl_coef: 1.0}   then: train

LLaMA-Factory has no plugins, so its trainer for supervised fine-tuning is replaced before it starts. Not with packing:
its packed rows do not say where one ends.
"""

import sys
from pathlib import Path
from typing import Any

import llamafactory.train.sft.workflow as sft
import yaml
from llamafactory.train.tuner import run_exp

from integrations.annealed import Annealed, refuse_arguments
from integrations.row_file import write_rows
from trainer import TrainConfig


class AnnealedTrainer(Annealed, sft.CustomSeq2SeqTrainer):
    """Theirs, with the loss in place as soon as it is made."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if "write_rows" in settings:
            num_rows, longest = write_rows(self.train_dataset, settings["write_rows"])
            sys.exit(f"{num_rows} rows in {settings['write_rows']}; --max-length {longest} cuts none of them")
        refuse_arguments(self.args)
        self.anneal_with(TrainConfig(model="-", out="-", **settings), self.processing_class)


given = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
settings = given.pop("anneal")
sft.CustomSeq2SeqTrainer = AnnealedTrainer
run_exp(given)
