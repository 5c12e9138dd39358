"""`anneal cache build --dry-run`: the whole corpus through the tokenizer, and nothing else."""

from cache_builder.build import require_same_cache
from cache_builder.commit.build_directory import BuildDirectory, State
from cache_builder.config import BuildConfig
from cache_builder.foresee import foresee
from cache_builder.report import PlanReport
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
    return foresee(config, source, state, progress)
