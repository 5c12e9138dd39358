"""What is captured of a teacher's predictions: each setting, its default and its check, once for the house."""

from dataclasses import asdict, dataclass
from typing import Any

from formats.errors import ConfigError

POSITION_MODES = ("loss", "all")
MAX_RATE = 64
"""The largest rate of draws."""


@dataclass(frozen=True, kw_only=True)
class CaptureSettings:
    """Which positions are stored, and what of each of them. The defaults are a measurement: docs/benchmarks.md,
    "Three teachers".

    Raises:
        ConfigError: a value out of its range.
    """

    positions: str = "all"
    """`loss` stores positions whose next token carries loss, `all` every position that has a next token: KL at the
    answers alone fights what is to be learnt there and holds nothing else (docs/results.md)."""
    min_prob: float = 1e-2
    """Entries with at least this probability are kept; the most probable one always is."""
    max_k: int = 128
    """At most so many entries are kept at a position."""
    draw_rate: int = 8
    """Expected draws of a tail token over the power 3/4 of its probability
    (`formats/logprobs/tail_draws.py`); 0 draws none."""

    def __post_init__(self) -> None:
        if self.positions not in POSITION_MODES:
            raise ConfigError(f"positions must be one of {', '.join(POSITION_MODES)}, got {self.positions!r}")
        if type(self.min_prob) not in (int, float) or not 0 <= self.min_prob < 1:
            raise ConfigError(f"min_prob must be at least 0 and below 1, got {self.min_prob!r}")
        if type(self.max_k) is not int or self.max_k < 1:
            raise ConfigError(f"max_k must be a whole number of at least 1, got {self.max_k!r}")
        if type(self.draw_rate) is not int or not 0 <= self.draw_rate <= MAX_RATE:
            raise ConfigError(
                f"draw_rate (--tail-draws) must be a whole number from 0 to {MAX_RATE}, got {self.draw_rate!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `CaptureSettings(**content)` is the inverse."""
        return asdict(self)
