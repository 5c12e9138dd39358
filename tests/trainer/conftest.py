"""Caches for the trainer's tests: a tiny model's own exact logprobs, written with `formats.CacheWriter`."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def llama_cache(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """24 rows of the tiny Llama, lossless: every head is the whole vocabulary."""
    from caches import write_cache

    return write_cache(tmp_path_factory.mktemp("cache") / "lossless", tiny_llama_dir, num_rows=24)


@pytest.fixture(scope="session")
def llama_eval_cache(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """8 other rows of the same model."""
    from caches import write_cache

    return write_cache(tmp_path_factory.mktemp("cache") / "held-out", tiny_llama_dir, num_rows=8, seed=77)
