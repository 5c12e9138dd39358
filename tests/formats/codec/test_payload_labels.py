"""Labels in payloads: their bytes by hand, what the encoder refuses, and one test per defect."""

import struct
from dataclasses import replace

import numpy as np
import pytest
import zstandard

from formats import TAIL_BETAS, CacheWriter, CodecConfig, TailDraws, TeacherCache, TokenRow, TopKLogprobs
from formats.codec.payload import Codec
from formats.errors import CorruptShardError

KINDS = {kind: CodecConfig(probabilities=kind, draw_rate=2) for kind in ("companded", "float32")}
VOCAB_SIZE = 300
KEPT = np.log(np.float32(0.75))
LABELS = np.array([1, 7, 299, 1, 0], np.int32)
"""Kept, not, not, kept, not."""
LOGPROBS = np.array([KEPT, -2.03, -100.0, KEPT, -7.5], np.float32)

MISMATCH = "do not match|at most 11 draws|must declare"

both = pytest.mark.parametrize("kind", KINDS)


def topk(logprobs: object = LOGPROBS) -> TopKLogprobs:
    """Five positions that keep token 1, and one draw at the second of them."""
    each = np.log(0.25 / (VOCAB_SIZE - 1))
    nodes = np.tile([np.log(VOCAB_SIZE - 1) + beta * each for beta in TAIL_BETAS], (5, 1))
    drawn = TailDraws([0, 0, 1, 1, 1, 1], [9], [-3.0], 2)
    return TopKLogprobs(np.arange(6), np.ones(5), np.full(5, KEPT), nodes, VOCAB_SIZE, drawn, logprobs)


def codec_of(kind: str) -> Codec:
    return Codec(KINDS[kind], VOCAB_SIZE, 4)


def body_of(kind: str) -> bytearray:
    return bytearray(zstandard.ZstdDecompressor().decompress(codec_of(kind).encode(topk(), LABELS)))


def decode(kind: str, body: bytes, labels: np.ndarray = LABELS) -> TopKLogprobs:
    return codec_of(kind).decode(zstandard.ZstdCompressor(write_checksum=True).compress(bytes(body)), labels)


def start(kind: str) -> int:
    """Where the labels begin: behind counts of one byte, ids of two, probabilities and tails."""
    return 5 * (1 + 2 + (1 + 7) * (2 if kind == "companded" else 4))


def test_labels_follow_the_tails_by_hand():
    """2.03 nats are 32.48 sixteenths, 100 more than a byte holds, 7.5 are 120; then five counts of draws."""
    body = body_of("companded")
    assert list(body[start("companded") :][:8]) == [32, 255, 120, 0, 1, 0, 0, 0]
    assert len(body) == start("companded") + 3 + 5 + 2 + 2
    got = decode("companded", body).label_logprobs
    kept = decode("companded", body).logprobs[0]
    assert got.tolist() == [kept, -2.0, -255 / 16, kept, -7.5]
    body = body_of("float32")
    stored = np.frombuffer(bytes(body[start("float32") :][:12]), np.uint8).reshape(4, 3)
    assert stored.T.copy().view("<f4").ravel().tolist() == LOGPROBS[[1, 2, 4]].tolist()
    assert decode("float32", body).label_logprobs.tolist() == LOGPROBS.tolist()


@both
def test_labels_that_are_kept_cost_nothing(kind: str):
    codec, all_kept = codec_of(kind), np.ones(5, np.int32)
    width = 1 if kind == "companded" else 4
    sections = codec.sections(topk(np.full(5, KEPT)), all_kept)
    others = codec.sections(topk(), LABELS)
    assert sections[4] == b"" and len(others[4]) == 3 * width
    assert sections[:4] + sections[5:] == others[:4] + others[5:]


@both
def test_every_byte_of_a_label_is_another_logprob(kind: str):
    """Any other value of any byte gives another label or an error, and leaves everything else alone."""
    body, good = body_of(kind), decode(kind, body_of(kind))
    for at in range(start(kind), start(kind) + 3 * (1 if kind == "companded" else 4)):
        for value in range(256):
            changed = bytearray(body)
            changed[at] = value
            try:
                got = decode(kind, changed)
            except CorruptShardError:
                assert kind == "float32"
                continue
            same = got.label_logprobs.tobytes() == good.label_logprobs.tobytes()
            assert same == (value == body[at])
            assert (got.logprobs == good.logprobs).all() and (got.log_tail_nodes == good.log_tail_nodes).all()
            assert (got.draws.token_ids == good.draws.token_ids).all()
            assert (got.label_logprobs[[0, 3]] == got.logprobs[[0, 3]]).all()


@pytest.mark.parametrize("value", [0.01, 3e38, np.nan, -np.nan, np.inf])
def test_labels_that_cannot_be_are_refused(value: float):
    body = body_of("float32")
    for k, byte in enumerate(struct.pack("<f", value)):
        body[start("float32") + 3 * k + 1] = byte
    with pytest.raises(CorruptShardError, match="logprobs of labels must be at most 0"):
        decode("float32", body)


@pytest.mark.parametrize("value", [5e-4, -np.inf])
def test_labels_that_can_be_are_accepted(value: float):
    """A rounding above 0, and an impossible token."""
    body = body_of("float32")
    for k, byte in enumerate(struct.pack("<f", value)):
        body[start("float32") + 3 * k + 1] = byte
    assert decode("float32", body).label_logprobs[2] == np.float32(value)


