"""The settings of a payload codec, with their ranges."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from formats.capture_settings import MAX_RATE
from formats.errors import DEVELOPMENT_CACHE, ConfigError, UnsupportedVersionError

PROBABILITY_KINDS = ("companded", "float32")
MASS_TOLERANCE = 0.02
"""By how much the probabilities of a position may miss 1."""


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """How payloads are encoded. The defaults were chosen by measurement (docs/benchmarks.md).

    Raises:
        ConfigError: a value out of range.
    """

    probabilities: str = "companded"
    """`companded`: probabilities as 1-2 byte codes, tails in steps; `float32`: both exact, for proofs."""
    sqrt_steps: int = 200
    """Steps in sqrt(p): the resolution of small probabilities, which matters at high temperatures."""
    linear_steps: int = 640
    """Further steps in p: the resolution of large probabilities, which matters at low temperatures."""
    tail_steps: int = 32
    """Steps per nat of the tail nodes: their error is at most half a step, down to -32,767 steps;
    everything below (-1,024 nats) is stored as that."""
    rank_ids: bool = True
    """Store ids by frequency rank, with the table in the shard; False stores them as they are."""
    zstd_level: int = 3
    """Compression level, 1 to 19: reading is equally fast for all of them, writing is not."""
    draw_rate: int = 0
    """Expected draws of a tail token over the power 3/4 of its probability; 0 stores none. It is the rate
    of the capture (`CaptureSettings`)."""
    draw_steps: int = 16
    """Steps per nat of a drawn token's logprob: its error is at most half a step, a relative error of p."""

    def __post_init__(self) -> None:
        if self.probabilities not in PROBABILITY_KINDS:
            raise ConfigError(
                f"probabilities must be one of {', '.join(PROBABILITY_KINDS)}, got {self.probabilities!r}"
            )
        for name, low, high in (
            ("sqrt_steps", 1, 1 << 14),
            ("linear_steps", 0, 1 << 15),
            ("tail_steps", 1, 256),
            ("zstd_level", 1, 19),
            ("draw_rate", 0, MAX_RATE),
            ("draw_steps", 1, 1 << 10),
        ):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ConfigError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
        if type(self.rank_ids) is not bool:
            raise ConfigError(f"rank_ids must be true or false, got {self.rank_ids!r}")

    @classmethod
    def lossless(cls) -> "CodecConfig":
        """Exact float32 logprobs and tails; with `max_k` = V the cache holds the full distribution."""
        return cls(probabilities="float32")

    @property
    def least_prob(self) -> float:
        """The smallest probability that has a code: whatever is below and not 0 is stored as this; 0 where all are
        stored exactly."""
        if self.probabilities == "float32":
            return 0.0
        a, b = self.sqrt_steps, self.linear_steps
        root = (math.sqrt(a * a + 4 * b) - a) / (2 * b) if b else 1 / a
        return root * root

    def require_codes(self, min_prob: float, max_k: int) -> None:
        """Refuse to keep so many tokens of probabilities that have no code of their own that what they are rounded up
        by changes a distribution.

        Raises:
            ConfigError: names the least `min_prob`.
        """
        least = self.least_prob
        if min_prob < least and max_k * least > MASS_TOLERANCE:
            most = math.floor(MASS_TOLERANCE / least)
            raise ConfigError(
                f"min_prob must be at least {1.01 * least:.3g} where max_k is above {most}, got {min_prob:g} and "
                f"{max_k}: smaller probabilities are all stored as that one, and so many would add up"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Any) -> "CodecConfig":
        """Inverse of `to_dict`.

        Raises:
            UnsupportedVersionError: keys or values that this version does not have.
        """
        known = {item.name for item in fields(cls)}
        if isinstance(content, dict) and set(content) == known - {"draw_rate", "draw_steps"}:
            raise UnsupportedVersionError(f"the codec has no tail draws: {DEVELOPMENT_CACHE}")
        if not isinstance(content, dict) or set(content) != known:
            raise UnsupportedVersionError(
                f"the codec must have the keys {', '.join(sorted(known))}, got {str(content)[:200]}; "
                "upgrade anneal"
            )
        try:
            return cls(**content)
        except ConfigError as error:
            raise UnsupportedVersionError(f"this codec is not known: {error}; upgrade anneal") from None
