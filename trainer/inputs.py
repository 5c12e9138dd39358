"""What a run reads and starts from: settings in; opened caches, their rows and the loaded initial model out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.cache import TeacherCache
from formats.identity.fingerprint import ModelFingerprint, resolve_model
from trainer.config import TrainConfig
from trainer.data.dataset import CachedDataset
from trainer.data.label_terms import plain, resolved
from trainer.loading import load_model, load_tokenizer, open_cache, require_plain_weights
from trainer.objective import Objective
from trainer.preflight.vocabulary import shared_vocabulary
from trainer.result.lora import attach_adapters
from trainer.result.saving import ResultLayout

LEAST_TOKENS = 150.0
"""Times T^2: tokens per step at which the noise of draws is as large as the gradient (SmolLM2-135M, 10 steps of drift,
2026-11-25: 400 at T = 2 and 2,300 at T = 4)."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run reads: the initial model's directory, and caches that belong to it."""

    model_dir: Path
    tokenizer: Any
    target: TeacherCache
    """The cache of the text to learn."""
    mixed: list[TeacherCache]
    """Those of `config.caches`."""
    held_out: dict[str, TeacherCache]
    """Name -> evaluation cache."""
    known: TeacherCache | None
    """That of `config.ewc`."""

    @property
    def caches(self) -> list[TeacherCache]:
        """All of them."""
        known = [self.known] if self.known is not None else []
        return [self.target, *self.mixed, *self.held_out.values(), *known]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a run, as its parts read them."""

    training: CachedDataset
    mixed: list[tuple[CachedDataset, float]]
    """Further training rows, and how many of them per row of `training`."""
    first_check: CachedDataset
    """Rows with their teacher, even where no KL is trained."""
    evaluation: dict[str, CachedDataset]
    fisher: CachedDataset | None
    """Text for the Fisher information."""
    objective: Objective
    """That of the settings, with every number known."""

    @property
    def with_teacher(self) -> list[CachedDataset]:
        """Those whose targets are read."""
        return [self.training, self.first_check, *(rows for rows, _ in self.mixed), *self.evaluation.values()]


@dataclass(frozen=True, kw_only=True)
class Student:
    """The initial model as it is trained."""

    model: Any
    """In memory, with adapters if there are any."""
    vocab_size: int | None
    """V, where the output head is padded beyond it."""
    layout: ResultLayout | None
    """Where its weights go in the result; None when adapters alone are saved."""


def open_inputs(config: TrainConfig) -> Inputs:
    """Find the initial model and every cache, and see that they belong together; no weights are loaded."""
    fisher_path = None if config.ewc is None else config.ewc.cache
    paths = [config.cache, *(cache.path for cache in config.caches), *config.eval_caches.values()]
    for path in [*paths, *([fisher_path] if fisher_path is not None else [])]:
        TeacherCache(path)  # the cheapest mistakes first
    model_dir = resolve_model(config.model, config.revision)
    require_plain_weights(model_dir, "--model")
    tokenizer = load_tokenizer(model_dir)

    def opened(path: str) -> TeacherCache:
        return open_cache(path, model_dir, tokenizer, check_identity=not config.allow_different_student)

    return Inputs(
        model_dir=model_dir,
        tokenizer=tokenizer,
        target=opened(config.cache),
        mixed=[opened(cache.path) for cache in config.caches],
        held_out={name: opened(path) for name, path in config.eval_caches.items()},
        known=None if fisher_path is None else opened(fisher_path),
    )


def facts_of(config: TrainConfig, inputs: Inputs) -> tuple[dict[str, list[TeacherCache]], str | None]:
    """The caches by their use, and the fingerprint of a student's weights that no cache's identity holds."""
    held_out = [*inputs.held_out.values()]
    caches = {"training": [inputs.target], "mixed": inputs.mixed, "evaluation": held_out}
    return caches, ModelFingerprint.of(inputs.model_dir).weights if config.allow_different_student else None


def rows_of(config: TrainConfig, inputs: Inputs) -> Rows:
    """The caches' rows at the run's temperature. Without a KL term nobody reads the teacher's payloads, so
    they are not decoded either.
    """
    tail_draws = config.tail_draws and config.kl_direction == "forward"

    objective = resolved(plain(config), inputs.target)

    def rows(opened: TeacherCache, loss: str) -> CachedDataset:
        loss = "ce" if config.kl_coef == 0 and loss == "both" else loss
        return CachedDataset(opened, config.temperature, loss, tail_draws=tail_draws, objective=objective)

    return Rows(
        training=rows(inputs.target, "both"),
        mixed=[
            (rows(opened, entry.loss), entry.weight)
            for opened, entry in zip(inputs.mixed, config.caches, strict=True)
        ],
        first_check=CachedDataset(inputs.target, config.temperature, tail_draws=tail_draws),
        evaluation={name: CachedDataset(opened) for name, opened in inputs.held_out.items()},
        fisher=None if inputs.known is None else CachedDataset(inputs.known, loss="ce"),
        objective=objective,
    )


def draws_note(config: TrainConfig, rows: Rows, rows_per_step: int) -> str | None:
    """One line where a step is so small that the noise of tail draws outweighs what they mend; None elsewhere, and
    where packing leaves the size of a step to the rows.
    """
    if config.packing or not rows.training.has_draws:
        return None
    tokens, least = rows_per_step * rows.training.kl_tokens_per_row(), LEAST_TOKENS * config.temperature**2
    if tokens >= least:
        return None
    return (
        f"about {tokens:.0f} tokens with KL in a step: below {least:.0f} at temperature {config.temperature:g} the "
        "noise of tail draws outweighs what they mend; take larger steps, or tail_draws=false"
    )


def load_student(config: TrainConfig, inputs: Inputs) -> Student:
    """Load the initial model, find the place of its weights in the result, and attach adapters."""
    model = load_model(inputs.model_dir, dtype=config.dtype, attn_implementation=config.attn_implementation)
    num_outputs = int(model.get_output_embeddings().weight.shape[0]) if model.get_output_embeddings() else 0
    vocab_size = shared_vocabulary(
        inputs.caches, num_outputs, inputs.tokenizer, different_student=config.allow_different_student
    )
    layout = None
    if config.lora is None or config.lora.merge:
        layout = ResultLayout.of(model, inputs.model_dir, config.save_dtype)
    if config.lora is not None:
        model = attach_adapters(model, config.lora)
    return Student(model=model, vocab_size=vocab_size, layout=layout)
