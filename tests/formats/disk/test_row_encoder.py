"""Shards that several threads encode: the bytes of one thread, in bounded memory, errors where they belong."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from make_teachers import random_row, random_teacher

from formats import CodecConfig, ShardWriter, TokenRow, TopKLogprobs
from formats.codec.encoder import Encoder
from formats.disk import row_encoder
from formats.disk.row_encoder import EncoderThreads, RowEncoder

VOCAB_SIZE = 97
Rows = list[tuple[TokenRow, TopKLogprobs]]


@pytest.fixture(scope="module")
def rows() -> Rows:
    rng = np.random.default_rng(3)
    made = []
    for length in rng.integers(1, 30, 150):
        row = random_row(rng, int(length), VOCAB_SIZE)
        made.append((row, random_teacher(rng, row, VOCAB_SIZE).prune(1e-3, 64)))
    return made


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_encoder, "GROUP_NUMBERS", 300)
    monkeypatch.setattr("formats.disk.shard.SAMPLE_ENTRIES", 2000)


def written(path: Path, rows: Rows, pool: EncoderThreads | None) -> bytes:
    writer = ShardWriter(path, vocab_size=VOCAB_SIZE, positions="all", max_k=64, pool=pool)
    for row, teacher in rows:
        writer.append(row, teacher)
    info = writer.close()
    assert info.num_rows == len(rows)
    return path.read_bytes()


def test_threads_write_the_bytes_of_one(tmp_path: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = written(tmp_path / "alone", rows, None)
    with EncoderThreads(3) as pool:
        assert written(tmp_path / "three", rows, pool) == alone
        assert written(tmp_path / "again", rows, pool) == alone  # one pool serves all shards
    monkeypatch.setattr(row_encoder, "GROUP_NUMBERS", 1 << 20)
    assert written(tmp_path / "one-group", rows, None) == alone


class Held(Encoder):
    """Waits for leave before every group, and counts those that have begun."""

    def __init__(self) -> None:
        super().__init__(CodecConfig(), VOCAB_SIZE, 64)
        self.leave, self.begun = threading.Semaphore(0), threading.Semaphore(0)

    def encode_all(self, rows):
        self.begun.release()
        self.leave.acquire()
        return super().encode_all(rows)


@pytest.mark.parametrize("most_numbers", [1 << 22, 1000])
def test_what_is_under_way_is_bounded(rows: Rows, monkeypatch: pytest.MonkeyPatch, most_numbers: int) -> None:
    monkeypatch.setattr(row_encoder, "MOST_NUMBERS", most_numbers)
    most = back = 0
    with EncoderThreads(2) as pool:
        under_way = RowEncoder(Encoder(CodecConfig(), VOCAB_SIZE, 64), "all", pool)
        for row, topk in rows:
            back += len(list(under_way.add(row, topk)))
            waiting = [numbers for _, _, numbers in under_way._running]
            assert sum(waiting) <= most_numbers
            most = max(most, len(waiting))
        assert back + len(list(under_way.rest())) == len(rows)
    # A group has 300 numbers and more: the smaller bound lets no more than three of them be.
    assert most == (row_encoder.MOST_GROUPS * 2 if most_numbers > 1000 else 3)


def test_the_error_of_a_row_comes_up_and_the_rest_is_dropped(tmp_path: Path, rows: Rows) -> None:
    row, topk = rows[20]
    bad = replace(topk, label_logprobs=np.full(len(topk), np.nan, np.float32))
    for number in (1, 3):
        pool = EncoderThreads(number) if number > 1 else None
        path = tmp_path / str(number)
        writer = ShardWriter(path, vocab_size=VOCAB_SIZE, positions="all", max_k=64, pool=pool)
        with pytest.raises(ValueError, match="label_logprobs must be known"), writer:
            for each in [*rows[:100], (row, bad), *rows[100:]]:
                writer.append(*each)
            writer.close()
        assert not path.exists()
        if pool is not None:
            pool.shutdown()


def test_dropped_groups_do_not_begin(rows: Rows) -> None:
    held = Held()
    with EncoderThreads(1) as pool:
        under_way = RowEncoder(held, "all", pool)
        for row, topk in rows[:40]:
            assert not list(under_way.add(row, topk))
            if len(under_way._running) == 3:
                break
        held.begun.acquire()
        under_way.cancel()
        for _ in range(3):
            held.leave.release()
    assert not held.begun.acquire(blocking=False)
    assert not list(under_way.rest())
