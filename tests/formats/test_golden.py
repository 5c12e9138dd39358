"""Golden caches of version 1: readable for ever, by our reader and by one written from docs/format.md
alone."""

import json
import math
from pathlib import Path

import independent_reader
import numpy as np
import pytest
from make_teachers import by_id

from formats import TAIL_BETAS, TeacherCache

GOLDEN = Path(__file__).parent / "golden"
CACHES = ("compact", "lossless")


def expected_rows(name: str) -> list[dict]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.mark.parametrize("name", CACHES)
def test_golden_caches_hold_what_was_written(name: str):
    cache = TeacherCache(GOLDEN / name)
    cache.validate(full=True)
    expected = expected_rows(name)
    assert len(cache) == len(expected)
    config = cache.manifest.codec
    for row, wanted in zip(cache, expected, strict=True):
        assert row.input_ids.tolist() == wanted["input_ids"]
        assert row.loss_mask.tolist() == wanted["loss_mask"]
        assert row.key.hex() == wanted["key"]
        assert row.teacher.counts.tolist() == wanted["counts"]
        _, ids, logprobs = by_id(row.teacher)
        assert ids.tolist() == wanted["token_ids"]
        nodes = np.array(wanted["log_tail_nodes"], np.float64).reshape(-1, 7)
        root, got_root = np.exp(np.array(wanted["logprobs"]) / 2), np.exp(logprobs / 2)
        if name == "lossless":
            assert (np.array(wanted["logprobs"], np.float32) == logprobs).all()
            assert (nodes.astype(np.float32) == row.teacher.log_tail_nodes).all()
        else:
            assert (
                np.abs(got_root - root) <= 0.5 / (config.sqrt_steps + config.linear_steps * root) + 1e-6
            ).all()
            assert row.teacher.log_tail_nodes == pytest.approx(nodes, abs=0.5 / config.tail_steps + 1e-5)


@pytest.mark.parametrize("name", CACHES)
def test_the_independent_reader_sees_the_same_numbers(name: str):
    cache = TeacherCache(GOLDEN / name)
    rows = independent_reader.read_cache(GOLDEN / name)
    assert len(rows) == len(cache)
    for row, plain in zip(cache, rows, strict=True):
        assert plain["key"] == row.key
        assert plain["input_ids"] == row.input_ids.tolist()
        assert plain["positions"] == row.positions.tolist()
        assert len(plain["teacher"]) == len(row.teacher)
        for p, (head, tail) in enumerate(plain["teacher"]):
            a, b = row.teacher.offsets[p : p + 2]
            ours = dict(
                zip(row.teacher.token_ids[a:b].tolist(), row.teacher.logprobs[a:b].tolist(), strict=True)
            )
            assert ours.keys() == head.keys()
            assert all(ours[token] == pytest.approx(head[token], rel=1e-6, abs=1e-7) for token in head)
            for beta, node in zip(TAIL_BETAS, row.teacher.log_tail_nodes[p].tolist(), strict=True):
                assert node == tail[beta] or math.isclose(node, tail[beta], rel_tol=1e-6)


def test_the_compact_golden_uses_a_rank_table():
    """Otherwise the goldens would not hold the readers to it."""
    reader = TeacherCache(GOLDEN / "compact").shard(0)
    assert reader.codec._id_of_rank is not None


def test_the_independent_reader_is_independent():
    source = Path(independent_reader.__file__).read_text()
    assert "formats" not in source.split('"""')[2] and "numpy" not in source
    assert source.count("\n") < 160
