"""A `transformers.Trainer` of one's own with our loss, as docs/adapters.md says: what its data sets may look like."""

import json
from dataclasses import replace
from pathlib import Path

import annealed_worker
import numpy as np
import pytest
import torch
from datasets import Dataset
from processes import run_ranks
from runs import copy_model, noise
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from formats.cache import TeacherCache
from formats.errors import ConfigError, IdentityMismatchError
from integrations.annealed import Annealed
from integrations.joined_rows import segments
from integrations.row_file import write_rows
from trainer import TrainConfig


class Annealing(Annealed, Trainer):
    """The class of the page."""


def rows_in(cache: Path) -> dict[str, list[list[int]]]:
    """Tokens and labels of a cache's rows."""
    opened = TeacherCache(cache)
    rows = [opened.tokens(row) for row in range(len(opened))]
    return {
        "input_ids": [row.input_ids.tolist() for row in rows],
        "labels": [np.where(row.loss_mask, row.input_ids, -100).tolist() for row in rows],
    }


def trainer_of(
    model: Path, out: Path, cache: Path, rows, *, packing=False, on_missing="refuse", settings=None, **changed
):
    extra = {
        name: changed.pop(name)
        for name in ("eval_dataset", "compute_loss_func", "compute_metrics")
        if name in changed
    }
    given = {
        **{"max_steps": 2, "per_device_train_batch_size": 3, "learning_rate": 1e-3, "logging_steps": 1},
        **{"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True},
    }
    arguments = TrainingArguments(str(out), **given | changed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trainer = Annealing(loaded, arguments, train_dataset=rows, processing_class=tokenizer, **extra)
    config = TrainConfig(cache=str(cache), model="-", out="-", **settings or {})
    trainer.anneal_with(config, tokenizer, packing=packing, on_missing=on_missing)
    return trainer


def test_weights_that_are_read_from_the_cache_need_the_models_own(tmp_path, tiny_llama_dir, pruned_cache):
    """Without KL the tokens of any cache will do, but p0 must be that of the model."""
    other = copy_model(tiny_llama_dir, tmp_path / "other", noise(3, 0.05))
    rows, plain = Dataset.from_dict(rows_in(pruned_cache)), {"kl_coef": 0.0}
    trainer_of(other, tmp_path, pruned_cache, rows, settings=plain).train()
    for weight in ("stm", "talr"):
        asked = plain | {"ce_weight": weight}
        with pytest.raises(IdentityMismatchError, match="must be the teacher that built the cache"):
            trainer_of(other, tmp_path, pruned_cache, rows, settings=asked)
    asked = plain | {"ce_weight": "stm:0.001"}
    known = trainer_of(tiny_llama_dir, tmp_path, pruned_cache, rows, settings=asked)
    known.train()
    assert known.step0.kl < 0.02


def test_with_a_budget_the_loss_chooses_nothing(tmp_path, tiny_llama_dir, pruned_cache):
    rows, chosen = Dataset.from_dict(rows_in(pruned_cache)), {"metric_for_best_model": "loss"}
    with pytest.raises(ConfigError, match=r"got loss beside kl_budget, .* use ce"):
        trainer_of(tiny_llama_dir, tmp_path, pruned_cache, rows, settings={"kl_budget": 0.02}, **chosen)
    trainer_of(tiny_llama_dir, tmp_path, pruned_cache, rows, settings={}, **chosen)


def losses(trainer: Annealing) -> list[float]:
    """CE and KL of every step."""
    trainer.train()
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry for name in ("ce", "kl")]


def padded(rows: dict[str, list[list[int]]], side: str) -> Dataset:
    """As a tokenizer pads to a length, without labels: every token of the text is one."""
    width = max(map(len, rows["input_ids"])) + 3
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": []}
    for ids in rows["input_ids"]:
        padding = [0] * (width - len(ids))
        for name, cells in (("input_ids", ids), ("attention_mask", [1] * len(ids))):
            columns[name].append(cells + padding if side == "right" else padding + cells)
    return Dataset.from_dict(columns)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_learnt_nor_written(side, tmp_path, tiny_llama_dir):
    """Rows that a tokenizer padded are found in the cache of their text; `write_rows` writes them without padding."""
    import pyarrow.parquet as pq
    from caches import random_rows, write_cache

    whole = [replace(row, loss_mask=np.arange(len(row.input_ids)) > 0) for row in random_rows(8, 1000)]
    cache = write_cache(tmp_path / "cache", tiny_llama_dir, rows=whole)
    rows = rows_in(cache)
    expected = losses(trainer_of(tiny_llama_dir, tmp_path, cache, Dataset.from_dict(rows)))
    given = padded(rows, side)
    assert losses(trainer_of(tiny_llama_dir, tmp_path, cache, given)) == pytest.approx(
        expected, rel=1e-5, abs=1e-6
    )
    for gone, reason in ((tmp_path / "gone", "no directory"), (cache, "is a cache")):
        with pytest.raises(ConfigError, match=reason):
            write_rows(given, gone / "rows.parquet")
    write_rows(given, tmp_path / "rows.parquet")
    written = pq.read_table(tmp_path / "rows.parquet").to_pydict()
    assert written["input_ids"] == rows["input_ids"]
    assert [sum(label != -100 for label in labels) for labels in written["labels"]] == [
        len(ids) - 1 for ids in rows["input_ids"]
    ]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("attention_mask", [1, 0, 1, 1]),
        ("attention_mask", [1, 1, 2, 2]),
        ("attention_mask", [1, 1, 0]),
        ("attention_mask", [[1, 0, 0, 0]] * 4),
        ("position_ids", [0, 1, 0, 1]),
        ("position_ids", [1, 2, 3, 4]),
    ],
)
def test_another_attention_than_that_of_whole_rows_is_refused(column, values):
    with pytest.raises(ConfigError, match=f"{column} must .* need seq_lengths"):
        segments({"input_ids": [5, 6, 7, 8], column: values})
    same = {"attention_mask": [0, 1, 1, 1], "position_ids": [1, 0, 1, 2]}
    assert [ids.tolist() for ids, _ in segments({"input_ids": [5, 6, 7, 8], **same})] == [[6, 7, 8]]


