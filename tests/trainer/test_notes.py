"""What a run reads, and what it says of it."""

import pytest

from formats.cache import TeacherCache
from trainer.config import MixedCache, TrainConfig
from trainer.inputs import open_inputs, rows_of
from trainer.notes import draws_note, mixture_note


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


@pytest.mark.parametrize(
    ("mixed", "enough", "percent"),
    [
        ([{"weight": 0.25}], 5, 20),
        ([{"weight": 0.25, "loss": "ce"}, {"weight": 0.0}], 5, 20),
        ([{"weight": 0.5}, {"weight": 1.5}], 6, 17),
        ([{"share": 0.1}], 10, 10),
        ([{"share": 0.5}, {"weight": 0.25}], 10, 10),  # a fifth of the other half
        ([{}], 2, 50),
        ([], 1, None),
        ([{"weight": 0.0}], 1, None),
    ],
)
@pytest.mark.parametrize("packing", [False, True])
def test_steps_too_small_for_every_cache_are_told(
    pruned_cache, tiny_llama_dir, tmp_path, mixed, enough, percent, packing
):
    config = TrainConfig(
        cache=str(pruned_cache),
        model=str(tiny_llama_dir),
        out=str(tmp_path / "out"),
        caches=[MixedCache(path=str(pruned_cache), **entry) for entry in mixed],
        packing=packing,
    )
    rows = rows_of(config, open_inputs(config))
    assert mixture_note(config, rows, enough) is None
    if percent is None:
        return
    unit = "pack" if packing else "row"
    line = mixture_note(config, rows, enough - 1)
    assert line is not None and "\n" not in line
    assert line.startswith(
        f"{pruned_cache} gives {percent} % of the {unit}s, and a step has {enough - 1} {unit}"
    )
    assert f"take steps of {enough} or more" in line
