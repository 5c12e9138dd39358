"""Whose results they are: the fingerprint of a model's weights, of full models and of adapters alone."""

from pathlib import Path

from formats.errors import ConfigError
from formats.identity.config_file import is_adapter, read_adapter_config
from formats.identity.fingerprint import (
    ModelFingerprint,
    resolve_model,
    sha256_json,
    stable_config,
    tokenizer_files_fingerprint,
    weight_files,
)
from formats.identity.tensor_hash import hash_tensors


def model_identity(directory: Path) -> dict[str, str]:
    """What results belong to: `weights` and `config` as in `ModelFingerprint`, and `vocabulary`.

    For adapters: their tensors, and their configuration with the identity of the model they belong to.

    Raises:
        ConfigError: not a model, or the model of the adapters is not there.
        FormatError: a weight file is torn.
    """
    vocabulary = tokenizer_files_fingerprint(directory).get("vocabulary", "")
    if not is_adapter(directory):
        fingerprint = ModelFingerprint.of(directory)
        return {"weights": fingerprint.weights, "config": fingerprint.config, "vocabulary": vocabulary}
    config = read_adapter_config(directory)
    base = str(config.pop("base_model_name_or_path"))
    files = [path for path in weight_files(directory) if path.suffix == ".safetensors"]
    if not files:
        raise ConfigError(f"adapters must be *.safetensors, got none in {directory}; save them again")
    return {
        "weights": sha256_json(sorted(hash_tensors(files).items())),
        "config": sha256_json(
            [
                stable_config(config),
                model_identity(resolve_model(base, what=f"base_model_name_or_path of {directory}")),
            ]
        ),
        "vocabulary": vocabulary,
    }
