"""What a build would do: the whole corpus through the tokenizer, and nothing else.

Shown by `anneal cache build --dry-run`, and gone through before `--overwrite` discards anything: what the corpus is
refused for must not cost the cache that is there.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from cache_builder.commit.build_directory import State
from cache_builder.commit.plan import BuildSettings, require_work, selected_shards
from cache_builder.commit.staging import cut
from cache_builder.config import BuildConfig
from cache_builder.generation.recipe import Recipe
from cache_builder.report import PlanReport, rough_bytes
from cache_builder.source import BuildSource
from formats.progress import Progress


def foresee(config: BuildConfig, source: BuildSource, state: State, progress: Progress) -> PlanReport:
    """Counts, rough size and identity of a build; `state` is what its directory holds.

    Raises:
        ConfigError, CorpusError: as planning the build would.
    """
    settings, recipe = source.settings, source.recipe
    if recipe is None:
        sizes, corpus = _of_corpus(source, progress)
    else:
        sizes, corpus = _of_recipe(settings, recipe), {"notes": recipe.prompts.notes()}
    selected_shards(config.shards, sizes.num_shards)
    return PlanReport(
        out=str(config.directory),
        state=state.value,
        **sizes._asdict(),
        estimated_bytes=rough_bytes(sizes.num_tokens, sizes.num_positions, settings.capture),
        identity=settings.identity,
        corpus=corpus,
        at_most=recipe is not None,
        announcements=source.announcements,
        sample=source.sample() if source.sample else "",
    )


class _Sizes(NamedTuple):
    num_rows: int
    num_tokens: int
    num_positions: int
    num_shards: int


def _of_corpus(source: BuildSource, progress: Progress) -> tuple[_Sizes, Mapping[str, Any]]:
    """Every row counted, and what the tokeniser says of them."""
    settings = source.settings
    rows = source.open_rows()
    progress.start("tokenise", None)
    num_rows = num_tokens = num_positions = num_shards = 0
    for group in cut(rows, settings.rows_per_shard, settings.tokens_per_shard):
        num_shards += 1
        num_rows += len(group)
        tokens = sum(len(row) for row in group)
        num_tokens += tokens
        num_positions += sum(len(row.positions(settings.capture.positions)) for row in group)
        progress.advance(len(group), tokens)
    progress.finish()
    require_work(num_positions, num_rows)
    return _Sizes(num_rows, num_tokens, num_positions, num_shards), source.describe(rows)


def _of_recipe(settings: BuildSettings, recipe: Recipe) -> _Sizes:
    """Rows that are not written yet: how many tokens they can have at most."""
    num_tokens, num_new = recipe.most_tokens()
    num_rows = recipe.config.num_rows
    num_positions = num_new if settings.capture.positions == "loss" else num_tokens - num_rows
    by_tokens = max(settings.tokens_per_shard // recipe.max_length, 1)
    num_shards = -(-num_rows // min(by_tokens, settings.rows_per_shard))
    return _Sizes(num_rows, num_tokens, num_positions, num_shards)
