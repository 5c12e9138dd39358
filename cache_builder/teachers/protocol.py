"""What a teacher and a sampler are, and what they are told.

A teacher turns token rows into packed logprobs: for every position whose next token is selected, the adaptive
head and the tail function of the model's prediction at that position.  Row position i predicts token i + 1.
A sampler lets the same model write rows of its own.
Two engines implement both: `vllm` (fast, the default) and `transformers` (the readable reference).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from cache_builder.teachers.engine_args import by_name
from formats.capture_settings import CaptureSettings
from formats.disk.token_row import TokenRow
from formats.errors import AnnealError, ConfigError
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
    """Weights and activations: `auto` is the type the checkpoint was saved in, or float32 on a CPU that has no
    instructions for that type (`fast_dtype.py`)."""
    head_dtype: str = "float32"
    """Type of the output projection: `float32`, or `model` for the type of the weights.  16-bit logits
    between 16 and 32 come in steps of 0.125 (bf16), which would be the largest error of the whole
    capture."""
    capture: CaptureSettings = field(default_factory=CaptureSettings)
    """Which positions, and what of each of them."""
    max_length: int = 2048
    """Longest row in tokens."""
    wave_tokens: int | None = None
    """At most so many tokens are handed to vLLM at a time, in effect what progress waits for; None is sixteen
    of its steps. Rows of one wave share steps, so the last bits of their numbers depend on it."""
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
        if self.max_length < 2:
            raise ConfigError(f"max_length must be at least 2, got {self.max_length}")
        object.__setattr__(self, "engine_args", by_name(self.engine_args))


class Teacher(Protocol):
    """A frozen language model that predicts every selected position of a row.

    Anything with these members can build a cache.
    """

    vocab_size: int
    """Tokens the model can predict, without an engine's padding."""

    def prefill(self, rows: Iterable[TokenRow]) -> Iterator[TopKLogprobs]:
        """One `TopKLogprobs` per row, in order; its length is `len(row.positions(config.capture.positions))`.

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


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One row to be written on."""

    prompt: np.ndarray
    """int32 [L], at least one token: what stands before."""
    max_new_tokens: int
    """It ends after so many new tokens at the latest..."""
    stop_tokens: tuple[int, ...]
    """... or with one of these, which is kept."""
    temperature: float
    """Of the softmax that is drawn from; nothing of it is cut off."""
    seed: int
    """Of this row's random numbers, at most 63 bits."""


class Sampler(Protocol):
    """A frozen language model that continues rows with tokens drawn from its own predictions."""

    vocab_size: int
    """Tokens the model can predict, without an engine's padding."""

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the request, its new tokens as int32 [L]), each as soon as it is there, in any order.

        A row's random numbers depend on its seed alone. The same requests give the same tokens again on the same
        machine; among other requests a token may differ where two are equally probable up to rounding.

        Raises:
            TeacherError: the engine failed.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """As `Teacher.describe`."""
        ...

    def close(self) -> None:
        """Release the model and stop its processes.  Further calls do nothing."""
        ...


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
