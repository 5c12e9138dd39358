"""`anneal cache build --dry-run`: the whole corpus through the tokenizer, and nothing else."""

from cache_builder.build import require_same_cache, selected_shards
from cache_builder.commit.build_directory import BuildDirectory, State
from cache_builder.commit.plan import require_work
from cache_builder.commit.staging import cut
from cache_builder.config import BuildConfig
from cache_builder.generation.recipe import Recipe
from cache_builder.report import PlanReport, rough_bytes
from cache_builder.source import BuildSource, open_source
from formats.progress import Progress


def plan_build(
    config: BuildConfig, progress: Progress | None = None, *, source: BuildSource | None = None
) -> PlanReport:
    """What `build_cache` would do: counts, rough size, identity. Starts no engine and writes nothing.

    Raises:
        ConfigError, CorpusError: as `build_cache`.
    """
    progress = progress or Progress()
    directory = BuildDirectory(config.directory)
    state = directory.state()
    source = source or open_source(config)
    settings = source.settings
    stays = not (config.overwrite or directory.is_discarding())
    if state is State.FINISHED and stays:
        require_same_cache(directory, settings)
    elif state is State.UNFINISHED and stays:
        directory.require_same(settings, any_size=config.tokens_per_shard is None)
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
