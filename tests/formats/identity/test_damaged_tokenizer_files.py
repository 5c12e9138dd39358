"""Damaged files of a tokenizer end in a line that names them."""

from pathlib import Path

import pytest

from formats.errors import ConfigError
from formats.identity.fingerprint import tokenizer_files_fingerprint


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "tokenizer_config.json",
            "[]",
            r"a model's tokenizer_config\.json must be a JSON object, got .* list",
        ),
        ("tokenizer_config.json", '{"chat_', r"a model's tokenizer_config\.json must be readable JSON, got "),
        (
            "tokenizer_config.json",
            '{"chat_template": [1]}',
            "chat templates must be objects with name and template",
        ),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "tool"}]}',
            "must be objects with name and template",
        ),
        ("tokenizer.json", "[]", r"a model's tokenizer\.json must hold a tokenizer, got "),
    ],
)
def test_damaged_files_of_a_tokenizer(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=said) as caught:
        tokenizer_files_fingerprint(tmp_path)
    assert "\n" not in str(caught.value)
