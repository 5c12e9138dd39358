"""What a teacher is, and how to get one.

A teacher turns token rows into packed logprobs: for every position whose next token is selected, the adaptive
head and the tail function of the model's prediction at that position.  Row position i predicts token i + 1.
Two engines implement it: `vllm` (fast, the default) and `transformers` (the readable reference).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from formats.disk.token_row import POSITION_MODES, TokenRow
from formats.errors import AnnealError, ConfigError
from formats.logprobs.tail_draws import MAX_RATE
from formats.logprobs.topk import TopKLogprobs

Engine = Literal["vllm", "transformers"]
ENGINES: tuple[Engine, ...] = ("vllm", "transformers")
DTYPES = ("auto", "float32", "bfloat16", "float16")
HEAD_DTYPES = ("float32", "model")


class TeacherError(AnnealError):
    """The engine failed, or its numbers are unusable."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Settings of a teacher, the same for every engine.

    Raises:
        ConfigError: a value is outside its range.
    """

    model: str
    """Directory of the model, or its Hugging Face name."""
    dtype: str = "auto"
    """Weights and activations: `auto` is the type the checkpoint was saved in."""
    head_dtype: str = "float32"
    """Type of the output projection: `float32`, or `model` for the type of the weights.  16-bit logits
    between 16 and 32 come in steps of 0.125 (bf16), which would be the largest error of the whole
    capture."""
    min_prob: float = 5e-3
    """Entries with at least this probability are kept."""
    max_k: int = 128
    """At most this many entries are kept at a position."""
    draw_rate: int = 0
    """Expected draws of a tail token over the power 3/4 of its probability (`formats/logprobs/tail_draws.py`); 0 draws
    none."""
    positions: str = "loss"
    """`loss`: positions whose next token carries loss; `all`: every position that has a next token."""
    max_length: int = 2048
    """Longest row in tokens."""
    seed: int = 0
    """Passed to the engine; prefill draws no random numbers."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the engine by its own names; strings are converted to the type the engine declares."""
    debug: bool = False
    """Let the engine write its log."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model must be a directory or a Hugging Face name, got an empty string")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.head_dtype not in HEAD_DTYPES:
            raise ConfigError(f"head_dtype must be one of {', '.join(HEAD_DTYPES)}, got {self.head_dtype!r}")
        if not 0.0 <= self.min_prob < 1.0:
            raise ConfigError(f"min_prob must be at least 0 and below 1, got {self.min_prob}")
        if self.max_k < 1:
            raise ConfigError(f"max_k must be at least 1, got {self.max_k}")
        if type(self.draw_rate) is not int or not 0 <= self.draw_rate <= MAX_RATE:
            raise ConfigError(
                f"draw_rate must be a whole number from 0 to {MAX_RATE}, got {self.draw_rate!r}"
            )
        if self.positions not in POSITION_MODES:
            raise ConfigError(f"positions must be one of {', '.join(POSITION_MODES)}, got {self.positions!r}")
        if self.max_length < 2:
            raise ConfigError(f"max_length must be at least 2, got {self.max_length}")
        object.__setattr__(self, "engine_args", dict(self.engine_args))


class Teacher(Protocol):
    """A frozen language model that predicts every selected position of a row.

    Anything with these members can build a cache.
    """

    vocab_size: int
    """Tokens the model can predict, without an engine's padding."""

    def prefill(self, rows: Iterable[TokenRow]) -> Iterator[TopKLogprobs]:
        """One `TopKLogprobs` per row, in order; its length is `len(row.positions(config.positions))`.

        Rows are read as they are needed.  The same rows give the same bits again on the same machine.  The
        tail draws of a position depend on the row's content key and the position alone, beside its logits.

        Raises:
            TeacherError: a row is longer than `max_length`, has an id outside the vocabulary, or the model
                returned NaN.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Everything about the engine that alters numbers: name, version, dtypes, settings.  JSON-ready."""
        ...

    def close(self) -> None:
        """Release the model and stop its processes.  Further calls do nothing."""
        ...


def make_teacher(engine: str, config: TeacherConfig) -> Teacher:
    """Load the model in the named engine.

    Raises:
        ConfigError: unknown engine, an engine that is not installed, or settings it does not accept.
    """
    if engine == "vllm":
        from cache_builder.teachers.vllm_teacher import VLLMTeacher

        return VLLMTeacher(config)
    if engine == "transformers":
        from cache_builder.teachers.transformers_teacher import TransformersTeacher

        return TransformersTeacher(config)
    raise ConfigError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")


def check_row(row: TokenRow, number: int, *, max_length: int, vocab_size: int) -> None:
    """Refuse a row that the model cannot take.

    Raises:
        TeacherError: too long, or an id outside the vocabulary.
    """
    if len(row) > max_length:
        raise TeacherError(
            f"rows must have at most {max_length} tokens (max_length), got {len(row)} in row {number}; "
            "split or truncate it"
        )
    low, high = (int(row.input_ids.min()), int(row.input_ids.max())) if len(row) else (0, 0)
    if low < 0 or high >= vocab_size:
        raise TeacherError(
            f"token ids must be from 0 to {vocab_size - 1} (the model's vocabulary), "
            f"got {high if high >= vocab_size else low} in row {number}; "
            "use the tokenizer that belongs to the model"
        )


def check_numbers(topk: TopKLogprobs, number: int) -> TopKLogprobs:
    """Refuse NaN, which a head entry carries whenever any logit of its position was NaN or infinite.

    Raises:
        TeacherError: the model overflowed.
    """
    if topk.logprobs.size and topk.logprobs.sum() != topk.logprobs.sum():
        raise TeacherError(
            f"logits must be finite, got NaN in row {number}; the model overflows in this dtype, "
            "try --dtype bfloat16 or float32"
        )
    return topk


def checkpoint_dtype(model_config: Mapping[str, Any]) -> str:
    """The type the weights were saved in, from a parsed config.json; float32 when it does not say."""
    for part in (model_config, model_config.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            name = str(part.get(key) or "").removeprefix("torch.")
            if name in DTYPES[1:]:
                return name
    return "float32"


def attention_softcap(model_config: Mapping[str, Any]) -> float | None:
    """The bound on attention scores (Gemma 2), from a parsed config.json; None where the model has none."""
    for part in (model_config, model_config.get("text_config") or {}):
        if part.get("attn_logit_softcapping"):
            return float(part["attn_logit_softcapping"])
    return None


def read_model_config(model: str) -> dict[str, Any]:
    """The model's config.json, from a directory or the Hugging Face cache.

    Raises:
        ConfigError: there is none, or it is not valid.
    """
    import json

    directory = Path(model)
    if directory.is_dir():
        path = directory / "config.json"
        if not path.is_file():
            raise ConfigError(f"a model directory must hold config.json, got {directory} without it")
    else:
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(model, "config.json"))
        except Exception as error:
            raise ConfigError(
                f"model must be a directory or an available Hugging Face name, got {model!r} "
                f"({type(error).__name__})"
            ) from error
    try:
        parsed = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"config.json must be valid JSON, got {path}: {error}") from error
    return parsed
