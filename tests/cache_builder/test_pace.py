"""Shards and waves that take seconds on every machine, and whoever goes on takes the sizes from the plan."""

from dataclasses import replace
from pathlib import Path

import pytest
from deterministic_build import make_source

from cache_builder.commit.build_directory import BuildDirectory
from cache_builder.pace import LEAST_TOKENS, MOST_TOKENS, num_weights, shard_tokens, tokens_per_second
from formats.errors import ConfigError


def test_two_operations_per_weight_and_token() -> None:
    assert tokens_per_second(1_000_000, num_gpus=0, num_cores=2) == pytest.approx(20_000)
    assert tokens_per_second(8_000_000_000, num_gpus=2, num_cores=64) == pytest.approx(12_500)


@pytest.mark.parametrize(
    ("speed", "tokens"),
    [(0.0, LEAST_TOKENS), (150.0, LEAST_TOKENS), (1000.0, 16384), (6250.0, 65536), (1e9, MOST_TOKENS)],
)
def test_a_shard_takes_at_most_twenty_seconds_within_the_limits(speed: float, tokens: int) -> None:
    assert shard_tokens(speed) == tokens


def test_weights_are_counted_from_the_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 3000)
    assert num_weights(tmp_path, 2) == 1500


def test_a_size_that_nobody_asked_for_is_that_of_the_build_which_is_here(tmp_path: Path) -> None:
    directory = BuildDirectory(tmp_path / "cache")
    directory.prepare()
    here = make_source(10).settings
    assert directory.settle_settings(here, any_size=True) == here
    elsewhere = replace(here, tokens_per_shard=here.tokens_per_shard // 16)
    assert directory.settle_settings(elsewhere, any_size=True) == here
    with pytest.raises(ConfigError, match=r"tokens_per_shard: 1048576 there, 65536 now"):
        directory.settle_settings(elsewhere)
