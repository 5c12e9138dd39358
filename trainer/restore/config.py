"""What restoring is asked for: frozen, checked when it is made."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from formats.errors import ConfigError
from trainer.chain.config import NAME
from trainer.checks import check_at_least, check_number, check_one_of, check_output, check_path

RANKS = ("low-ppl", "random")
AUTO_FACTOR = 1.5
"""The paper's restoring rate, 3e-5, is this much above its tuning rate, 2e-5."""


@dataclass(frozen=True, kw_only=True)
class RestoreConfig:
    """Restoring of one or more tuned models of one initial model.

    Raises:
        ConfigError: a field is out of range or missing.
    """

    tuned: Mapping[str, str]
    """Label -> model: directory, checkpoint of a run, or hub name."""
    initial: str
    """The model that all of them were tuned from: the control is trained from it."""
    text: str
    """General text, like that of pretraining: a cache, or a corpus of which one is built."""
    source: Mapping[str, str]
    """Name -> cache of held-out text on which is measured what was lost."""
    out: str
    """Directory: text/, control/, restored/, logs/ and restore.json."""
    memory: str | None = None
    """Cache of the text that the models were tuned on, for exact memorisation; by default what their record names."""
    tokens: int | None = None
    """Tokens of restoring text; None takes those of one epoch of the tuning text."""
    learning_rate: float | None = None
    """None is 1.5 times that of the tuning run."""
    rank: str = "low-ppl"
    """`low-ppl`: the rows to which the initial model gives the lowest perplexity; `random`."""
    seed: int = 0
    """Of the `random` rows, and of the runs."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """`transformers.TrainingArguments` over those of the tuning run."""
    build: Mapping[str, Any] = field(default_factory=dict)
    """Options of `anneal cache build` where `text` is a corpus."""

    def __post_init__(self) -> None:
        check_path("--initial", self.initial, "the model that the tuned ones come from")
        check_path("--text", self.text, "a cache or corpus of general text")
        check_output("--out", self.out, "the directory of the result")
        if not self.tuned:
            raise ConfigError("restoring needs a tuned model, got none")
        if not self.source:
            raise ConfigError("restoring needs held-out text, got none; write --source NAME=CACHE")
        for label in self.tuned:
            if not NAME.fullmatch(label) or label in ("control", "initial"):
                raise ConfigError(
                    f"the label of a model must be letters, digits, dots and dashes, and not control or initial, got "
                    f"{label!r}; write LABEL=DIR"
                )
        check_one_of("--rank", self.rank, RANKS)
        if self.tokens is not None:
            check_at_least("--tokens", self.tokens, 1, "one epoch of the tuning text is usual", integer=True)
        if self.learning_rate is not None:
            check_number("--lr", self.learning_rate)
            if self.learning_rate <= 0:
                raise ConfigError(f"--lr must be above 0, got {self.learning_rate:g}; 3e-5 is the paper's")
        check_at_least("--seed", self.seed, 0, "0 is usual", integer=True)
        of_options = {"learning_rate": "--lr", "seed": "--seed"}
        of_options |= dict.fromkeys(("num_train_epochs", "max_steps"), "--tokens")
        for name, option in of_options.items():
            if name in self.training:
                raise ConfigError(
                    f"{option} says it, so training.{name} must be left out, got {self.training[name]}"
                )
