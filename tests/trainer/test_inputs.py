"""What a run reads, and what it says of it."""

import pytest

from formats.cache import TeacherCache
from trainer.config import TrainConfig
from trainer.inputs import open_inputs, rows_of
from trainer.notes import draws_note


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, True),
        ({"tail_draws": False}, False),
        ({"kl_coef": 0}, False),  # nobody reads the teacher
        ({"kl_direction": "reverse"}, False),  # which leaves draws out
        ({"packing": True}, False),  # the size of a step is not known
    ],
)
def test_steps_too_small_for_draws_are_told(pruned_cache, tiny_llama_dir, tmp_path, settings, told):
    shards = TeacherCache(pruned_cache).manifest.shards
    positions = sum(shard.num_positions for shard in shards) / sum(shard.num_rows for shard in shards)
    config = TrainConfig(
        cache=str(pruned_cache),
        model=str(tiny_llama_dir),
        out=str(tmp_path / "out"),
        temperature=2,
        **settings,
    )
    rows = rows_of(config, open_inputs(config))
    enough = int(600 / positions) + 1  # 150 * T^2 tokens
    assert draws_note(config, rows, enough) is None
    line = draws_note(config, rows, 1)
    assert (line is not None) == told
    if line is not None:
        assert line.startswith(f"about {positions:.0f} tokens with KL in a step: below 600 at temperature 2 ")
