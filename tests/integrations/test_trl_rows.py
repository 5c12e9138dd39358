"""TRL's data set types find their rows in a cache; what does not fit is refused by name, before anything is trained."""

import os
from functools import partial
from pathlib import Path

import pytest

if os.environ.get("ANNEAL_INTEGRATIONS") != "trl":
    pytest.importorskip("trl")

from corpora import write_jsonl
from datasets import Dataset
from test_trl import config_of, data_set, theirs, trainer_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from cache_builder.corpus.corpus import CorpusConfig, open_corpus
from cache_builder.rows.tokenise import tokenise
from formats.errors import AnnealError, ConfigError, IdentityMismatchError
from integrations.settings import SETTINGS, require_only
from integrations.trl import AnnealSFTConfig, AnnealSFTTrainer
from trainer.config import TrainConfig


def turns(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


TYPES = {
    "text": ([{"text": f"def f{i}(x): return x + {i}"} for i in range(6)], {}),
    "messages": (
        [{"messages": turns(f"add {i}", f"sum is {i + 1}", "more", "no")} for i in range(6)],
        {"assistant_only_loss": True},
    ),
    "prompt and completion": ([{"prompt": f"add {i} ->", "completion": f" sum {i}"} for i in range(6)], {}),
    "turns as prompt and completion": (
        [{"prompt": turns(f"add {i}"), "completion": turns("", f"sum {i}")[1:]} for i in range(6)],
        {},
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir):
    return AutoTokenizer.from_pretrained(tiny_llama_dir)


def rows_of_corpus(path: Path, tokenizer) -> list:
    rows = tokenise(open_corpus(CorpusConfig(source=str(path))), tokenizer)
    return [(row.input_ids.tolist(), row.loss_mask.tolist()) for row in rows]


@pytest.mark.parametrize("kind", TYPES)
def test_a_cache_of_the_corpus_has_the_rows_of_trl(kind, tmp_path, tiny_llama_dir, tokenizer):
    """The corpus itself, and the file of `write_rows`, give the rows that TRL trains on; packed as well."""
    records, changed = TYPES[kind]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", records)
    expected = rows_of_corpus(corpus, tokenizer)
    assert len(expected) == 6 and all(any(mask) for _, mask in expected)
    for name, packing in (("plain", {}), ("packed", {"packing": True, "max_length": 40})):
        trainer = trainer_of(
            str(tiny_llama_dir), tmp_path / "out", Dataset.from_list(records), tokenizer, **changed, **packing
        )
        command = trainer.write_rows(tmp_path / f"{name}.parquet")
        assert f"anneal cache build {tmp_path / f'{name}.parquet'} --model {tiny_llama_dir}" in command
        assert sorted(rows_of_corpus(tmp_path / f"{name}.parquet", tokenizer)) == sorted(expected)
    with pytest.raises(ConfigError, match="must be a new file"):
        trainer.write_rows(tmp_path / "packed.parquet")
    for what, act in (
        ("training", trainer.train),
        ("evaluation", partial(trainer.evaluate, trainer.train_dataset)),
        ("prediction", partial(trainer.predict, trainer.train_dataset)),
    ):
        with pytest.raises(ConfigError, match=f"{what} needs cache_dir"):
            act()


def test_from_a_corpus_to_a_trained_model(tmp_path, tiny_llama_dir, anneal, capsys):
    """As the page says: one command, two changed lines. Held-out rows are measured against a cache of their own."""
    records, changed = TYPES["messages"]
    for name, part in (("corpus", records), ("held", records[:2])):
        write_jsonl(tmp_path / f"{name}.jsonl", part)
        words = ("--model", tiny_llama_dir, "--out", tmp_path / name, "--engine", "transformers")
        code, _, errors = anneal("cache", "build", tmp_path / f"{name}.jsonl", *words)
        assert code == 0, errors
    trainer = AnnealSFTTrainer(
        str(tiny_llama_dir),
        config_of(
            tmp_path / "out",
            cache_dir=str(tmp_path / "corpus"),
            eval_cache_dir=str(tmp_path / "held"),
            per_device_eval_batch_size=2,
            max_steps=4,
            **changed,
        ),
        train_dataset=Dataset.from_list(records),
        eval_dataset=Dataset.from_list(records[:2]),
    )
    before = trainer.evaluate()
    losses = theirs(trainer)
    after = trainer.evaluate()
    assert losses[-1] < losses[0] and trainer.step0.kl < 1e-3
    assert "the model is the cache's teacher" in capsys.readouterr().err
    assert after["eval_ce"] < before["eval_ce"] and before["eval_kl"] < 1e-3 < after["eval_kl"]
    assert after["eval_loss"] == pytest.approx(after["eval_ce"] + after["eval_kl"])
    trainer.save_model(str(tmp_path / "saved"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_evaluation_without_a_cache_is_of_the_cross_entropy(
    tmp_path, tiny_llama_dir, pruned_cache, tokenizer
):
    rows = data_set(pruned_cache)
    trainer = trainer_of(
        str(tiny_llama_dir), tmp_path, rows, tokenizer, cache_dir=str(pruned_cache), eval_dataset=rows
    )
    found = trainer.evaluate()
    model = trainer.model.eval()
    import torch

    total = count = 0.0
    with torch.no_grad():
        for row in rows:
            ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
            wanted = (labels[0, 1:] != -100).sum().item()
            total, count = total + wanted * model(input_ids=ids, labels=labels).loss.item(), count + wanted
    assert found["eval_ce"] == pytest.approx(total / count, rel=1e-5) and "eval_kl" not in found


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"tokens": 12}, "its text cut elsewhere"),
        ({"labels": True}, "its tokens with loss on others"),
        ({"tokens_plus_one": True}, "no such text"),
    ],
)
def test_rows_that_the_cache_lacks(changed, reason, tmp_path, tiny_llama_dir, pruned_cache, tokenizer):
    """Refused with the count and the likely reason; or trained without KL, if that is asked for."""
    rows = data_set(pruned_cache, tokens=changed.get("tokens"))
    if "labels" in changed:
        rows = rows.map(lambda row: {"labels": [-100, *row["input_ids"][1:-1], -100]})
    elif "tokens_plus_one" in changed:
        plus = [[token + 1 for token in ids] for ids in rows["input_ids"]]
        rows = Dataset.from_dict({"input_ids": plus, "labels": plus})
    with pytest.raises(ConfigError, match=rf"got (1\d|2\d) of \d+ that .* does not hold \(.*{reason}"):
        trainer_of(str(tiny_llama_dir), tmp_path, rows, tokenizer, cache_dir=str(pruned_cache))
    found = theirs(
        trainer_of(
            str(tiny_llama_dir),
            tmp_path,
            Dataset.from_list([*rows, *data_set(pruned_cache)]),
            tokenizer,
            cache_dir=str(pruned_cache),
            on_missing="skip_kl",
            max_steps=8,
        )
    )
    assert len(found) > 0


