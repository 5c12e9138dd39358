"""What a run reads, and what it says of it."""

import pytest

from trainer.config import TrainConfig
from trainer.inputs import draws_note, open_inputs, rows_of


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"temperature": 4}, True),
        ({"temperature": 2}, False),
        ({"temperature": 4, "tail_draws": False}, False),
        ({"temperature": 4, "kl_coef": 0}, False),  # nobody reads the teacher
        ({"temperature": 4, "kl_direction": "reverse"}, False),  # which leaves draws out
    ],
)
def test_hot_draws_are_told(pruned_cache, tiny_llama_dir, tmp_path, settings, told):
    config = TrainConfig(
        cache=str(pruned_cache), model=str(tiny_llama_dir), out=str(tmp_path / "out"), **settings
    )
    line = draws_note(config, rows_of(config, open_inputs(config)))
    assert (line is not None) == told
    if line is not None:
        assert line.startswith("temperature 4: ") and line.endswith("tail_draws=false trains without")
