"""What a build would do: the whole corpus through the tokenizer, and nothing else.

Shown by `anneal cache build --dry-run`, and gone through before `--overwrite` discards anything: what the corpus is
refused for must not cost the cache that is there.
"""

from cache_builder.commit.build_directory import State
from cache_builder.commit.plan import require_work, selected_shards
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
    settings = source.settings
    if source.recipe is not None:
        return _of_recipe(config, source, source.recipe, state)
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
    selected_shards(config.shards, num_shards)
    return PlanReport(
        out=str(config.directory),
        state=state.value,
        num_rows=num_rows,
        num_tokens=num_tokens,
        num_positions=num_positions,
        num_shards=num_shards,
        estimated_bytes=rough_bytes(
            num_tokens,
            num_positions,
            settings.capture,
        ),
        identity=settings.identity,
        corpus=source.describe(rows),
        announcements=source.announcements,
        sample=source.sample() if source.sample else "",
    )


def _of_recipe(config: BuildConfig, source: BuildSource, recipe: Recipe, state: State) -> PlanReport:
    """Rows that are not written yet: how many tokens they can have at most."""
    settings = source.settings
    num_tokens, num_new = recipe.most_tokens()
    num_rows = recipe.config.num_rows
    num_positions = num_new if settings.capture.positions == "loss" else num_tokens - num_rows
    by_tokens = max(settings.tokens_per_shard // recipe.max_length, 1)
    num_shards = -(-num_rows // min(by_tokens, settings.rows_per_shard))
    selected_shards(config.shards, num_shards)
    return PlanReport(
        out=str(config.directory),
        state=state.value,
        num_rows=num_rows,
        num_tokens=num_tokens,
        num_positions=num_positions,
        num_shards=num_shards,
        estimated_bytes=rough_bytes(num_tokens, num_positions, settings.capture),
        identity=settings.identity,
        corpus={"notes": recipe.prompts.notes()},
        at_most=True,
        announcements=source.announcements,
        sample=source.sample() if source.sample else "",
    )
