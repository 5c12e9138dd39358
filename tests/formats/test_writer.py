"""What cannot be said of a cache is refused before its first row, and not when the manifest is written."""

import numpy as np
import pytest

from formats import CacheWriter
from formats.errors import AnnealError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_prob": 1.0}, "min_prob must be at least 0 and below 1"),
        ({"min_prob": float("nan")}, "min_prob must be at least 0 and below 1"),
        ({"max_k": 0}, "max_k must be a whole number of at least 1"),
        ({"positions": "some"}, "positions must be one of"),
        ({"rows_per_batch": 0}, "rows_per_batch must be from 1 to 65536, got 0"),
        ({"rows_per_batch": 1 << 17}, "rows_per_batch must be from 1 to 65536"),
        ({"rows_per_shard": 0}, "rows_per_shard must be from 1"),
        ({"identity": {"teacher": {"loss": float("nan")}}}, "identity section teacher must be JSON"),
        ({"identity": {"teacher": {"loss": np.float32(1)}}}, "identity section teacher must be JSON"),
        ({"identity": {"model": "mine"}}, "an identity has the sections"),
    ],
)
def test_settings_that_no_cache_has(tmp_path, options: dict, words: str):
    with pytest.raises(AnnealError, match=words):
        CacheWriter(tmp_path / "c", **{"identity": {}, "vocab_size": 31, **options})
    assert not (tmp_path / "c").exists()