def test_a_transform_is_looked_through(tmp_path, tiny_llama_dir, pruned_cache):
    """What `with_transform` makes are the rows, whatever is stored: written, and looked up before training."""
    import pyarrow.parquet as pq

    rows = rows_in(pruned_cache)

    def made(batch):
        return {name: [cells[number] for number in batch["number"]] for name, cells in rows.items()}

    numbers = Dataset.from_dict({"number": list(range(24)), "input_ids": [[7, 8, 9]] * 24})
    write_rows(numbers.with_transform(made), tmp_path / "rows.parquet")
    assert pq.read_table(tmp_path / "rows.parquet")["input_ids"].to_pylist() == rows["input_ids"]
    kept = {"remove_unused_columns": False}
    known = trainer_of(tiny_llama_dir, tmp_path, pruned_cache, numbers.with_transform(made), **kept)
    assert len(losses(known)) == 4
    rows["input_ids"][3], rows["labels"][3] = [9, 9, 9, 9], [9, 9, 9, 9]
    with pytest.raises(
        ConfigError, match=r"every row of the train data set must be in the cache, got 1 of 24"
    ):
        trainer_of(tiny_llama_dir, tmp_path, pruned_cache, numbers.with_transform(made), **kept)


@pytest.mark.parametrize("stream", [False, True])
def test_packed_rows_keep_their_bounds(stream, tmp_path, tiny_llama_dir, pruned_cache):
    """`seq_lengths` is no argument of a model's forward, and yet the two rows of a sequence find their teachers."""
    rows = rows_in(pruned_cache)
    pairs = {
        name: [cells[number] + cells[number + 1] for number in range(0, 24, 2)]
        for name, cells in rows.items()
    }
    lengths = [len(ids) for ids in rows["input_ids"]]
    packed = Dataset.from_dict(pairs | {"seq_lengths": [lengths[at : at + 2] for at in range(0, 24, 2)]})
    given = {"train_sampling_strategy": "sequential", "on_missing": "skip_kl"}
    found = trainer_of(
        tiny_llama_dir,
        tmp_path,
        pruned_cache,
        packed.to_iterable_dataset() if stream else packed,
        per_device_train_batch_size=2,
        **given,
    )
    alone = Dataset.from_dict(rows)
    expected = trainer_of(
        tiny_llama_dir, tmp_path, pruned_cache, alone, per_device_train_batch_size=4, **given
    )
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5, abs=1e-6)


