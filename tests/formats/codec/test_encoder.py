"""Rows that are encoded together: the same bytes as one by one, the same refusals, from any thread."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from make_teachers import random_row, random_teacher

from formats import CodecConfig, TopKLogprobs
from formats.codec.encoder import Encoder, Labelled
from formats.codec.rank_table import rank_by_frequency

VOCAB_SIZE, RATE = 700, 3
CONFIGS = {
    "default": CodecConfig(draw_rate=RATE),
    "exact": replace(CodecConfig.lossless(), draw_rate=RATE),
    "no draws": CodecConfig(),
}


def rows_for(config: CodecConfig, lengths: tuple[int, ...] = (5, 0, 1, 60, 2, 0, 33)) -> list[Labelled]:
    """Rows whose lengths differ, some without any position."""
    rng = np.random.default_rng(1)
    rows = []
    for length in lengths:
        if length == 0:
            rows.append((TopKLogprobs.empty(VOCAB_SIZE, config.draw_rate), np.zeros(0, np.int64)))
            continue
        row = random_row(rng, length + 1, VOCAB_SIZE)
        topk = random_teacher(rng, row, VOCAB_SIZE, draw_rate=config.draw_rate).prune(5e-3, 64)
        rows.append((topk, row.label_ids("all")))
    return rows


def encoder_for(config: CodecConfig, rows: list[Labelled]) -> Encoder:
    ids = np.concatenate([topk.token_ids for topk, _ in rows])
    return Encoder(config, VOCAB_SIZE, VOCAB_SIZE, rank_by_frequency(ids, VOCAB_SIZE))


@pytest.mark.parametrize("name", CONFIGS)
def test_company_does_not_change_a_rows_bytes(name: str) -> None:
    rows = rows_for(CONFIGS[name])
    encoder = encoder_for(CONFIGS[name], rows)
    alone = [encoder.encode(*row) for row in rows]
    assert encoder.encode_all(rows) == alone
    assert encoder.encode_all(rows[::-1]) == alone[::-1]
    assert encoder.encode_all([]) == []
    assert [len(payload) == 0 for payload in alone] == [len(topk) == 0 for topk, _ in rows]


def test_threads_share_an_encoder() -> None:
    config = CONFIGS["default"]
    rows = rows_for(config, lengths=tuple(range(1, 41)))
    encoder = encoder_for(config, rows)
    alone = [encoder.encode(*row) for row in rows]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda row: encoder.encode(*row), rows)) == alone


def test_one_bad_row_among_others_is_refused() -> None:
    config = CONFIGS["default"]
    rows = rows_for(config)
    encoder = encoder_for(config, rows)
    topk, labels = rows[3]
    unknown = topk.label_logprobs.copy()
    unknown[-1] = np.nan
    heavy = topk.logprobs.copy()
    heavy[:] = 0.0
    outside = topk.token_ids.copy()
    outside[-1] = VOCAB_SIZE
    for bad, rule in (
        (replace(topk, label_logprobs=unknown), "label_logprobs must be known"),
        (replace(topk, logprobs=heavy), "must sum to 1"),
        (replace(topk, token_ids=outside), "token ids must be from 0 to 699"),
        (replace(topk, vocab_size=VOCAB_SIZE + 1), "vocab_size must be 700, got 701"),
        (replace(topk, draws=replace(topk.draws, rate=RATE + 1)), "must have rate 3, got 4"),
    ):
        with pytest.raises(ValueError, match=rule):
            encoder.encode_all([*rows[:3], (bad, labels), *rows[4:]])
    with pytest.raises(ValueError, match="label_ids must be one per position"):
        encoder.encode_all([*rows[:3], (topk, labels[:-1]), *rows[4:]])
