"""The trainer's tests have the caches and runs that these compare with."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def pruned_cache(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """24 rows with heads as a build makes them: p >= 1e-3, at most 128 entries, with tail draws."""
    from caches import write_cache

    path = tmp_path_factory.mktemp("cache") / "pruned"
    return write_cache(path, tiny_llama_dir, num_rows=24, min_prob=1e-3, max_k=128)
