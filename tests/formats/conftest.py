"""A small cache for the tests that damage it."""

import shutil
from pathlib import Path

import pytest
from damaged_caches import OPTIONS
from make_teachers import write_cache


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corruption") / "cache"
    write_cache(directory, vocab_size=31, min_prob=0.05, draw_rate=6, **OPTIONS)
    return directory


@pytest.fixture
def cache_dir(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "cache"))
