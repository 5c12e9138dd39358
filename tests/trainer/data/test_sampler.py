"""Batches of an epoch: complete, reproducible, and the same steps however they are split over ranks."""

from collections import Counter

import numpy as np
import pytest

from trainer.data.sampler import EpochBatches, Source, interleaved


def singles(start: int, stop: int) -> list[list[int]]:
    return [[i] for i in range(start, stop)]


def flat(batches) -> list[int]:
    return [row for batch in batches for unit in batch for row in unit if not unit.is_filler]


def test_an_epoch_holds_every_row_once_and_differs_from_the_next():
    sampler = EpochBatches([Source(units=singles(0, 23))], 4, seed=5)
    assert len(sampler) == 6
    first = flat(sampler)
    assert sorted(first) == list(range(23)) and first != list(range(23))
    assert flat(sampler) == first  # asking again changes nothing
    sampler.set_epoch(1)
    second = flat(sampler)
    assert sorted(second) == list(range(23)) and second != first
    assert flat(EpochBatches([Source(units=singles(0, 23))], 4, seed=6)) != first


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_an_optimizer_step_has_the_same_rows_for_every_split(world_size, grouped):
    """12 micro-batches of 2 per step at world size 1 equal the same step over more ranks and less
    accumulation.
    """
    lengths = np.random.default_rng(0).integers(4, 90, 101) if grouped else None
    options = {"seed": 1, "lengths": lengths, "window": 12}
    whole = list(EpochBatches([Source(units=singles(0, 101))], 2, **options))
    per_rank = [
        list(EpochBatches([Source(units=singles(0, 101))], 2, rank=r, world_size=world_size, **options))
        for r in range(world_size)
    ]
    assert len({len(batches) for batches in per_rank}) == 1  # collectives need equal numbers
    accumulation = 12 // world_size
    for step in range(-(-len(whole) // 12)):
        expected = flat(whole[step * 12 : (step + 1) * 12])
        got = [flat(batches[step * accumulation : (step + 1) * accumulation]) for batches in per_rank]
        assert sorted(row for rows in got for row in rows) == sorted(expected)


def test_ranks_without_a_batch_get_a_filler():
    ranks = [list(EpochBatches([Source(units=singles(0, 5))], 2, rank=r, world_size=2)) for r in range(2)]
    assert [len(batches) for batches in ranks] == [2, 2]
    assert ranks[1][1][0].is_filler and not ranks[0][1][0].is_filler
    assert sorted(flat(ranks[0]) + flat(ranks[1])) == list(range(5))


@pytest.mark.parametrize("shuffle", [True, False])
def test_mixing_draws_by_weight_and_covers_the_other_cache_over_the_epochs(shuffle):
    sources = [Source(units=singles(0, 40)), Source(units=singles(40, 60), weight=0.25)]
    sampler = EpochBatches(sources, 5, shuffle=shuffle)
    assert len(sampler) == 10  # 40 + 10 rows
    seen: Counter[int] = Counter()
    for epoch in range(4):
        sampler.set_epoch(epoch)
        rows = flat(sampler)
        assert sum(row < 40 for row in rows) == 40
        seen.update(row for row in rows if row >= 40)
    assert seen == Counter({row: 2 for row in range(40, 60)})  # 4 epochs of 10 from 20: every row twice


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_step_has_each_source_in_its_proportion(shuffle):
    """40, 10 and 6 rows: a step of 7 has five, one or two, and none, one or two; as near as whole rows allow."""
    weights = (1.0, 0.25, 0.15)
    sources = [Source(units=singles(100 * n, 100 * n + 40), weight=w) for n, w in enumerate(weights)]
    sampler = EpochBatches(sources, 7, shuffle=shuffle)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in sampler:
            found = Counter(row // 100 for unit in batch for row in unit)
            for source, total in enumerate((40, 10, 6)):
                assert abs(found[source] - len(batch) * total / 56) < 1.5, (epoch, found)
        orders.append(flat(sampler))
    assert len({tuple(row for row in rows if row < 100) for rows in orders}) == (3 if shuffle else 1)


def test_where_a_step_is_the_period_every_step_is_alike():
    sources = [Source(units=singles(0, 40)), Source(units=singles(40, 60), weight=0.25)]
    for batch in EpochBatches(sources, 5):
        assert sum(row >= 40 for unit in batch for row in unit) == 1


def test_interleaving_keeps_the_order_of_each_source_and_leaves_a_single_one_alone():
    which = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], [50, 7, 20]))
    order = interleaved(which)
    assert sorted(order.tolist()) == list(range(77))
    for source in (0, 1, 3):
        mine = order[which[order] == source]
        assert (np.diff(mine) > 0).all()
    assert interleaved(np.zeros(9, np.int64)).tolist() == list(range(9))


def test_a_weight_above_its_size_repeats_evenly():
    sources = [Source(units=singles(0, 10)), Source(units=singles(10, 13), weight=0.7)]
    counts = Counter(row for row in flat(EpochBatches(sources, 3)) if row >= 10)
    assert sorted(counts.values()) == [2, 2, 3]


def test_a_weight_of_zero_leaves_a_cache_out():
    sources = [Source(units=singles(0, 10)), Source(units=singles(10, 20), weight=0.0)]
    assert max(flat(EpochBatches(sources, 3))) == 9


def test_grouping_saves_padding_and_starts_with_the_longest():
    lengths = np.random.default_rng(0).integers(4, 500, 960)

    def padding(grouped: bool) -> float:
        sampler = EpochBatches(
            [Source(units=singles(0, 960))], 8, lengths=lengths if grouped else None, window=2
        )
        batches = [[int(lengths[list(unit)].sum()) for unit in batch] for batch in sampler]
        assert sorted(flat(sampler)) == list(range(960))
        if grouped:
            assert max(batches[0] + batches[1]) == lengths.max()
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches) / lengths.sum()

    assert padding(True) < 0.05 < 0.5 < padding(False)


def test_without_shuffling_rows_come_in_order():
    assert flat(EpochBatches([Source(units=singles(0, 7))], 3, shuffle=False)) == list(range(7))


def test_packs_stay_together():
    packs = [[0, 3], [1], [2, 4]]
    batches = list(EpochBatches([Source(units=packs)], 2))
    assert sorted(tuple(unit) for batch in batches for unit in batch) == [(0, 3), (1,), (2, 4)]