def test_several_evaluations_are_one_pause(tmp_path, tiny_llama_dir, pruned_cache, monkeypatch):
    """The time of a dictionary's evaluation was left out twice: as a whole, and of each of its data sets."""
    rows = Dataset.from_dict(rows_in(pruned_cache))
    trainer = trainer_of(
        tiny_llama_dir, tmp_path, pruned_cache, rows, eval_dataset={"one": rows, "two": rows.select(range(4))}
    )
    pauses = []
    monkeypatch.setattr(trainer, "pause", pauses.append)
    found = trainer.evaluate()
    assert {"eval_one_ce", "eval_two_ce"} <= found.keys() and len(pauses) == 1


@pytest.mark.parametrize("name", ["compute_loss_func", "compute_metrics"])
def test_functions_of_logits_are_refused(name, tmp_path, tiny_llama_dir, pruned_cache):
    rows = Dataset.from_dict(rows_in(pruned_cache))
    with pytest.raises(ConfigError, match=f"{name} is not available here"):
        trainer_of(tiny_llama_dir, tmp_path, pruned_cache, rows, **{name: print})


def test_the_processes_of_a_stream_read_batches_of_their_own(tmp_path, tiny_llama_dir, pruned_cache):
    """accelerate would let the first one read, and cut a batch whose teacher belongs to whole rows."""
    rows = Dataset.from_dict(rows_in(pruned_cache))
    streamed, known = (
        trainer_of(tiny_llama_dir, tmp_path, pruned_cache, given)
        for given in (rows.to_iterable_dataset(), rows)
    )
    assert streamed.accelerator.dispatch_batches is False and known.accelerator.dispatch_batches is None


def test_two_processes_stream_what_one_does(tmp_path, tiny_llama_dir, pruned_cache):
    """24 rows: three steps a pass, of 4 x 2 rows on one process and 2 x 2 on each of two."""
    for name, num_ranks, changed in (("one", 1, {"per_device_train_batch_size": 4}), ("two", 2, {})):
        given = {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 5,
            **changed,
        }
        words = (str(tiny_llama_dir), str(pruned_cache), str(tmp_path / name), 1, given)
        run_ranks(tmp_path / "logs" / name, num_ranks, annealed_worker.run, *words)
    one, two = (json.loads((tmp_path / name / "losses.json").read_text()) for name in ("one", "two"))
    assert len(one) == 10 and two == pytest.approx(one, rel=1e-5, abs=1e-6)


def test_shards_of_a_stream_may_end_at_different_steps(tmp_path, tiny_llama_dir, pruned_cache):
    """Of three shards one process reads two: the other one goes on with its next pass."""
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 7}
    words = (str(tiny_llama_dir), str(pruned_cache), str(tmp_path / "out"), 3, given)
    run_ranks(tmp_path / "logs", 2, annealed_worker.run, *words)
    assert len(json.loads((tmp_path / "out" / "losses.json").read_text())) == 14


def test_the_end_of_a_stream_that_is_no_whole_step_waits_for_the_next_pass(
    tmp_path, tiny_llama_dir, pruned_cache
):
    """Five batches in steps of two: the fifth one's gradient was added to a step of two others."""
    rows = Dataset.from_dict({name: cells[:15] for name, cells in rows_in(pruned_cache).items()})
    given = {"gradient_accumulation_steps": 2, "optim": "sgd", "train_sampling_strategy": "sequential"}
    streamed = trainer_of(
        tiny_llama_dir, tmp_path, pruned_cache, rows.to_iterable_dataset(), max_steps=5, **given
    )
    twice = Dataset.from_dict({name: [*cells, *cells] for name, cells in rows.to_dict().items()})
    known = trainer_of(tiny_llama_dir, tmp_path, pruned_cache, twice, max_steps=5, **given)
    assert losses(streamed) == pytest.approx(losses(known), rel=1e-5, abs=1e-6)
    short = trainer_of(
        tiny_llama_dir,
        tmp_path,
        pruned_cache,
        rows.to_iterable_dataset(),
        **given | {"gradient_accumulation_steps": 6},
    )
    with pytest.raises(
        ConfigError, match="a stream must have the 6 batches of a step for every process, got 5"
    ):
        short.train()


def test_of_two_processes_one_writes_the_rows(tmp_path, pruned_cache):
    """The second one met the first one's file, and failed, or wrote it once more."""
    import pyarrow.parquet as pq

    words = (str(pruned_cache), str(tmp_path))
    ranks = run_ranks(tmp_path / "logs", 2, annealed_worker.write, *words)
    assert ranks[0].text("stdout") == ranks[1].text("stdout") != ""
    assert pq.read_table(tmp_path / "rows.parquet").num_rows == 24
    assert not list(tmp_path.glob(".rows*"))
