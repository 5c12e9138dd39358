"""Dataset, collator and packing: what reaches the model is what the cache holds, at the right row of the
batch.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from caches import random_rows, topk_of, write_cache
from torch.utils.data import DataLoader

from formats.cache import TeacherCache
from formats.disk.token_row import TokenRow
from formats.errors import ConfigError, FormatError, IncompleteCacheError
from formats.writer import CacheWriter
from trainer.data.collator import LabelAnnealingCollator, count_targets, split_batch
from trainer.data.dataset import CachedDataset, Filler, Unit, UnitDataset, require_one_tail
from trainer.data.packing import best_fit

INT32 = ("input_ids", "labels", "teacher_positions", "teacher_counts", "teacher_token_ids")


def hand_made_cache(path, positions="loss"):
    """Two rows over a vocabulary of 8, with teachers that name themselves: entry ids encode row and
    position.
    """
    rows = [
        TokenRow([1, 2, 3, 4], [False, False, True, True]),
        TokenRow([5, 6, 7], [False, True, True]),
    ]
    with CacheWriter(path, identity={}, vocab_size=8, max_k=2, positions=positions) as writer:
        for number, row in enumerate(rows):
            logits = np.zeros((len(row.positions(positions)), 8))
            for k, position in enumerate(row.positions(positions)):
                logits[k, position + 4 * number] = 5.0  # the likeliest token is `position + 4 * row`
            logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            writer.append(row, topk_of(logprobs, max_k=2, label_ids=row.label_ids(positions)))
    return path


def likeliest(teacher) -> list[int]:
    """The most probable token of every position; the order of entries means nothing."""
    spans = [slice(a, b) for a, b in pairwise(teacher.offsets.tolist())]
    return [int(teacher.token_ids[span][teacher.logprobs[span].argmax()]) for span in spans]


def test_items_are_compact_arrays_and_equal_the_cache(llama_cache):
    cache = TeacherCache(llama_cache)
    dataset = CachedDataset(llama_cache, temperature=2.0)
    assert len(dataset) == len(cache) == 24
    for index in (0, 1, 23):
        item, row = dataset[index], cache[index]
        assert all(item[name].dtype == np.int32 for name in INT32)
        assert item["teacher_logprobs"].dtype == item["teacher_log_tail"].dtype == np.float32
        assert np.array_equal(item["input_ids"], row.input_ids)
        assert np.array_equal(item["labels"], np.where(row.loss_mask, row.input_ids, -100))
        assert np.array_equal(item["teacher_positions"], np.flatnonzero(row.loss_mask) - 1)
        assert np.array_equal(item["teacher_token_ids"], row.teacher.token_ids)
        np.testing.assert_array_equal(item["teacher_log_tail"], row.teacher.log_tail(2.0))
        assert dataset.index_of(row.key) == index
    assert np.array_equal(dataset.lengths(), [len(row) for row in cache])
    with pytest.raises(KeyError):
        dataset.index_of(b"\0" * 16)


def test_the_right_teacher_lands_on_the_right_row_of_the_batch(tmp_path):
    """By hand: row 0 has targets at tokens 2 and 3, predicted at 1 and 2; row 1 at 1 and 2, predicted at 0
    and 1.
    """
    dataset = CachedDataset(hand_made_cache(tmp_path / "c"))
    batch = LabelAnnealingCollator(pad_token_id=0)([dataset[0], dataset[1]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 0]]
    assert batch["attention_mask"].tolist() == [[True] * 4, [True, True, True, False]]
    assert batch["labels"].tolist() == [[-100, -100, 3, 4], [-100, 6, 7, -100]]
    assert batch["num_tokens"] == 7
    assert count_targets(batch) == (4, 4)
    inputs, labels_N, teacher = split_batch(batch)
    assert set(inputs) == {"input_ids", "attention_mask", "use_cache"}
    # Flattened rows: 0..3 belong to row 0, 4..7 to row 1; hidden row n predicts the token after it.
    assert labels_N.tolist() == [-100, 3, 4, -100, 6, 7, -100, -100]
    assert teacher.rows.tolist() == [1, 2, 4, 5]
    assert likeliest(teacher) == [1, 2, 4, 5]
    teacher.validate(num_rows=8, vocab_size=8)


def test_packed_batches_restart_positions_and_shift_rows(tmp_path):
    dataset = CachedDataset(hand_made_cache(tmp_path / "c", positions="all"))
    batch = LabelAnnealingCollator(packing=True)([[dataset[1], dataset[0]], [dataset[0]]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1, 2, 3, 4], [1, 2, 3, 4, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2]]
    assert "attention_mask" not in batch
    _, labels_N, teacher = split_batch(batch)
    # The last token of a packed row predicts nothing: the next row's first token is not its continuation.
    assert labels_N.tolist() == [6, 7, -100, -100, 3, 4, -100, -100, 3, 4, -100, -100, -100, -100]
    assert teacher.rows.tolist() == [0, 1, 3, 4, 5, 7, 8, 9]
    assert likeliest(teacher) == [4, 5, 0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("packing", (False, True))
def test_draws_land_on_their_rows(pruned_cache, packing):
    """Row by row, the batch holds the draws that the cache holds, weighted by their expected number."""
    cache, dataset = TeacherCache(pruned_cache), CachedDataset(pruned_cache, temperature=2.0)
    chosen = (5, 0, 23)
    items = [dataset[index] for index in chosen]
    assert items[0]["teacher_draw_counts"].dtype == items[0]["teacher_draw_ids"].dtype == np.int32
    batch = LabelAnnealingCollator(packing=packing)([items] if packing else items)
    _, _, teacher = split_batch(batch)
    assert teacher.draw_offsets.dtype == torch.int64 and len(teacher.draw_ids) > 20
    teacher.validate(num_rows=batch["input_ids"].numel(), vocab_size=cache.manifest.vocab_size)
    stored = [cache[index].teacher.draws for index in chosen]
    assert np.diff(teacher.draw_offsets).tolist() == [n for draws in stored for n in draws.counts]
    assert teacher.draw_ids.tolist() == [token for draws in stored for token in draws.token_ids]
    logprobs = np.concatenate([draws.logprobs for draws in stored])
    np.testing.assert_array_equal(teacher.draw_logprobs, logprobs)
    np.testing.assert_allclose(teacher.draw_weights, np.exp(-0.75 * logprobs) / 4, rtol=1e-6)


def test_draws_can_be_left_out_and_do_not_mix(pruned_cache, tmp_path, tiny_llama_dir):
    without = CachedDataset(pruned_cache, tail_draws=False)
    assert not any(name.startswith("teacher_draw") for name in without[0])
    _, _, teacher = split_batch(LabelAnnealingCollator()([without[0]]))
    assert teacher.draw_offsets is None
    other = CachedDataset(write_cache(tmp_path / "none", tiny_llama_dir, num_rows=2, draw_rate=0))
    with pytest.raises(ConfigError, match="must have tail draws or none"):
        LabelAnnealingCollator()([CachedDataset(pruned_cache)[0], other[0]])
    with pytest.raises(ConfigError, match=r"pruned has some and .*none has none; build them alike"):
        require_one_tail([CachedDataset(pruned_cache), other])
    require_one_tail([CachedDataset(pruned_cache), CachedDataset(tmp_path / "none", loss="ce")])
    require_one_tail([without, other])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_deliver_the_same_batches(pruned_cache, context):
    dataset = UnitDataset([CachedDataset(pruned_cache)])
    units = [[Unit((0,)), Unit((5,))], [Unit((23,)), Unit((1,))]]
    options = {"batch_sampler": units, "collate_fn": LabelAnnealingCollator(packing=True)}
    here = list(DataLoader(dataset, **options))
    there = list(DataLoader(dataset, **options, num_workers=1, multiprocessing_context=context))
    for mine, other in zip(here, there, strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[k], other[k]) for k in mine if isinstance(mine[k], torch.Tensor))
        assert not any(v.dtype == torch.int64 for v in mine.values() if isinstance(v, torch.Tensor))


def test_losses_per_dataset_and_fillers(llama_cache):
    both, ce, kl = (CachedDataset(llama_cache, loss=loss)[3] for loss in ("both", "ce", "kl"))
    assert len(ce["teacher_positions"]) == 0 and np.array_equal(ce["labels"], both["labels"])
    assert (kl["labels"] == -100).all() and len(kl["teacher_positions"]) == len(both["teacher_positions"])
    (filler,) = UnitDataset([CachedDataset(llama_cache)])[Filler((3,))]
    assert count_targets(LabelAnnealingCollator()([filler])) == (0, 0)
    assert np.array_equal(filler["input_ids"], both["input_ids"])


def test_several_datasets_share_one_numbering(llama_cache, llama_eval_cache):
    first, second = CachedDataset(llama_cache), CachedDataset(llama_eval_cache)
    joined = UnitDataset([first, second])
    assert len(joined) == 32
    for number, source, row in ((0, first, 0), (23, first, 23), (24, second, 0), (31, second, 7)):
        assert np.array_equal(joined[Unit((number,))][0]["input_ids"], source[row]["input_ids"])
    with pytest.raises(IndexError):
        joined.row(32)


def test_temperatures_do_not_mix(llama_cache):
    items = [CachedDataset(llama_cache, temperature=t)[0] for t in (1.0, 2.0)]
    with pytest.raises(ConfigError, match="one temperature"):
        LabelAnnealingCollator()(items)


def test_unusable_caches_are_refused(tmp_path, tiny_llama_dir):
    with pytest.raises(FormatError, match="missing"):
        CachedDataset(tmp_path / "missing")
    writer = CacheWriter(tmp_path / "unfinished", identity={}, vocab_size=8, rows_per_shard=1)
    row = TokenRow([1, 2], [False, True])
    writer.append(row, topk_of(np.log(np.full((1, 8), 1 / 8)), label_ids=row.label_ids()))
    with pytest.raises(IncompleteCacheError):
        CachedDataset(tmp_path / "unfinished")
    with CacheWriter(tmp_path / "empty", identity={}, vocab_size=8):
        pass
    with pytest.raises(ConfigError, match="needs rows, got none"):
        CachedDataset(tmp_path / "empty")
    rows = [TokenRow(row.input_ids, np.zeros(len(row), bool)) for row in random_rows(2, 1003)]
    write_cache(tmp_path / "unmasked", tiny_llama_dir, rows=rows)
    with pytest.raises(ConfigError, match="without any"):
        CachedDataset(tmp_path / "unmasked")
    assert len(CachedDataset(tmp_path / "unmasked", loss="ce")) == 2


# --- packing
# -------------------------------------------------------------------------------------------------


def naive_best_fit(lengths: list[int], capacity: int) -> int:
    """Number of packs by the obvious algorithm."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return len(rooms)


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_is_a_partition_within_capacity_and_as_tight_as_the_obvious_one(seed):
    lengths = np.random.default_rng(seed).integers(1, 65, 300)
    packs = best_fit(lengths, 64)
    assert sorted(i for pack in packs for i in pack) == list(range(300))
    assert max(int(lengths[pack].sum()) for pack in packs) <= 64
    assert len(packs) == naive_best_fit(lengths.tolist(), 64)
    assert packs == best_fit(lengths, 64)


