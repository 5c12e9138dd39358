"""Whose results they are: adapters must say which model they are for."""

from pathlib import Path

import pytest

from formats.errors import ConfigError
from formats.identity.config_file import ADAPTER_FILE, read_adapter_config
from trainer.bench.model_identity import model_identity
from trainer.multimodal import auto_class


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", r"a model's adapter_config\.json must be a JSON object"),
        (
            "{}",
            "adapters must name their model as base_model_name_or_path in adapter_config.json, got None in ",
        ),
        ('{"base_model_name_or_path": ["a"]}', r"must name their model .* got \['a'\]"),
    ],
)
def test_adapters_that_name_no_model(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / ADAPTER_FILE).write_text(content)
    for read in (read_adapter_config, model_identity, auto_class):
        with pytest.raises(ConfigError, match=said):
            read(tmp_path)
