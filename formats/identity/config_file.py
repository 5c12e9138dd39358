"""The one reader of the JSON files that say what a model is."""

import json
from pathlib import Path
from typing import Any

from formats.errors import ConfigError

ADAPTER_FILE = "adapter_config.json"
"""What adapters have beside them where a model has its `config.json`."""

KINDS: dict[str, tuple[type, str]] = {
    "architectures": (list, "a list"),
    "text_config": (dict, "an object"),
    "vocab_size": (int, "a whole number"),
}
"""What is read of these files by more than one of us: key -> its type, and what it is called."""


def read_config(model_dir: str | Path, given: str = "MODEL", name: str = "config.json") -> dict[str, Any]:
    """The `config.json` of a directory as `save_pretrained` leaves it, or another such file.

    Args:
        given: what the user named the directory with, for the message.
        name: of the file.

    Raises:
        ConfigError: there is none, it cannot be read, it is no JSON object, or one of `KINDS` is something else.
    """
    path = Path(model_dir) / name
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{given} must be a model directory, got no {name} in {path.parent}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"a model's {name} must be readable JSON, got {path}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(
            f"a model's {name} must be a JSON object, got {path} with a {type(config).__name__}"
        )
    for key, (kind, word) in KINDS.items():
        if not isinstance(value := config.get(key), kind | None):
            raise ConfigError(f"{key} in a model's {name} must be {word}, got {value!r} in {path}")
    return config


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds adapters without the model they belong to."""
    return (directory / ADAPTER_FILE).is_file() and not (directory / "config.json").is_file()


def read_adapter_config(model_dir: str | Path) -> dict[str, Any]:
    """`ADAPTER_FILE` of a directory with adapters; its `base_model_name_or_path` is the model that they are for.

    Raises:
        ConfigError: as `read_config`, or it names no model.
    """
    config = read_config(model_dir, name=ADAPTER_FILE)
    if not isinstance(base := config.get("base_model_name_or_path"), str) or not base:
        raise ConfigError(
            f"adapters must name their model as base_model_name_or_path in {ADAPTER_FILE}, got {base!r} in "
            f"{model_dir}; save them again"
        )
    return config
