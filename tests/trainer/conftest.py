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


@pytest.fixture(scope="session")
def pruned_cache(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """24 rows with heads as a build makes them: p >= 1e-3, at most 128 entries."""
    from caches import write_cache

    path = tmp_path_factory.mktemp("cache") / "pruned"
    return write_cache(path, tiny_llama_dir, num_rows=24, min_prob=1e-3, max_k=128)
