"""The settings of a payload codec: their ranges, and which version of the format has which."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from formats.errors import ConfigError, UnsupportedVersionError
from formats.logprobs.features import MAX_FEATURES
from formats.logprobs.tail_draws import MAX_RATE

PROBABILITY_KINDS = ("companded", "float32")
_SINCE_VERSION_2 = ("num_features", "moment_steps")
_SINCE_VERSION_3 = ("draw_rate", "draw_steps")


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """How payloads are encoded. The defaults were chosen by measurement (docs/benchmarks.md).

    Raises:
        ConfigError: a value out of range.
    """

    probabilities: str = "companded"
    """`companded`: probabilities as 1-2 byte codes, tails in steps; `float32`: both exact, for proofs."""
    sqrt_steps: int = 560
    """Steps in sqrt(p): the resolution of small probabilities, which matters at high temperatures."""
    linear_steps: int = 1800
    """Further steps in p: the resolution of large probabilities, which matters at low temperatures."""
    tail_steps: int = 256
    """Steps per nat of the tail nodes: their error is at most half a step, down to -32,767 steps (-128 nats);
    everything below is stored as that."""
    rank_ids: bool = True
    """Store ids by frequency rank, with the table in the shard; False stores them as they are."""
    zstd_level: int = 12
    """Compression level, 1 to 19: reading is equally fast for all of them, writing is not."""
    num_features: int = 0
    """F: tail moments per position, one for each token feature of the cache; 0 stores none."""
    moment_steps: int = 128
    """Steps per standard deviation of a feature, times probability: a moment's error is half a step."""
    draw_rate: int = 0
    """Expected draws of a tail token over the power 3/4 of its probability; 0 draws none."""
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
            ("num_features", 0, MAX_FEATURES),
            ("moment_steps", 1, 1 << 12),
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
    def format_version(self) -> int:
        """The oldest version of the format that can express this: 3 with tail draws, 2 with tail moments,
        else 1."""
        return 3 if self.draw_rate else 2 if self.num_features else 1

    @property
    def moment_resolution(self) -> int | None:
        """Steps of a stored moment; None where moments are stored exactly."""
        return None if self.probabilities == "float32" else self.moment_steps

    def to_dict(self) -> dict[str, Any]:
        """JSON form; without the keys that its version does not have."""
        content = asdict(self)
        for name in _unknown_to(self.format_version):
            del content[name]
        return content

    @classmethod
    def from_dict(cls, content: Any, version: int) -> "CodecConfig":
        """Inverse of `to_dict`, for a cache of format `version`.

        Raises:
            UnsupportedVersionError: keys or values that this version does not have.
        """
        known = {item.name for item in fields(cls)} - set(_unknown_to(version))
        if not isinstance(content, dict) or set(content) != known:
            raise UnsupportedVersionError(
                f"the codec must have the keys {', '.join(sorted(known))}, got {str(content)[:200]}; "
                "upgrade anneal"
            )
        try:
            config = cls(**content)
        except ConfigError as error:
            raise UnsupportedVersionError(f"this codec is not known: {error}; upgrade anneal") from None
        if config.format_version != version:
            least = "draw_rate" if version == 3 else "num_features"
            raise UnsupportedVersionError(f"{least} must be at least 1 in version {version}, got 0")
        return config


def _unknown_to(version: int) -> tuple[str, ...]:
    """Keys of the codec that this version does not have."""
    return (_SINCE_VERSION_2 if version < 2 else ()) + (_SINCE_VERSION_3 if version < 3 else ())
