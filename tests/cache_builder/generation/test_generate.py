"""Rows that a model writes itself: as asked for, kept batch by batch, the same after any interruption."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from deterministic_build import SeededTeacher, Stop, contents, kill_self_at, stop_at
from generated_builds import PROMPTS, STOPS, SeededSampler, build, expected_rows, make_dialogues, make_recipe

from cache_builder.build import build_cache
from cache_builder.commit.build_directory import BuildDirectory
from cache_builder.commit.capture import EngineStartError
from cache_builder.config import BuildConfig
from cache_builder.generation.generate import GeneratedRows
from cache_builder.generation.recipe import Recipe, row_seed
from cache_builder.generation.settings import GenerationConfig
from formats.cache import TeacherCache
from formats.errors import AnnealError, ConfigError, IdentityMismatchError
from formats.progress import Progress


def test_the_rows_of_the_cache_are_those_that_were_written(tmp_path: Path) -> None:
    recipe = make_recipe()
    sampler = SeededSampler()
    report = build(tmp_path / "c", recipe, sampler=sampler)
    rows = list(TeacherCache(tmp_path / "c").rows())
    expected = expected_rows(recipe)
    assert len(rows) == 40 and sampler.closed and len(sampler.asked) == len(set(sampler.asked)) == 40
    for number, (row, wanted) in enumerate(zip(rows, expected, strict=True)):
        prompt = PROMPTS[number % 3]
        assert np.array_equal(row.input_ids, wanted.input_ids)
        assert np.array_equal(row.input_ids[: len(prompt)], prompt)
        assert np.array_equal(row.loss_mask, np.arange(len(row.input_ids)) >= len(prompt))
        assert np.array_equal(row.positions, np.arange(len(prompt) - 1, len(row.input_ids) - 1))
        ends = np.isin(row.input_ids[len(prompt) :], STOPS)
        assert not ends[:-1].any() and (ends[-1] or len(row.input_ids) == 24)
    ended = [int(row.input_ids[-1]) in STOPS for row in rows]
    assert 5 < sum(ended) < 40, "both kinds of ends"
    assert f"{sum(ended)} of 40 rows end by themselves, {40 - sum(ended)} at 24 tokens" in report.text()


def test_every_row_has_random_numbers_of_its_own() -> None:
    seeds = [row_seed(0, row) for row in range(20_000)]
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == 20_000, "torch's CPU generator reads the lower half"
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert not {seed & 0xFFFFFFFF for seed in seeds} & {
        row_seed(1, row) & 0xFFFFFFFF for row in range(20_000)
    }
    bits = np.array([[seed >> bit & 1 for bit in range(32)] for seed in seeds[:4096]])
    assert abs(bits.mean(axis=0) - 0.5).max() < 0.05
    assert abs(np.corrcoef(bits[:-1].T, bits[1:].T)[:32, 32:]).max() < 0.08, "neighbours do not resemble"


def test_what_a_user_asks_is_written_first(tmp_path: Path) -> None:
    recipe = make_dialogues()
    sampler = SeededSampler()
    report = build(tmp_path / "c", recipe, sampler=sampler)
    rows = list(TeacherCache(tmp_path / "c").rows())
    assert len(sampler.asked) == len(set(sampler.asked)) == 80, (
        "a turn and an answer each, none from the same numbers"
    )
    prompts = {bytes(row.input_ids[~row.loss_mask]) for row in rows}
    assert len(prompts) > 20, "rows ask different things"
    for row, wanted in zip(rows, expected_rows(recipe), strict=True):
        assert np.array_equal(row.input_ids, wanted.input_ids) and np.array_equal(
            row.loss_mask, wanted.loss_mask
        )
        prompt = row.input_ids[~row.loss_mask].tolist()
        assert prompt[:2] == [1, 5] and prompt[-2:] == [6, 7] and 4 <= len(prompt) <= 14
        assert not set(prompt[2:-2]) & set(STOPS) and 4 not in prompt[2:-3]
    assert report.text().count("rows end by themselves") == 1


@pytest.mark.parametrize("recipe", [make_recipe(), make_dialogues()], ids=["prompts", "dialogues"])
def test_batches_do_not_change_the_rows(tmp_path: Path, recipe: Recipe) -> None:
    written = []
    for size in (1, 7, 40, 64):
        directory = BuildDirectory(tmp_path / str(size))
        directory.prepare()
        rows = GeneratedRows(directory, recipe, size, SeededSampler)
        written.append([row.key for row in rows])
    assert written == [[row.key for row in expected_rows(recipe)]] * 4


@pytest.mark.parametrize("recipe", [make_recipe(), make_dialogues()], ids=["prompts", "dialogues"])
@pytest.mark.parametrize(
    "place", ["generated 0", "generated 16", "generated 32", "staged 0", "planned", "claimed 2"]
)
def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, place: str, recipe: Recipe
) -> None:
    build(tmp_path / "whole", recipe)
    pid = os.fork()
    if pid == 0:
        build(tmp_path / "killed", recipe, step=kill_self_at(place))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    sampler = SeededSampler()
    assert build(tmp_path / "killed", recipe, sampler=sampler).complete
    left = {"generated 0": 24, "generated 16": 8}.get(place, 0)
    assert len(sampler.asked) == left * (2 if recipe.prompts.turn else 1)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_damaged_batch_is_written_again(tmp_path: Path) -> None:
    recipe = make_recipe()
    build(tmp_path / "whole", recipe)
    with pytest.raises(Stop):
        build(tmp_path / "c", recipe, step=stop_at("generated 32"))
    damaged = next((tmp_path / "c/_build").glob("generated-0000000016-*"))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    sampler = SeededSampler()
    build(tmp_path / "c", recipe, sampler=sampler)
    assert len(sampler.asked) == 16
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_a_failing_engine_loses_no_batch_and_says_how_far_it_got(tmp_path: Path) -> None:
    recipe = make_recipe()
    failing = SeededSampler(fails_after=20)
    with pytest.raises(RuntimeError, match="on fire"):
        build(tmp_path / "c", recipe, sampler=failing)
    assert failing.closed
    assert BuildDirectory(tmp_path / "c").how_far() == (
        "16 generated rows are on the disk; run the same command again to go on"
    )
    sampler = SeededSampler()
    build(tmp_path / "c", recipe, sampler=sampler)
    assert len(sampler.asked) == 24


def test_generated_rows_outlive_a_capture_that_does_not_start(tmp_path: Path) -> None:
    class Broken(SeededTeacher):
        def __init__(self) -> None:
            raise RuntimeError("no memory")

    with pytest.raises(EngineStartError, match="no memory"):
        build(tmp_path / "c", make_recipe(), teacher=Broken)
    sampler = SeededSampler()
    build(tmp_path / "c", make_recipe(), sampler=sampler)
    assert sampler.asked == []


def test_an_engine_that_does_not_start_leaves_nothing(tmp_path: Path) -> None:
    class Broken(SeededSampler):
        def describe(self):
            raise ConfigError("no such model")

    with pytest.raises(ConfigError, match="no such model"):
        build(tmp_path / "c", make_recipe(), sampler=Broken())
    assert not (tmp_path / "c").exists()


def test_another_engine_may_not_go_on(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        build(tmp_path / "c", make_recipe(), step=stop_at("generated 0"))
    with pytest.raises(IdentityMismatchError, match=r"all generated rows .*engine_version: 1 there, 2 now"):
        build(tmp_path / "c", make_recipe(), sampler=SeededSampler(version="2"))
    assert BuildDirectory(tmp_path / "c").num_generated() == 16


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("other", "words"),
    [
        (make_recipe(41), "--generate: 40 there, 41 now"),
        (make_dialogues(), "--generate-from: none there, dialogue now"),
        (make_recipe(temperature=0.5), "--generate-temperature: 1.0 there, 0.5 now"),
        (make_recipe(seed=1), "--seed: 0 there, 1 now"),
        (make_recipe(prompts=PROMPTS[:2]), "--prompts or --generate-from: "),
        (replace(make_recipe(), stop_tokens=(2,)), "corpus stop_tokens: [2, 3] there, [2] now"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, finished: bool, other, words: str) -> None:
    if finished:
        build(tmp_path / "c", make_recipe())
    else:
        with pytest.raises(Stop):
            build(tmp_path / "c", make_recipe(), step=stop_at("generated 16"))
    before = contents(tmp_path / "c")
    with pytest.raises(ConfigError) as caught:
        build(tmp_path / "c", other)
    message = str(caught.value)
    assert words in message and "corpus contents" not in message and "\n" not in message
    assert contents(tmp_path / "c") == before


def test_repeated_rows_are_kept_and_counted(tmp_path: Path) -> None:
    recipe = make_recipe(12, prompts=[np.full(23, 7, np.int32)])  # one new token each
    report = build(tmp_path / "c", recipe)
    cache = TeacherCache(tmp_path / "c")
    keys = [row.key for row in cache.rows()]
    repeated = len(keys) - len(set(keys))
    assert len(keys) == 12 and repeated > 0
    assert f"{repeated} rows repeat another" in report.text()


def test_progress_counts_rows_and_new_tokens(tmp_path: Path) -> None:
    directory = BuildDirectory(tmp_path / "c")
    directory.prepare()
    recipe = make_recipe()
    with pytest.raises(Stop):
        list(GeneratedRows(directory, recipe, 16, SeededSampler, step=stop_at("generated 0")))
    told: list = []

    class Told(Progress):
        def note(self, text):
            told.append(text)

        def start(self, what, total, done=0, *, unit="row"):
            told.append((what, total, done))

        def running(self):
            told.append("running")

        def advance(self, num_rows, num_tokens=0):
            told.append((num_rows, num_tokens))

    rows = list(GeneratedRows(directory, recipe, 16, SeededSampler, progress=Told()))
    assert told[:4] == [
        "resuming: 16 of 40 rows are generated",
        "starting the engine to write rows",
        ("generate", 40, 16),
        "running",
    ]
    new = [int(row.loss_mask.sum()) for row in rows[16:]]
    assert sorted(told[4:-1]) == sorted((1, count) for count in new)
    assert told[-1].startswith(f"wrote 24 rows, {sum(new)} new tokens in ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rows": 0}, "generate must be a whole number from 1"),
        ({"num_rows": 2.0}, "generate must be a whole number from 1"),
        ({"num_rows": 2, "seed": -1}, "seed must be a whole number from 0"),
        ({"num_rows": 2, "temperature": 0}, "generate_temperature must be a number of at least 0.01, got 0"),
        ({"num_rows": 2, "temperature": float("nan")}, "generate_temperature must be a number"),
        ({"num_rows": 2, "temperature": "hot"}, "generate_temperature must be a number"),
        ({"num_rows": 2, "prompts": ""}, "prompts must be a file"),
        (
            {"num_rows": 2, "start": "turn"},
            "generate_from must be one of dialogue, empty-turn, bos, got 'turn'",
        ),
        (
            {"num_rows": 2, "start": "bos", "prompts": "a.txt"},
            "rows begin with prompts or as generate_from says, got both",
        ),
    ],
)
def test_bad_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GenerationConfig(**options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [{"corpus": "a.txt"}, {"limit": 3}, {"text_column": "t"}, {"split": "test"}, {"seed": 3}, {"seed": 0}],
)
def test_settings_of_a_corpus_are_refused_beside_it(settings: dict) -> None:
    name, value = next(iter(settings.items()))
    with pytest.raises(ConfigError, match=f"generate makes its own text and takes no {name}, got {value}"):
        BuildConfig(**{"model": "m", "out": "o", "generate": GenerationConfig(num_rows=1), **settings})
    with pytest.raises(ConfigError, match="corpus must be given"):
        BuildConfig(model="m", out="o")


def test_a_seed_of_a_corpus_needs_a_limit() -> None:
    with pytest.raises(
        ConfigError, match="seed draws so many records as limit says, got seed 0 without limit;"
    ):
        BuildConfig(corpus="a.txt", model="m", out="o", seed=0)
    assert BuildConfig(corpus="a.txt", model="m", out="o", seed=0, limit=3).seed == 0


def test_what_does_not_go_with_it_is_refused(tmp_path: Path) -> None:
    from cache_builder.build_on_ray import build_cache_with_ray
    from cache_builder.tools.estimate import estimate_cache

    config = BuildConfig(model="m", out=str(tmp_path / "c"), generate=GenerationConfig(num_rows=1))
    for call in (build_cache_with_ray, estimate_cache):
        with pytest.raises(AnnealError, match="generate") as caught:
            call(config)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="--model"):
        build_cache(replace(config, model="./none"))
    assert not (tmp_path / "c").exists()
