"""How many threads encode is a matter of the cores alone; what they write, of nothing (`test_faults.py`)."""

import pytest

from cache_builder.commit.shard_committer import encoder_threads


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (4, 1), (7, 1), (8, 2), (16, 4), (128, 4)])
def test_a_quarter_of_the_cores_up_to_four_encode(cores: int, threads: int) -> None:
    assert encoder_threads(cores) == threads


def test_this_machine_has_at_least_one() -> None:
    assert encoder_threads() >= 1
