"""Shares of a mixture, by tokens: the arithmetic, and the batches that a run really draws."""

import numpy as np
import pytest
from caches import random_rows, write_cache
from runs import settings

from formats.cache import TeacherCache
from formats.errors import ConfigError
from trainer import train
from trainer.config import MixedCache, TrainConfig
from trainer.data.dataset import CachedDataset
from trainer.data.mixture import Share, unit_weights
from trainer.data.packing import best_fit
from trainer.data.sampler import EpochBatches, sources_of
from trainer.evaluation.recorded_method import method_of


def test_shares_by_hand():
    """Target: 100 rows of 10 tokens. With rows of 5 a quarter of the mixture is 333.3 tokens of 1333.3: 66.7 rows. With
    a weight of 0.5 beside it (50 rows of 20) the rest is 2000, the mixture 2666.7, and the quarter 133.3 rows."""
    assert unit_weights([1.0, Share(0.25)], [100, 40], [1000, 200]) == pytest.approx([1, 2 / 3])
    found = unit_weights([1.0, 0.5, Share(0.25)], [100, 30, 40], [1000, 600, 200])
    assert found == pytest.approx([1, 0.5, 4 / 3])
    two = unit_weights([1.0, Share(0.25), Share(0.5)], [100, 10, 10], [1000, 100, 100])
    assert two == pytest.approx([1, 1, 2])
    assert unit_weights([1.0, 0.3, 0.0], [10, 10, 10], [50, 60, 70]) == [1.0, 0.3, 0.0]


def test_a_weight_that_rounds_to_no_row_is_refused(texts):
    """Half a row is rounded to none; more than half is one."""
    units = [[[0]] * 50, [[0]] * 300]
    assert sources_of(units, texts[:2], [1.0, 0.0])[1].weight == 0
    for weight, comes_to in ((0.01, "0.50"), (0.002, "0.10")):
        with pytest.raises(
            ConfigError, match=rf"caches.weight {weight} comes to {comes_to} rows or packs of an"
        ):
            sources_of(units, texts[:2], [1.0, weight])
        with pytest.raises(ConfigError, match=f"caches.weight {weight} comes to {comes_to} rows"):
            sources_of(units[:1] + units, texts, [1.0, weight, Share(0.5)])
    assert EpochBatches(sources_of(units, texts[:2], [1.0, 0.011]), 1).counts == [50, 1]


@pytest.fixture(scope="module")
def texts(tiny_llama_dir, tmp_path_factory) -> list[CachedDataset]:
    """A target and two more, with rows of other lengths."""
    folder, sizes = tmp_path_factory.mktemp("texts"), (200, 300, 150)
    caches = [
        write_cache(
            folder / str(n), tiny_llama_dir, rows=random_rows(size, 300, seed=n, longest=12 * (n + 1))
        )
        for n, size in enumerate(sizes)
    ]
    return [CachedDataset(cache, loss="ce") for cache in caches]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("shares", [(0.1,), (0.5,), (0.25, 0.3), (0.9,)])
def test_the_tokens_of_an_epoch_have_the_share_that_was_asked_for(texts, shares, packing):
    """Counted in the batches of an epoch: to the half of a unit that rounding may cost each cache, and the spread of
    the lengths of those that were drawn."""
    datasets = texts[: len(shares) + 1]
    lengths = np.concatenate([dataset.lengths() for dataset in datasets]).astype(int)
    home = np.repeat(np.arange(len(datasets)), [len(dataset) for dataset in datasets])
    units, start = [], 0
    for dataset in datasets:
        own = dataset.lengths()
        packs = best_fit(own, 64) if packing else [[row] for row in range(len(own))]
        units.append([[start + row for row in pack] for pack in packs])
        start += len(own)
    batches = EpochBatches(sources_of(units, datasets, [1.0, *map(Share, shares)]), 3, seed=1)
    total, epochs = np.zeros(len(datasets)), 20
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for row in (row for batch in batches for unit in batch for row in unit):
            total[home[row]] += lengths[row]
    found = total / total.sum()
    half_units = sum(
        0.5 * lengths[home == place].sum() / len(units[place]) for place in range(1, len(datasets))
    )
    for place, share in enumerate(shares, 1):
        assert found[place] == pytest.approx(share, abs=half_units / (total.sum() / epochs) + 0.005)
    assert total[0] == epochs * lengths[home == 0].sum()  # the target is shown whole


def test_a_run_draws_its_share_and_records_it(tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path):
    """The rows of an epoch are those that the share comes to; the record, the settings and the card say it."""
    target, other = (TeacherCache(path).lengths().astype(int) for path in (pruned_cache, llama_eval_cache))
    rows = round(0.4 * target.sum() / 0.6 / other.mean())
    words = [
        f"caches=[{{path: {llama_eval_cache}, share: 0.4, loss: ce}}]",
        "training.per_device_train_batch_size=1",
        "training.max_steps=-1",
        "training.num_train_epochs=1",
    ]
    report = train(settings(pruned_cache, tiny_llama_dir, tmp_path / "run", *words, "kl_coef=0"))
    assert report.num_steps == len(target) + rows != len(target) + round(0.4 * len(target))
    method = method_of(tmp_path / "run")
    assert method is not None and method.strengths == {"caches.0.share": 0.4}
    assert "replay" in (tmp_path / "run" / "README.md").read_text()


def config(*caches: dict) -> TrainConfig:
    return TrainConfig(cache="c", model="m", out="o", caches=[MixedCache(**cache) for cache in caches])


@pytest.mark.parametrize(
    ("caches", "message"),
    [
        ([{"path": "a", "share": 0.1, "weight": 0.1}], "got share 0.1 and weight 0.1 for a; keep one"),
        (
            [{"path": "a", "share": 0.1, "weight": 0}],
            "caches.share and caches.weight say the same in two ways",
        ),
        ([{"path": "a", "share": 0}], "caches.share must lie between 0 and 1, got 0"),
        ([{"path": "a", "share": 1}], "caches.share must lie between 0 and 1, got 1"),
        ([{"path": "a", "share": "half"}], "caches.share must be a number"),
        ([{"path": "a", "share": 0.5}, {"path": "b", "share": 0.5}], "shares that sum to 1"),
    ],
)
def test_what_says_two_things_or_nothing_is_refused_in_one_line(caches, message):
    with pytest.raises(ConfigError) as error:
        config(*caches)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["share", "weight"])
def test_a_share_or_weight_of_nothing_is_refused_before_anything_is_written(
    tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path, name
):
    words = [f"caches=[{{path: {llama_eval_cache}, {name}: 0.001}}]"]
    with pytest.raises(ConfigError, match=rf"caches.{name} 0.001 comes to 0\.\d+ rows or packs"):
        train(settings(pruned_cache, tiny_llama_dir, tmp_path / "run", *words))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("amount", [1e30, Share(1 - 1e-14)])
def test_more_rows_than_there_can_be_are_refused(amount, texts):
    with pytest.raises(
        ConfigError, match=r"comes to .* rows or packs of an epoch, of which there can be 2,147"
    ):
        sources_of([[[0]] * 50, [[0]] * 300], texts[:2], [1.0, amount])


def test_a_weight_is_one_unless_something_is_given():
    plain, weighed, shared = config(
        {"path": "a"}, {"path": "b", "weight": 0.2}, {"path": "c", "share": 0.2}
    ).caches
    assert (plain.weight, weighed.weight, shared.weight) == (1.0, 0.2, None)
    assert plain.used and shared.used and not MixedCache(path="a", weight=0).used