@both
def test_a_section_of_another_length_is_refused(kind: str):
    """Labels too many or too few, and whatever is cut off between them and the end."""
    body, width = body_of(kind), 1 if kind == "companded" else 4
    for gone in (1, width, 2 * width, 3 * width):
        with pytest.raises(CorruptShardError, match=MISMATCH):
            decode(kind, body[: start(kind)] + body[start(kind) + gone :])
    with pytest.raises(CorruptShardError, match=MISMATCH):
        decode(kind, body[: start(kind)] + bytes(width) + body[start(kind) :])
    for length in range(start(kind), len(body)):
        with pytest.raises(CorruptShardError, match=MISMATCH):
            decode(kind, body[:length])


@both
@pytest.mark.parametrize("labels", [[1, 1, 299, 1, 0], [2, 7, 299, 1, 0], [5] * 5])
def test_a_payload_of_another_row_is_refused(kind: str, labels: list[int]):
    """As far as it can be seen: another number of these next tokens is kept."""
    with pytest.raises(CorruptShardError, match=r"do not match|at most"):
        decode(kind, body_of(kind), np.array(labels))


@both
def test_the_encoder_refuses_labels_that_it_cannot_store(kind: str):
    def changed(at: int, value: float) -> TopKLogprobs:
        logprobs = LOGPROBS.copy()
        logprobs[at] = value
        return topk(logprobs)

    for at in range(5):
        with pytest.raises(ValueError, match="label_logprobs must be known to be stored, got NaN"):
            codec_of(kind).encode(changed(at, np.nan), LABELS)
        with pytest.raises(ValueError, match="label_logprobs must not be above 0"):
            codec_of(kind).encode(changed(at, 0.01), LABELS)
    for value in (KEPT + 0.002, KEPT - 0.002, -np.inf):
        with pytest.raises(ValueError, match=r"those of the tokens that come next, got .*shifted"):
            codec_of(kind).encode(changed(3, value), LABELS)
    codec_of(kind).encode(changed(3, KEPT + 5e-4), LABELS)  # what rounding may do
    for wrong in (LABELS[:4], np.append(LABELS, 1), LABELS[None], 0):
        with pytest.raises(ValueError, match=r"label_ids must be one per position \(5\)"):
            codec_of(kind).encode(topk(), wrong)


def test_writers_refuse_unknown_labels(tmp_path):
    """The row waits for the rank table: what is wrong with it shows when the cache is closed."""
    row = TokenRow(np.append(0, LABELS), np.arange(6) > 0)
    with (
        pytest.raises(ValueError, match="must be known"),
        CacheWriter(tmp_path / "c", identity={}, vocab_size=VOCAB_SIZE, codec=KINDS["float32"]) as writer,
    ):
        writer.append(row, topk(np.full(5, np.nan)))
    assert not (tmp_path / "c" / "manifest.json").exists()


@both
def test_labels_beyond_the_vocabulary_are_impossible(tmp_path, kind: str):
    """A row may hold tokens that the teacher does not know; it cannot predict them."""
    labels = np.array([1, VOCAB_SIZE, 299, 1, 0])
    logprobs = LOGPROBS.copy()
    logprobs[1] = -np.inf
    row = TokenRow(np.append(0, labels), np.arange(6) > 0)
    with CacheWriter(tmp_path / "c", identity={}, vocab_size=VOCAB_SIZE, codec=KINDS[kind]) as writer:
        writer.append(row, topk(logprobs))
    got = TeacherCache(tmp_path / "c")[0]
    assert got.label_ids.tolist() == labels.tolist()
    assert got.teacher.label_logprobs[1] == (-255 / 16 if kind == "companded" else -np.inf)


@both
@pytest.mark.parametrize("positions", ["loss", "all"])
def test_labels_are_those_of_their_positions(tmp_path, kind: str, positions: str):
    """A teacher whose logprob tells the token: every position must come back with that of its successor."""
    ids = np.array([4, 250, 9, 9, 30, 8])
    row = TokenRow(ids, np.array([False, True, False, True, True, False]))
    at = row.positions(positions)
    each = np.log(0.25 / (VOCAB_SIZE - 1))
    nodes = np.tile([np.log(VOCAB_SIZE - 1) + beta * each for beta in TAIL_BETAS], (len(at), 1))
    teacher = TopKLogprobs(
        np.arange(len(at) + 1),
        np.full(len(at), 9),
        np.full(len(at), KEPT),
        nodes,
        VOCAB_SIZE,
        TailDraws.none(len(at), 2),
        [KEPT if ids[i + 1] == 9 else -float(ids[i + 1]) / 16 for i in at],
    )
    with CacheWriter(
        tmp_path / "c", identity={}, vocab_size=VOCAB_SIZE, positions=positions, codec=KINDS[kind]
    ) as writer:
        writer.append(row, teacher)
    got = TeacherCache(tmp_path / "c")[0]
    for i, logprob in zip(got.positions.tolist(), got.teacher.label_logprobs.tolist(), strict=True):
        assert logprob == pytest.approx(KEPT if ids[i + 1] == 9 else -ids[i + 1] / 16, abs=1e-3)
    with (
        pytest.raises(ValueError, match="shifted"),
        CacheWriter(
            tmp_path / "shifted", identity={}, vocab_size=VOCAB_SIZE, positions=positions, codec=KINDS[kind]
        ) as writer,
    ):
        writer.append(row, replace(teacher, label_logprobs=np.roll(teacher.label_logprobs, 1)))