def test_skipped_rows_have_no_kl(tmp_path, tiny_llama_dir, pruned_cache, tokenizer, capsys):
    """Half of a batch is not in the cache: the KL of a step is that of the other half alone, its CE that of both."""
    known = data_set(pruned_cache).select(range(2))
    other = Dataset.from_dict({"input_ids": [[9, 8, 7, 6]] * 2, "labels": [[9, 8, 7, 6]] * 2})
    common = {"cache_dir": str(pruned_cache), "learning_rate": 1e-2, "max_steps": 3, "on_missing": "skip_kl"}
    trainers = [
        trainer_of(str(tiny_llama_dir), tmp_path, Dataset.from_list(rows), tokenizer, **common)
        for rows in ([*known, *other], [*known])
    ]
    assert "2 of 4 rows of the train data set are not in" in capsys.readouterr().err
    batches = [next(iter(trainer.get_train_dataloader())) for trainer in trainers]
    counts = [
        trainer._get_num_items_in_batch([batch], "cpu")
        for trainer, batch in zip(trainers, batches, strict=True)
    ]
    assert counts[0][1] == counts[1][1] > 0 and counts[0][0] == counts[1][0] + 6
    losses = [theirs(trainer) for trainer in trainers]
    assert losses[0] != losses[1]


REFUSED = {
    "loss_type": ({"loss_type": "dft"}, "ce_weight: dft"),
    "packing_strategy": ({"packing": True, "packing_strategy": "wrapped"}, "packing_strategy must be bfd"),
    "label_smoothing_factor": ({"label_smoothing_factor": 0.1}, "use label_smoothing"),
    "pad_to_multiple_of": ({"pad_to_multiple_of": 8}, "pad_to_multiple_of"),
    "router_aux_loss_coef": ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef must be 0"),
    "kl_coef": ({"kl_coef": -1.0}, "kl_coef must be at least 0"),
    "temperature": ({"temperature": 0.1}, "temperature must be at least"),
    "kl_on": ({"kl_on": "somewhere"}, "kl_on must be one of"),
    "on_missing": ({"on_missing": "ignore"}, "on_missing must be one of refuse, skip_kl"),
    "on_missing and ce_weight": (
        {"on_missing": "skip_kl", "ce_weight": "stm"},
        "ce_weight stm needs every row",
    ),
    "kl_gate without kl": ({"kl_coef": 0.0, "kl_gate": "unsure"}, "kl_gate would have no effect"),
    "average_tokens": (
        {"average_tokens_across_devices": False},
        "average_tokens_across_devices must be true",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_be_honoured(name, tmp_path):
    changed, reason = REFUSED[name]
    with pytest.raises(ConfigError, match=reason):
        config_of(tmp_path, **changed)


def test_arguments_that_cannot_be_honoured(tmp_path, tiny_llama_dir, tiny_qwen3_dir, pruned_cache, tokenizer):
    from trl import SFTConfig

    rows, given = data_set(pruned_cache), {"processing_class": tokenizer}
    config = config_of(tmp_path, cache_dir=str(pruned_cache))
    for name in ("data_collator", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        with pytest.raises(ConfigError, match=f"{name} is not available here"):
            AnnealSFTTrainer(str(tiny_llama_dir), config, train_dataset=rows, **given, **{name: print})
    with pytest.raises(ConfigError, match="args must be an AnnealSFTConfig"):
        AnnealSFTTrainer(
            str(tiny_llama_dir), SFTConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=rows
        )
    with pytest.raises(IdentityMismatchError, match="must be the teacher that built the cache"):
        AnnealSFTTrainer(str(tiny_qwen3_dir), config, train_dataset=rows, **given)
    with pytest.raises(AnnealError, match="nowhere"):
        AnnealSFTTrainer(
            str(tiny_llama_dir), config_of(tmp_path, cache_dir="nowhere"), train_dataset=rows, **given
        )
    from integrations.annealed import refuse_arguments

    split = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, accelerator_config={"split_batches": True})
    with pytest.raises(ConfigError, match="split_batches and dispatch_batches"):
        refuse_arguments(split)
    for name, value in (
        ("packing", True),
        ("loss", "kl"),
        ("eval_caches", {"a": "b"}),
        ("dtype", "bfloat16"),
    ):
        with pytest.raises(ConfigError, match=f"{name} is a setting of anneal train"):
            require_only(TrainConfig(cache="-", model="-", out="-", **{name: value}))
    require_only(TrainConfig(cache="-", model="-", out="-", kl_coef=0.5, ce_weight="dft", step0_rows=3))
    missing = Dataset.from_dict({"input_ids": [[7, 8, 9]], "labels": [[7, 8, 9]]})
    held = config_of(tmp_path, cache_dir=str(pruned_cache), eval_cache_dir=str(pruned_cache))
    with pytest.raises(
        ConfigError, match="every row of the evaluation data set must be in the cache, got 1 of 1"
    ):
        AnnealSFTTrainer(str(tiny_llama_dir), held, train_dataset=rows, eval_dataset={"a": missing}, **given)
    shifted = rows.map(lambda row: {"labels": [*row["labels"][1:], -100]})
    with pytest.raises(ConfigError, match="they are not shifted"):
        AnnealSFTTrainer(str(tiny_llama_dir), config, train_dataset=shifted, **given)


def test_another_model_of_the_same_name_is_refused_by_its_numbers(
    tmp_path, tiny_llama_dir, pruned_cache, tokenizer
):
    """Weights changed in memory: no file says so, the KL before the first update does."""
    import torch

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    with torch.no_grad():
        model.lm_head.weight[50:].mul_(1.5)
    trainer = trainer_of(model, tmp_path, data_set(pruned_cache), tokenizer, cache_dir=str(pruned_cache))
    with pytest.raises(IdentityMismatchError, match="before the first update must be at most"):
        trainer.train()


def test_settings_have_one_home():
    """Names and defaults are those of TrainConfig, and none of the objective's is missing."""
    ours = TrainConfig(cache="-", model="-", out="-")
    mine = AnnealSFTConfig.__dataclass_fields__
    assert {name: mine[name].default for name in SETTINGS} == {name: getattr(ours, name) for name in SETTINGS}


def test_a_stream_is_joined_as_it_is_read(tmp_path, tiny_llama_dir, pruned_cache, tokenizer):
    """The losses of a data set of known length; a row that the cache lacks stops the run when it comes."""
    rows, common = data_set(pruned_cache), {"cache_dir": str(pruned_cache), "max_steps": 5}
    found = [
        theirs(trainer_of(str(tiny_llama_dir), tmp_path, given, tokenizer, **common))
        for given in (rows, rows.to_iterable_dataset())
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6) and len(found[0]) == 5
    missing = Dataset.from_list([*rows.select(range(6)), {"input_ids": [9, 8, 7], "labels": [9, 8, 7]}])
    trainer = trainer_of(str(tiny_llama_dir), tmp_path, missing.to_iterable_dataset(), tokenizer, **common)
    with pytest.raises(ConfigError, match="got one of 3 tokens that"):
        trainer.train()


def test_a_run_that_continues(tmp_path, tiny_llama_dir, pruned_cache, tokenizer, capsys):
    """From TRL's own checkpoint: the same steps as without a stop, the budget's coefficient among what is kept."""
    settings_of_run = {"cache_dir": str(pruned_cache), "max_steps": 6, "kl_budget": 0.01}
    rows = data_set(pruned_cache)
    whole = theirs(trainer_of(str(tiny_llama_dir), tmp_path / "whole", rows, tokenizer, **settings_of_run))
    saving = settings_of_run | {"save_strategy": "steps", "save_steps": 3}
    theirs(trainer_of(str(tiny_llama_dir), tmp_path / "run", rows, tokenizer, **saving))
    capsys.readouterr()
    again = trainer_of(str(tiny_llama_dir), tmp_path / "run", rows, tokenizer, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert "step 0" not in capsys.readouterr().err
    resumed = [entry["loss"] for entry in again.state.log_history if "kl" in entry]
    assert resumed == pytest.approx(whole, rel=1e-5)


def test_a_mixture_of_experts_without_its_load_balancing(tmp_path, tokenizer, capsys):
    """TRL would add the coefficient that the model's configuration names; ours says that it does not."""
    from caches import write_cache
    from tiny_models import tiny_config
    from transformers import AutoModelForCausalLM, MixtralConfig

    settings_of_llama = tiny_config("llama").to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = MixtralConfig(
        **{name: settings_of_llama[name] for name in names},
        num_key_value_heads=2,
        num_local_experts=4,
        router_aux_loss_coef=0.1,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    cache = write_cache(tmp_path / "cache", tmp_path / "model", num_rows=8, min_prob=1e-3)
    given = {"cache_dir": str(cache), "max_steps": 2}
    trainer = trainer_of(str(tmp_path / "model"), tmp_path / "out", data_set(cache), tokenizer, **given)
    assert "the load-balancing loss is no part of label annealing, and is off" in capsys.readouterr().err
    assert len(theirs(trainer)) == 2 and trainer.step0.kl < 1e-4
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(entry["ce"] + entry["kl"], rel=1e-5)
