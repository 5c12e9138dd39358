"""What the corpus needs from a model directory: its tokenizer and its longest context. No weights, no
torch."""

from pathlib import Path
from typing import Any

from formats.errors import ConfigError, one_line
from formats.identity.config_file import read_config

DEFAULT_MAX_LENGTH = 2048
# Any one of them makes a directory hold a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
# The names architectures give to their context length, most common first.
CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)


def load_tokenizer(model_dir: str | Path) -> Any:
    """The tokenizer of a model directory, as `transformers` loads it; never runs code from the directory.

    Raises:
        ConfigError: the directory is missing, or holds no tokenizer that can be loaded.
    """
    directory = Path(model_dir)
    if not directory.is_dir():
        raise ConfigError(f"model must be a directory with a model and its tokenizer, got {directory}")
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(
            f"the model directory must hold a tokenizer (tokenizer.json or tokenizer.model), got {directory} "
            "without one; copy the files of the base model's tokenizer there"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # a broken file surfaces as any of a dozen classes of three libraries
        reason = one_line(error, whole=True)
        raise ConfigError(f"the tokenizer in {directory} must be loadable, got: {reason}") from error


def model_context(model_dir: str | Path) -> int | None:
    """The longest sequence the model was made for, in tokens, from its config.json; None if it names none.

    Raises:
        ConfigError: there is no readable config.json.
    """
    config = read_config(model_dir, "--model")
    # Multimodal models keep the language model's settings one level down.
    for section in (config, config.get("text_config"), config.get("llm_config")):
        for key in CONTEXT_KEYS:
            value = section.get(key) if isinstance(section, dict) else None
            if isinstance(value, int) and value > 0:
                return value
    return None


def resolve_max_length(max_length: int | None, context: int | None) -> int:
    """`max_length` checked against the model's `context`; without one, 2048 or the context if that is
    shorter.

    Raises:
        ConfigError: longer than the context, or shorter than two tokens.
    """
    if max_length is None:
        return min(DEFAULT_MAX_LENGTH, context or DEFAULT_MAX_LENGTH)
    if max_length < 2:
        raise ConfigError(f"max_length must be at least 2, got {max_length}")
    if context is not None and max_length > context:
        raise ConfigError(
            f"max_length must be at most {context} (the model's context), got {max_length}; "
            f"pass --max-length {context}"
        )
    return max_length
