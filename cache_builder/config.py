"""What a build is told: one frozen dataclass, checked at construction."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from cache_builder.generation.settings import GenerationConfig
from cache_builder.teachers.engine_args import by_name
from cache_builder.teachers.protocol import DTYPES, ENGINES, HEAD_DTYPES
from formats.capture_settings import CaptureSettings
from formats.codec.config import CodecConfig
from formats.disk.output_file import refuse_address
from formats.errors import ConfigError

DEFAULT_ROWS_PER_SHARD = 4096


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Corpus, model, output and every setting that decides the contents of a cache.

    Raises:
        ConfigError: a value is out of its range; the message says which and what is allowed.
    """

    corpus: str = ""
    """File, directory, glob or Hugging Face data set name; empty with `generate`."""
    generate: GenerationConfig | None = None
    """Let the model write the corpus itself."""
    model: str
    """Model directory or Hugging Face name: the teacher, whose initial weights the training starts from."""
    out: str
    """Directory of the cache; made if missing."""
    engine: str = "vllm"
    """`vllm`, or `transformers` where vLLM cannot be installed."""
    revision: str | None = None
    """Revision of a Hugging Face model; None is its main branch."""
    max_length: int | None = None
    """Longest row in tokens; None is 2048, or the model's context if that is shorter."""
    min_prob: float = CaptureSettings.min_prob
    """Entries with at least this probability are kept."""
    max_k: int = CaptureSettings.max_k
    """At most this many entries are kept per position."""
    draw_rate: int = CaptureSettings.draw_rate
    """Tail tokens drawn per position: this rate times the sum of p^(3/4) over the tail (docs/method.md), 0
    for none."""
    positions: str = CaptureSettings.positions
    """`loss` captures positions whose next token carries loss, `all` every position that has a next token."""
    limit: int | None = None
    """Read only so many records of the corpus."""
    text_column: str | None = None
    """Column to train on as plain text; None recognises the layout."""
    split: str | None = None
    """Split of a data set or directory; None is `train`."""
    seed: int | None = None
    """With `limit`: draw the records at random with this seed instead of taking the first ones."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables that the chat template gets for every conversation, such as `enable_thinking`."""
    template_time: str | None = None
    """The instant that a chat template with `strftime_now` tells, in ISO form; None is the one that the build in `out`
    has recorded, or now."""
    dtype: str = "auto"
    """Numerical type of the engine's weights."""
    head_dtype: str = "float32"
    """Numerical type of the output projection, `float32` or `model`; see `TeacherConfig`."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """Settings passed to the engine unchanged, such as `tensor_parallel_size`."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    """How the payloads are encoded."""
    rows_per_shard: int = DEFAULT_ROWS_PER_SHARD
    """A shard ends after so many rows..."""
    tokens_per_shard: int | None = None
    """... or before it would exceed so many tokens. One shard is what a killed worker costs; None expects
    twenty seconds of this machine (`pace.py`), or is what an unfinished build in `out` was begun with."""
    overwrite: bool = False
    """Discard the cache or the unfinished build that `out` holds. Never touches a directory of another
    kind."""
    shards: tuple[int, int] | None = None
    """Capture only the shards first:last (last excluded), for those who divide the work themselves."""
    heartbeat_seconds: float = 10.0
    """How often a worker renews its claims. A claim not renewed for twelve times as long is taken over."""

    def __post_init__(self) -> None:
        for name in ("corpus", "model", "out"):
            object.__setattr__(self, name, str(getattr(self, name)))
            if not getattr(self, name) and not (name == "corpus" and self.generate is not None):
                raise ConfigError(f"{name} must be given, got an empty string")
        refuse_address("--out", self.out)
        if self.generate is not None:
            self._refuse_settings_of_a_corpus()
        elif self.seed is not None and self.limit is None:
            raise ConfigError(
                f"seed draws so many records as limit says, got seed {self.seed} without limit; pass --limit N, or "
                "leave it out"
            )
        self.codec.require_codes(self.capture.min_prob, self.capture.max_k)
        for name, value, allowed in (
            ("engine", self.engine, ENGINES),
            ("dtype", self.dtype, DTYPES),
            ("head_dtype", self.head_dtype, HEAD_DTYPES),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        for name, least in (
            ("max_length", 2),
            ("rows_per_shard", 1),
            ("tokens_per_shard", 1),
            ("limit", 1),
        ):
            number = getattr(self, name)
            if number is None and name in ("limit", "max_length", "tokens_per_shard"):
                continue
            if type(number) is not int or number < least:
                raise ConfigError(f"{name} must be a whole number of at least {least}, got {number!r}")
        if not (math.isfinite(self.heartbeat_seconds) and self.heartbeat_seconds > 0):
            raise ConfigError(f"heartbeat_seconds must be above 0, got {self.heartbeat_seconds!r}")
        object.__setattr__(self, "engine_args", by_name(self.engine_args))
        if not all(isinstance(key, str) for key in self.chat_template_kwargs):
            raise ConfigError(
                f"chat_template_kwargs must map names to values, got {self.chat_template_kwargs!r}"
            )
        object.__setattr__(self, "chat_template_kwargs", dict(self.chat_template_kwargs))
        if self.template_time is not None:
            try:
                datetime.fromisoformat(self.template_time)
            except (TypeError, ValueError):
                raise ConfigError(
                    f"template_time must be a time such as 2026-11-25T08:00, got {self.template_time!r}"
                ) from None
        if self.shards is not None:
            first, last = self.shards
            if not 0 <= first < last:
                raise ConfigError(f"shards must be first:last with 0 <= first < last, got {first}:{last}")

    def _refuse_settings_of_a_corpus(self) -> None:
        for name in ("corpus", "text_column", "split", "limit", "seed"):
            if (value := getattr(self, name)) not in (None, ""):
                remedy = "set the seed of generate" if name == "seed" else "leave it out"
                raise ConfigError(f"generate makes its own text and takes no {name}, got {value}; {remedy}")

    @property
    def capture(self) -> CaptureSettings:
        """What of every prediction is stored; the checks of these settings are there."""
        return CaptureSettings(
            positions=self.positions, min_prob=self.min_prob, max_k=self.max_k, draw_rate=self.draw_rate
        )

    @property
    def directory(self) -> Path:
        """`out` as a path."""
        return Path(self.out).expanduser()
