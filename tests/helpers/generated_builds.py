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
from cache_builder.generation.user_turn import UserTurn
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


def text_of(tokens: np.ndarray) -> str:
    """Letters for tokens, stop tokens left out."""
    return "".join(chr(97 + int(token)) for token in tokens if token not in STOPS)


def make_turn(max_length: int = 24) -> UserTurn:
    """Token 1 and 5 stand before a user's text, which ends with 4 too, and 6 and 7 behind it."""
    return UserTurn(
        before=np.array([1, 5], np.int32),
        stop_tokens=(4,),
        max_new_tokens=(max_length - 4) // 2,
        behind="",
        decode=text_of,
        prompt_of=lambda text: np.array([1, 5, *(ord(letter) - 97 for letter in text), 6, 7], np.int32),
        max_length=max_length,
    )


def make_dialogues(num_rows: int = 40, **options: Any) -> Recipe:
    """A recipe whose user's turns the model writes."""
    recipe, turn = make_recipe(num_rows, **options), make_turn()
    return replace(recipe, prompts=replace(recipe.prompts, tokens=(turn.before,), turn=turn))


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
    rows = []
    for number in range(recipe.config.num_rows):
        prompt = recipe.prompt(number)
        if recipe.prompts.turn is not None:
            prompt = recipe.prompts.turn.prompt(continuation(recipe.turn_request(number)))
        rows.append(recipe.row(prompt, continuation(recipe.request(number, prompt))))
    return rows


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
