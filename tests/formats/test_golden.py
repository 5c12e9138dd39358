"""Golden caches: readable for ever, by our reader and by one written from docs/format.md
alone."""

import json
import math
from pathlib import Path

import independent_reader
import numpy as np
import pytest
import zstandard
from make_teachers import by_id

from formats import TAIL_BETAS, Manifest, TailDraws, TeacherCache

GOLDEN = Path(__file__).parent / "golden"
DRAW_RATE = {"compact": 52, "lossless": 40, "without_draws": 0}
CACHES = tuple(DRAW_RATE)


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
        assert row.teacher.draws.rate == DRAW_RATE[name]
        assert row.teacher.draws.counts.tolist() == wanted["draw_counts"]
        _, drawn_ids, drawn = by_id(row.teacher.draws)
        assert drawn_ids.tolist() == wanted["draw_ids"]
        drawn_before = np.array(wanted["draw_logprobs"], np.float32)
        label, label_before = row.teacher.label_logprobs, np.array(wanted["label_logprobs"], np.float32)
        kept, entries = row.teacher.kept_labels(row.label_ids)
        assert (label[kept] == row.teacher.logprobs[entries]).all()
        if config.probabilities == "float32":
            assert (np.array(wanted["logprobs"], np.float32) == logprobs).all()
            assert (nodes.astype(np.float32) == row.teacher.log_tail_nodes).all()
            assert (drawn_before == drawn).all()
            assert (label_before == label).all()
        else:
            assert (
                np.abs(got_root - root) <= 0.5 / (config.sqrt_steps + config.linear_steps * root) + 1e-6
            ).all()
            assert row.teacher.log_tail_nodes == pytest.approx(nodes, abs=0.5 / config.tail_steps + 1e-5)
            assert drawn == pytest.approx(drawn_before, abs=0.5 / config.draw_steps + 1e-6)
            rest = np.setdiff1d(np.arange(len(label)), kept)
            assert label[rest] == pytest.approx(np.maximum(label_before[rest], -255 / 16), abs=1 / 32)


@pytest.mark.parametrize("name", CACHES)
def test_what_was_read_is_written_again_to_the_byte(name: str):
    """The manifest, and every row before compression, which a newer zstd may do better."""
    cache = TeacherCache(GOLDEN / name)
    data = (GOLDEN / name / "manifest.json").read_bytes()
    assert Manifest.from_bytes(data).to_bytes() == data
    compared = 0
    for number in range(len(cache.manifest.shards)):
        reader = cache.shard(number)
        for index in range(len(reader)):
            payload = reader.row(index)[1]
            body = zstandard.ZstdDecompressor().decompress(payload) if len(payload) else b""
            tokens, teacher = reader.teacher(index)
            assert b"".join(reader.codec.sections(teacher, tokens.label_ids(reader.positions))) == body
            compared += len(body)
    assert compared > 400


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
        for p, (head, tail, label, drawn) in enumerate(plain["teacher"]):
            assert row.teacher.label_logprobs[p] == pytest.approx(label, rel=1e-6, abs=1e-7)
            ours_drawn = row.teacher.draws.slice(p, p + 1)
            assert ours_drawn.token_ids.tolist() == [token for token, _ in drawn]
            logprobs = [logprob for _, logprob in drawn]
            assert ours_drawn.logprobs.tolist() == pytest.approx(logprobs, rel=1e-6, abs=0)
            a, b = row.teacher.offsets[p : p + 2]
            ours = dict(
                zip(row.teacher.token_ids[a:b].tolist(), row.teacher.logprobs[a:b].tolist(), strict=True)
            )
            assert ours.keys() == head.keys()
            assert all(ours[token] == pytest.approx(head[token], rel=1e-6, abs=1e-7) for token in head)
            for beta, node in zip(TAIL_BETAS, row.teacher.log_tail_nodes[p].tolist(), strict=True):
                assert node == tail[beta] or math.isclose(node, tail[beta], rel_tol=1e-6)


@pytest.mark.parametrize("name", ["compact", "without_draws"])
def test_the_compact_goldens_use_a_rank_table(name: str):
    """Otherwise the goldens would not hold the readers to it."""
    reader = TeacherCache(GOLDEN / name).shard(0)
    assert reader.codec._id_of_rank is not None


@pytest.mark.parametrize("name", ["compact", "lossless"])
def test_the_goldens_hold_draws_of_every_kind(name: str):
    """None, many, the same token again, from under and beyond the rank table; numbers of two bytes."""
    cache = TeacherCache(GOLDEN / name)
    drawn = TailDraws.concatenate([row.teacher.draws for row in cache])
    again = np.diff(by_id(drawn)[1]) == 0
    again &= np.diff(np.repeat(np.arange(len(drawn)), drawn.counts)) == 0
    assert drawn.counts.min() == 0 and drawn.counts.max() > 5 and again.sum() >= 5
    if name == "compact":
        codec = cache.shard(0).codec
        assert codec._draw_count_width == codec._id_width == 2
        ranks = codec._rank_of_id[drawn.token_ids]
        assert drawn.token_ids.max() > 255 and ranks.min() < 3 and drawn.logprobs.min() < -256 / 90
    else:
        for row in cache:
            assert (row.teacher.draws.counts[row.teacher.counts == 12] == 0).all()


@pytest.mark.parametrize("name", CACHES)
def test_the_goldens_hold_labels_of_every_kind(name: str):
    """Kept and not; not kept and below what a byte tells, in the compact ones."""
    rows = list(TeacherCache(GOLDEN / name))
    num_kept = sum(len(row.teacher.kept_labels(row.label_ids)[0]) for row in rows)
    labels = np.concatenate([row.teacher.label_logprobs for row in rows])
    assert 3 <= num_kept <= len(labels) - 3
    before = np.concatenate([row["label_logprobs"] for row in expected_rows(name)])
    if name != "lossless":
        assert (labels[before < -16] == -255 / 16).all() and (before < -17).sum() >= 3


def test_the_independent_reader_is_independent():
    source = Path(independent_reader.__file__).read_text()
    assert "formats" not in source.split('"""')[2] and "numpy" not in source
    assert source.count("\n") < 205
