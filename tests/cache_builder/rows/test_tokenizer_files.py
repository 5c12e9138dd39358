"""Tokenizer and context length out of a model directory."""

import json
from pathlib import Path
from typing import Any

import pytest

from cache_builder.rows.tokenizer_files import load_tokenizer, model_context, resolve_max_length
from formats.errors import ConfigError


def test_the_tokenizer_of_a_model_directory(tiny_llama_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama_dir)
    assert tokenizer.decode(tokenizer("def f(x):")["input_ids"]) == "def f(x):"
    assert model_context(tiny_llama_dir) == 1024


def test_a_directory_without_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value) == (
        f"the model directory must hold a tokenizer (tokenizer.json or tokenizer.model), got {tmp_path} "
        "without one; "
        "copy the files of the base model's tokenizer there"
    )


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model must be a directory with a model and its tokenizer, got "):
        load_tokenizer(tmp_path / "none")


@pytest.mark.parametrize("content", ["", "{}", '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ConfigError, match=r"^the tokenizer in .* must be loadable, got: ") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_code_in_a_model_directory_is_not_run(tmp_path: Path, tiny_llama_dir: Path) -> None:
    for source in tiny_llama_dir.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(
        f"open({str(marker)!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast as Evil\n"
    )
    try:
        load_tokenizer(tmp_path)
    except ConfigError as error:
        assert "\n" not in str(error)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024}, 1024),
        (
            {
                "text_config": {"max_position_embeddings": 8192},
                "vision_config": {"max_position_embeddings": 77},
            },
            8192,
        ),
        ({"hidden_size": 64}, None),
        ({"max_position_embeddings": None, "n_ctx": 512}, 512),
    ],
)
def test_context_under_its_many_names(tmp_path: Path, config: dict[str, Any], context: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_context(tmp_path) == context


@pytest.mark.parametrize("content", ["{", "[]"])
def test_an_unreadable_config_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json must be (readable JSON|a JSON object), got "):
        model_context(tmp_path)


def test_a_directory_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be a model directory, got no config\.json in "):
        model_context(tmp_path)


def test_max_length_defaults_and_limits() -> None:
    assert resolve_max_length(None, 1024) == 1024
    assert resolve_max_length(None, 131072) == 2048
    assert resolve_max_length(None, None) == 2048
    assert resolve_max_length(2048, 2048) == 2048
    assert resolve_max_length(9999, None) == 9999
    with pytest.raises(ConfigError) as caught:
        resolve_max_length(4096, 2048)
    assert str(caught.value) == (
        "max_length must be at most 2048 (the model's context), got 4096; pass --max-length 2048"
    )
    with pytest.raises(ConfigError, match="max_length must be at least 2, got 1"):
        resolve_max_length(1, 2048)
