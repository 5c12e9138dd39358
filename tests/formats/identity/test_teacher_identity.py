"""An identity names its differences; moving things makes none."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from formats.errors import ConfigError, IdentityMismatchError
from formats.identity.fingerprint import ModelFingerprint, TokenizerFingerprint
from formats.identity.teacher_identity import TeacherIdentity, refuse, require_same_teacher

BASE = TeacherIdentity(
    teacher={
        "weights": "a" * 64,
        "config": "b" * 64,
        "engine": "vllm",
        "engine_version": "1",
        "name": "here",
    },
    tokenizer={"vocabulary": "c" * 64, "chat_template": ""},
    corpus={"source": "/data/x.jsonl", "fingerprint": "d" * 64},
    preprocessing={"max_length": 2048, "min_prob": 1e-3, "positions": "loss"},
)


def changed(section: str, key: str, value: object) -> TeacherIdentity:
    data = BASE.to_dict()
    data[section][key] = value
    return TeacherIdentity.from_dict(data)


def test_round_trip_through_json() -> None:
    again = TeacherIdentity.from_dict(json.loads(json.dumps(BASE.to_dict())))
    assert again == BASE and again.digest() == BASE.digest()


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("teacher", "weights", "e" * 64, "model weights: aaaaaaaaaaaa in the cache, eeeeeeeeeeee given"),
        ("teacher", "engine_version", "2", "teacher.engine_version: 1 in the cache, 2 given"),
        ("tokenizer", "chat_template", "f" * 64, "chat template: none in the cache, ffffffffffff given"),
        ("corpus", "fingerprint", "0" * 64, "corpus contents"),
        ("preprocessing", "max_length", 1024, "maximum length: 2048 in the cache, 1024 given"),
        ("preprocessing", "new_setting", True, "preprocessing.new_setting: none in the cache, true given"),
    ],
)
def test_each_part_is_named(section: str, key: str, value: object, words: str) -> None:
    other = changed(section, key, value)
    assert other.digest() != BASE.digest()
    with pytest.raises(IdentityMismatchError) as caught:
        refuse(BASE.differences(other))
    message = str(caught.value)
    assert words in message and "rebuild" in message and "\n" not in message
    refuse(BASE.differences(other, [s for s in BASE.to_dict() if s != section]))


@pytest.mark.parametrize(("section", "key"), [("teacher", "name"), ("corpus", "source")])
def test_names_and_places_are_no_identity(section: str, key: str) -> None:
    other = changed(section, key, "elsewhere")
    refuse(BASE.differences(other))
    assert other.digest() == BASE.digest()


def test_all_differences_in_one_message() -> None:
    data = BASE.to_dict()
    data["teacher"]["weights"] = data["tokenizer"]["vocabulary"] = "9" * 64
    with pytest.raises(IdentityMismatchError, match=r"model weights.*tokenizer vocabulary"):
        refuse(BASE.differences(TeacherIdentity.from_dict(data)))


def test_bad_sections_are_refused() -> None:
    with pytest.raises(ConfigError, match="JSON"):
        TeacherIdentity(teacher={"x": object()})
    with pytest.raises(ConfigError, match="sections"):
        TeacherIdentity.from_dict({"teachers": {}})
    with pytest.raises(ConfigError, match="must map"):
        TeacherIdentity.from_dict({"teacher": []})


@pytest.fixture
def identity(tiny_llama_dir: Path, tiny_tokenizer) -> TeacherIdentity:
    model = ModelFingerprint.of(tiny_llama_dir)
    return TeacherIdentity(
        teacher={"weights": model.weights, "config": model.config},
        tokenizer=vars(TokenizerFingerprint.of(tiny_tokenizer)),
        preprocessing={"max_length": 256},
    )


def test_same_teacher_elsewhere_is_no_mismatch(
    identity: TeacherIdentity, tiny_llama_dir: Path, tiny_tokenizer, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama_dir, tmp_path / "copy")
    assert require_same_teacher(identity, tmp_path / "copy", max_length=256) == [
        "model weights",
        "model configuration (config.json)",
        "tokenizer vocabulary",
        "chat template",
        "maximum length",
    ]
    assert "special tokens" in require_same_teacher(identity, tmp_path / "copy", tiny_tokenizer)


def test_a_saved_and_reloaded_model_is_the_same_teacher(
    identity: TeacherIdentity, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(tiny_llama_dir).save_pretrained(
        tmp_path / "m", max_shard_size="500KB"
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.save_pretrained(tmp_path / "m")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    require_same_teacher(identity, tmp_path / "m", AutoTokenizer.from_pretrained(tmp_path / "m"))


def test_every_part_of_another_teacher_is_refused(
    identity: TeacherIdentity, tiny_llama_dir: Path, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    weights = tmp_path / "weights"
    shutil.copytree(tiny_llama_dir, weights)
    tensors = load_file(weights / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + np.float32(2**-20)
    save_file(tensors, weights / "model.safetensors")
    with pytest.raises(IdentityMismatchError, match="model weights"):
        require_same_teacher(identity, weights)

    config = tmp_path / "config"
    shutil.copytree(tiny_llama_dir, config)
    data = json.loads((config / "config.json").read_text())
    (config / "config.json").write_text(json.dumps({**data, "rms_norm_eps": 1e-4}))
    with pytest.raises(IdentityMismatchError, match="model configuration"):
        require_same_teacher(identity, config)

    template = tmp_path / "template"
    shutil.copytree(tiny_llama_dir, template)
    (template / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(IdentityMismatchError, match="chat template"):
        require_same_teacher(identity, template)

    other = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    other.bos_token = "<pad>"
    with pytest.raises(IdentityMismatchError, match="special tokens"):
        require_same_teacher(identity, tiny_llama_dir, other)
    with pytest.raises(IdentityMismatchError, match="maximum length: 256 in the cache, 512 given"):
        require_same_teacher(identity, tiny_llama_dir, max_length=512)