def test_best_fit_by_hand():
    assert best_fit(np.asarray([5, 3, 7, 2, 1]), 8) == [[0, 1], [2, 4], [3]]
    with pytest.raises(ConfigError, match="longest row of 9 tokens, got 8"):
        best_fit(np.asarray([9]), 8)


def test_best_fit_is_fast_enough_for_a_million_rows():
    lengths = np.random.default_rng(0).integers(16, 2049, 20_000)
    packs = best_fit(lengths, 2048)
    assert lengths.sum() / (len(packs) * 2048) > 0.98  # nearly no padding


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_dir", ["tiny_llama_dir", "tiny_qwen3_dir", "tiny_gemma2_dir"])
def test_packed_rows_see_only_themselves(request, model_dir, attention):
    """Hidden states of packed rows equal those of each row alone: no attention and no positions leak
    across.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        request.getfixturevalue(model_dir), dtype=torch.float64, attn_implementation=attention
    ).eval()
    generator = np.random.default_rng(0)
    rows = [generator.integers(6, 1003, n).astype(np.int32) for n in (70, 9, 23, 41)]
    empty = {"teacher_positions": np.zeros(0, np.int32), "teacher_counts": np.zeros(0, np.int32)}
    empty |= {"teacher_token_ids": np.zeros(0, np.int32), "teacher_logprobs": np.zeros(0, np.float32)}
    empty |= {"teacher_log_tail": np.zeros(0, np.float32), "temperature": 1.0}
    items = [{"input_ids": row, "labels": row, **empty} for row in rows]
    batch = LabelAnnealingCollator(packing=True)([[items[0], items[1]], [items[2], items[3]]])
    inputs, _, _ = split_batch(batch)
    with torch.no_grad():
        packed = model(**inputs).logits
        places = [(0, 0), (0, 70), (1, 0), (1, 23)]
        for (b, start), row in zip(places, rows, strict=True):
            alone = model(input_ids=torch.as_tensor(row[None].astype(np.int64))).logits[0]
            # Eager attention takes its softmax in float32 whatever the model's type.
            tolerance = 1e-8 if attention != "eager" else 1e-5
            torch.testing.assert_close(
                packed[b, start : start + len(row)], alone, rtol=tolerance, atol=tolerance
            )
        leaking = model(input_ids=inputs["input_ids"], use_cache=False).logits[0, 70:79]
    assert (leaking - packed[0, 70:79]).abs().max() > 0.1  # without position_ids they do leak
