"""`anneal init` writes settings that `anneal train` reads, and commands that run as they are printed."""

import json
import shlex
from dataclasses import replace

import numpy as np
import pytest

from formats.errors import ConfigError
from onboarding.init.look import Look, look_at
from onboarding.init.settings_file import plan_for, text_of, write
from trainer.config_file import load_config


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "talk.jsonl"
    with open(path, "w") as file:
        for number in range(40):
            said = (("user", f"add {number}"), ("assistant", "sum " * (number + 1)))
            turns = [{"role": role, "content": text} for role, text in said]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def test_look(corpus, tiny_llama_dir):
    """Lengths, loss and size are those of the real rows and the real model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cache_builder.corpus.corpus import CorpusConfig, open_corpus
    from cache_builder.rows.tokenise import tokenise

    look = look_at(str(corpus), str(tiny_llama_dir))
    rows = list(
        tokenise(open_corpus(CorpusConfig(source=str(corpus))), AutoTokenizer.from_pretrained(tiny_llama_dir))
    )
    assert look.lengths.tolist() == sorted(len(row) for row in rows) and look.whole
    assert look.loss_share == pytest.approx(sum(r.loss_mask.sum() for r in rows) / sum(map(len, rows)))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    assert look.num_parameters == sum(p.numel() for p in model.parameters()) and look.context == 1024


def test_column_and_split_are_those_of_the_build(tmp_path, tiny_llama_dir, anneal, monkeypatch):
    """A corpus that is refused with the advice to name its column: init takes the name, and its command runs."""
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 3), ("test", 5)):
        lines = [json.dumps({"its body": f"add {number} " * 9, "id": number}) for number in range(count)]
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    words = ("init", "data", "--model", tiny_llama_dir)
    code, _, err = anneal(*words)
    assert code == 1 and "pass --text-column NAME" in err and err.count("\n") == 1
    code, out, err = anneal(*words, "--text-column", "its body", "--split", "test")
    assert code == 0, err
    build = shlex.split(out.splitlines()[1])[1:]
    code, out, err = anneal(*build, "--engine", "transformers")
    assert code == 0 and "5 rows" in out, err


def test_from_init_to_a_trained_model(tmp_path, corpus, tiny_llama_dir, anneal, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = anneal("init", corpus, "--model", tiny_llama_dir)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "train.yaml written; next:" and len(lines) == 3
    build, train = (shlex.split(line)[1:] for line in lines[1:])
    code, _, err = anneal(*build, "--engine", "transformers")
    assert code == 0, err
    code, out, err = anneal(*train, "--set", "training.max_steps=2", "--set", "training.use_cpu=true")
    assert code == 0 and "step 0" in err and (tmp_path / "tuned" / "model.safetensors").is_file(), err
    (tmp_path / "tuned").rename(tmp_path / "plain")
    (write_dialogues, retain, average) = [
        shlex.split(line)[2:]
        for line in (tmp_path / "train.yaml").read_text().splitlines()
        if line.startswith("#     anneal")
    ]
    write_dialogues[write_dialogues.index("--generate") + 1] = "4"
    for words in (
        [*write_dialogues, "--engine", "transformers"],
        [*retain, "--set", "training.max_steps=2", "--set", "training.use_cpu=true"],
        average,
    ):
        code, _, err = anneal(*words)
        assert code == 0, err
    assert (tmp_path / "tuned-half" / "model.safetensors").is_file()
    code, _, err = anneal("init", corpus, "--model", tiny_llama_dir)
    assert code == 1 and "--file must name a new file" in err and err.count("\n") == 1
    for more, message in (
        (["--out", "cache"], "--cache and --out must be two directories, got cache for both"),
        (["--cache", "s3://bucket/c"], "--cache must be a directory on this machine, got the address"),
    ):
        code, _, err = anneal("init", corpus, "--model", tiny_llama_dir, "--file", "other.yaml", *more)
        assert code == 1 and message in err and err.count("\n") == 1
        assert not (tmp_path / "other.yaml").exists()


LOOK = Look(
    corpus="talk.jsonl",
    text_column=None,
    split=None,
    model="owner/model",
    described=["format: messages"],
    num_records=512,
    whole=False,
    lengths=np.sort(np.arange(100, 612)),
    loss_share=0.4,
    context=4096,
    has_template=False,
    num_parameters=135_000_000,
    gpu_gib=0.0,
    memory_gib=64.0,
)


@pytest.mark.parametrize(
    ("look", "expected"),
    [
        (LOOK, {"max_length": 1216, "packing": False, "lora": False, "batch": 4, "accumulation": 8}),
        (replace(LOOK, num_parameters=8_000_000_000, gpu_gib=79.0), {"lora": True}),
        (replace(LOOK, num_parameters=1_000_000_000, gpu_gib=79.0), {"lora": False}),
        (replace(LOOK, num_parameters=None), {"lora": False}),
        (replace(LOOK, context=512), {"max_length": 512, "batch": 8, "accumulation": 4}),
        (replace(LOOK, lengths=np.array([50] * 90 + [1500] * 10)), {"max_length": 2048, "packing": True}),
        (
            replace(LOOK, whole=True, lengths=np.array([9] * 16)),
            {"max_length": 9, "batch": 2, "accumulation": 1},
        ),
        (replace(LOOK, whole=True, lengths=np.array([3])), {"max_length": 3, "batch": 1, "accumulation": 1}),
    ],
)
def test_what_is_chosen(look, expected, tmp_path):
    """And whatever is chosen, `anneal train` takes the file."""
    plan = plan_for(look)
    assert {name: getattr(plan, name) for name in expected} == expected
    path = tmp_path / "train.yaml"
    assert write(look, path, cache="my cache", out="tuned") == plan
    config = load_config(path)
    assert (config.cache, config.model, config.packing) == ("my cache", "owner/model", plan.packing)
    assert (
        config.training["per_device_train_batch_size"] == plan.batch
        and (config.lora is not None) == plan.lora
    )
    assert "--out 'my cache' --max-length" in text_of(
        look, plan, cache="my cache", out="tuned", path="train.yaml"
    )
    with pytest.raises(ConfigError, match="must name a new file"):
        write(look, path, cache="c", out="o")


def test_without_vllm_the_commands_build_with_transformers(monkeypatch):
    """As after README's first installation; with vLLM its name is not needed."""
    words = {"cache": "c", "out": "o", "path": "train.yaml"}
    for found, wanted in ((None, True), (object(), False)):
        monkeypatch.setattr("onboarding.init.settings_file.find_spec", lambda name, found=found: found)
        assert ("--max-length 1216 --engine transformers" in text_of(LOOK, plan_for(LOOK), **words)) is wanted


def test_plain_text_is_held_less():
    """A coefficient that costs nothing of answers in chat costs a fifth of what plain text teaches."""
    words = {"cache": "c", "out": "o", "path": "train.yaml"}
    for share, wanted in ((0.4, 10), (0.997, 3)):
        look = replace(LOOK, has_template=True, loss_share=share)
        assert f"--set loss=ce --kl-coef {wanted} " in text_of(look, plan_for(look), **words)


def test_one_row_a_step():
    """`1 rows`, and a batch of one that was to be halved."""
    look = replace(LOOK, whole=True, lengths=np.array([3]))
    text = text_of(look, plan_for(look), cache="c", out="o", path="train.yaml")
    assert "# 1 row a step" in text and "halve it" not in text
