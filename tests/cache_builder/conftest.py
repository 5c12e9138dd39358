"""A cache built with the defaults, once for all tests of builds. They may fail to change it, no more."""

from pathlib import Path

import pytest

from cache_builder import BuildConfig, build_cache
from formats.cache import TeacherCache


@pytest.fixture(scope="session")
def default_config(tiny_llama_dir: Path, tmp_path_factory) -> BuildConfig:
    """Small shards, so that there are several; everything that is stored by the defaults."""
    from tiny_models import write_corpus

    directory = tmp_path_factory.mktemp("default-build")
    return BuildConfig(
        corpus=str(write_corpus(directory / "text.jsonl")),
        model=str(tiny_llama_dir),
        out=str(directory / "cache"),
        engine="transformers",
        max_length=64,
        rows_per_shard=4,
    )


@pytest.fixture(scope="session")
def default_cache(default_config: BuildConfig) -> TeacherCache:
    assert build_cache(default_config).complete
    return TeacherCache(default_config.out)
