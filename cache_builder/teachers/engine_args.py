"""What the settings of an engine, given by its own names, say before the engine is there."""

from collections.abc import Mapping
from typing import Any

from formats.errors import ConfigError

PARALLEL_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size")
"""Each multiplies the GPUs that one engine takes."""
DATA_PARALLEL = "data_parallel_"


def by_name(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by their names in Python: `tensor-parallel-size` is `tensor_parallel_size`.

    Raises:
        ConfigError: a key is no text, or a setting is there in both spellings.
    """
    if not all(isinstance(key, str) for key in given):
        raise ConfigError(f"engine_args must map names to values, got {given!r}")
    named: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name in named:
            raise ConfigError(
                f"an engine argument must be given once, got {name} and {name.replace('_', '-')}"
            )
        named[name] = value
    return named


def gpus_per_engine(named: Mapping[str, Any]) -> int:
    """How many GPUs one engine takes, where there are GPUs.

    Raises:
        ConfigError: a size is no number of at least 1, or the engine would be split by data.
    """
    refuse_data_parallel(named)
    gpus = 1
    for name in PARALLEL_SIZES:
        try:
            size = int(named.get(name) or 1)
        except (TypeError, ValueError):
            size = 0
        if size < 1:
            raise ConfigError(
                f"engine argument {name} must be a whole number of at least 1, got {named[name]!r}"
            )
        gpus *= size
    return gpus


def refuse_data_parallel(named: Mapping[str, Any]) -> None:
    """vLLM would start an engine for every part and send all rows to the first.

    Raises:
        ConfigError: the engine would be split by data.
    """
    for name, value in named.items():
        if name.startswith(DATA_PARALLEL) and not (name == DATA_PARALLEL + "size" and str(value) == "1"):
            raise ConfigError(
                f"an engine must not be split by data, got engine argument {name} = {value!r}; run the same command "
                "once per GPU (CUDA_VISIBLE_DEVICES), or with --ray"
            )
