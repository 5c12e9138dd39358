"""Builds whose rows a seeded sampler writes and the teacher of deterministic_build captures."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from deterministic_build import VOCAB_SIZE, SeededTeacher, logits_of, make_config, make_source

from cache_builder.build import build_cache
from cache_builder.generation.generate import GeneratedRows
from cache_builder.generation.prompts import Prompts
from cache_builder.generation.recipe import Recipe
from cache_builder.generation.settings import GenerationConfig
from cache_builder.teachers.protocol import SampleRequest
from formats.disk.token_row import TokenRow
from formats.identity.teacher_identity import TeacherIdentity

PROMPTS = (np.array([1], np.int32), np.array([4, 7, 5], np.int32), np.array([9, 9], np.int32))
STOPS = (2, 3)


def continuation(request: SampleRequest) -> np.ndarray:
    """What the model of deterministic_build writes: numpy's random numbers, the full softmax."""
    generator = np.random.default_rng(request.seed)
    ids = request.prompt.tolist()
    while len(ids) < len(request.prompt) + request.max_new_tokens:
        logits = logits_of(np.array(ids))[-1] / request.temperature
        probs = np.exp(logits - np.logaddexp.reduce(logits))
        ids.append(int(generator.choice(VOCAB_SIZE, p=probs / probs.sum())))
        if ids[-1] in request.stop_tokens:
            break
    return np.array(ids[len(request.prompt) :], np.int32)


class SeededSampler:
    """A `Sampler`; answers come in another order than they were asked for."""

    vocab_size = VOCAB_SIZE

    def __init__(self, version: str = "1", fails_after: int | None = None) -> None:
        self._version, self._fails_after = version, fails_after
        self.asked: list[int] = []
        self.closed = False

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[tuple[int, np.ndarray]]:
        assert not self.closed
        for number in reversed(range(len(requests))):
            if self._fails_after is not None and len(self.asked) == self._fails_after:
                raise RuntimeError("the machine is on fire")
            self.asked.append(requests[number].seed)
            yield number, continuation(requests[number])

    def describe(self) -> dict[str, Any]:
        return {"engine": "seeded", "engine_version": self._version, "dtype": "float64"}

    def close(self) -> None:
        self.closed = True


def make_recipe(num_rows: int = 40, *, prompts: Sequence[np.ndarray] = PROMPTS, **options: Any) -> Recipe:
    """Rows of at most 24 tokens in batches of 16."""
    return Recipe(
        config=GenerationConfig(num_rows=num_rows, **options),
        prompts=Prompts(tokens=tuple(prompts), source="prompts", kind="lines", uses_template=False),
        stop_tokens=STOPS,
        max_length=24,
    )


def expected_rows(recipe: Recipe) -> list[TokenRow]:
    """The rows of a recipe, each made alone."""
    numbers = range(recipe.config.num_rows)
    return [recipe.row(number, continuation(recipe.request(number))) for number in numbers]


def build(out: Path, recipe: Recipe, *, sampler: Any = None, teacher=SeededTeacher, step=lambda name: None):
    """`build_cache` with both of them."""
    source = make_source(1)
    identity = TeacherIdentity.from_dict({**source.settings.identity.to_dict(), "corpus": recipe.describe()})
    settings = replace(source.settings, identity=identity, tokens_per_shard=96)
    return build_cache(
        make_config(out, corpus="", generate=recipe.config),
        source=replace(
            source,
            settings=settings,
            recipe=recipe,
            describe=lambda rows: rows.counts() if isinstance(rows, GeneratedRows) else {},
        ),
        make_teacher=lambda config, source: teacher(),
        make_sampler=lambda config, source: sampler or SeededSampler(),
        step=step,
    )
