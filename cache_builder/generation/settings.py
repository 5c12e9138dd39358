"""How many rows the model is to write, from what and how: the settings of `--generate`."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from formats.errors import ConfigError

Start = Literal["dialogue", "empty-turn", "bos"]
LEAST_TEMPERATURE = 0.01
"""vLLM takes every lower one for this one."""
MAX_SEED = (1 << 63) - 1


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Rows sampled from the whole distribution of the frozen model: nothing of it is cut off.

    Raises:
        ConfigError: a value is out of its range.
    """

    num_rows: int
    """Rows to write."""
    prompts: str | None = None
    """What rows begin with: a .txt file of one prompt per line, or a corpus, whose answers are left out; row i takes
    prompt i modulo their number. None is as `start` says."""
    start: Start | None = None
    """What rows begin with where there are no prompts. `dialogue`: a user's turn that the model writes as well;
    `empty-turn`: a user's turn of nothing; `bos`: what the tokenizer puts before a text. None is `dialogue` with a chat
    template, and `bos` without one."""
    temperature: float = 1.0
    """Of the softmax that tokens are drawn from; 1 is the model's own distribution."""
    seed: int = 0
    """Of the random numbers; each row has its own, made from this one and its number."""

    def __post_init__(self) -> None:
        for name, value, least, most in (
            (
                "generate",
                self.num_rows,
                1,
                1 << 31,
            ),  # row_seed tells twice as many apart: rows and their turns
            ("seed", self.seed, 0, MAX_SEED),
        ):
            if type(value) is not int or not least <= value <= most:
                raise ConfigError(f"{name} must be a whole number from {least} to {most}, got {value!r}")
        number = self.temperature
        fits = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
        if not fits or number < LEAST_TEMPERATURE:
            raise ConfigError(
                f"generate_temperature must be a number of at least {LEAST_TEMPERATURE}, got {number!r}; 1 is the "
                "model's own distribution"
            )
        object.__setattr__(self, "temperature", float(number))
        if self.start is not None and self.start not in get_args(Start):
            raise ConfigError(
                f"generate_from must be one of {', '.join(get_args(Start))}, got {self.start!r}"
            )
        if self.start is not None and self.prompts is not None:
            raise ConfigError(
                f"rows begin with prompts or as generate_from says, got both ({self.prompts} and {self.start}); leave "
                "one out"
            )
        if self.prompts is not None:
            object.__setattr__(self, "prompts", str(self.prompts))
            if not self.prompts:
                raise ConfigError(
                    "prompts must be a file, directory, glob or data set name, got an empty string"
                )
