"""Models and caches that the tests of results share."""

from pathlib import Path

import pytest
from caches import write_cache
from saved_bases import BASES


@pytest.fixture(scope="module")
def base(tiny_tokenizer_dir, tmp_path_factory):
    """Name -> (model directory, a cache of it), made when first asked for."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = BASES[name](folder / "model", tiny_tokenizer_dir)
            made[name] = model, write_cache(folder / "cache", model, num_rows=12, min_prob=1e-3, max_k=64)
        return made[name]

    return get
