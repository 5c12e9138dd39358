"""Tail draws in payloads: their bytes by hand, what the encoder refuses, and one test per defect."""

import struct
from collections.abc import Callable

import numpy as np
import pytest
import zstandard

from formats import TAIL_BETAS, CodecConfig, TailDraws, TopKLogprobs
from formats.codec.payload import Codec
from formats.errors import CorruptShardError

CONFIGS = {
    "companded": CodecConfig(draw_rate=2, draw_steps=10),
    "float32": CodecConfig(draw_rate=2, draw_steps=10, probabilities="float32"),
}
VOCAB_SIZE = 300
MOST = 2 * 5 + 1
COUNTS = [3, 0, 2]
IDS = [299, 7, 7, 4, 260]
LOGPROBS = [-30.0, -1.5, -1.5, 0.0, -0.25]
NONE = TailDraws.none(3)
LABELS = np.ones(3, np.int32)
"""All kept: no bytes of their own."""


def topk(drawn: TailDraws | None = None) -> TopKLogprobs:
    """Three positions whose head is token 1, and draws of which none is in the order of their ids."""
    if drawn is None:
        drawn = TailDraws(np.array([0, 3, 3, 5]), IDS, LOGPROBS, 2)
    each = np.log(0.25 / (VOCAB_SIZE - 1))
    nodes = np.tile([np.log(VOCAB_SIZE - 1) + beta * each for beta in TAIL_BETAS], (3, 1))
    kept = np.log(np.full(3, 0.75))
    return TopKLogprobs(np.arange(4), np.ones(3), kept, nodes, VOCAB_SIZE, drawn, kept)


def codec_of(kind: str, **changes: object) -> Codec:
    return Codec(CodecConfig(**(vars(CONFIGS[kind]) | changes)), VOCAB_SIZE, 4)


def body_of(kind: str) -> bytearray:
    return bytearray(zstandard.ZstdDecompressor().decompress(codec_of(kind).encode(topk(), LABELS)))


def decode(kind: str, body: bytes) -> TopKLogprobs:
    payload = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(body))
    return codec_of(kind).decode(payload, LABELS)


def start(kind: str, section: str) -> int:
    """Where a section of the draws begins: counts of one byte, ids of two, logprobs of two or four."""
    total = 3 + 5 * (2 + (2 if kind == "companded" else 4))
    return len(body_of(kind)) - total + {"counts": 0, "ids": 3, "logprobs": 3 + 10}[section]


def refused(kind: str, change: Callable[[bytearray], None], match: str) -> None:
    body = body_of(kind)
    assert decode(kind, body).draws.counts.tolist() == COUNTS  # the change alone is at fault
    change(body)
    with pytest.raises(CorruptShardError, match=match):
        decode(kind, body)


both = pytest.mark.parametrize("kind", CONFIGS)


def test_draws_follow_the_tails_by_hand():
    """Ranks 7, 7, 299 and 4, 260 are the gaps 7, 0, 292 and 4, 256; logprobs in tenths of a nat."""
    body = body_of("companded")
    at = 3 * 1 + 3 * 2 + 3 * 2 + 7 * 3 * 2
    assert len(body) == at + 3 + 10 + 10
    assert list(body[at : at + 3]) == COUNTS
    assert list(body[at + 3 : at + 13]) == [7, 0, 292 - 256, 4, 0, 0, 0, 1, 0, 1]
    assert list(body[at + 13 :]) == [15, 15, 300 - 256, 0, 2, 0, 0, 1, 0, 0]  # 2.5 rounds to even
    body = body_of("float32")
    planes = np.frombuffer(bytes(body[-20:]), np.uint8).reshape(4, 5)
    assert planes.T.copy().view("<f4").ravel().tolist() == [-1.5, -1.5, -30.0, 0.0, -0.25]
    assert list(body[-30:-20]) == [7, 0, 292 - 256, 4, 0, 0, 0, 1, 0, 1]


def test_ranks_order_draws():
    ranked = np.array([299, 4], np.int32)
    codec = Codec(CONFIGS["companded"], VOCAB_SIZE, 4, ranked)
    body = zstandard.ZstdDecompressor().decompress(codec.encode(topk(), LABELS))
    # Tokens 299, 4, 7 and 260 have the ranks 0, 1, 8 (7 and one of the two before it) and 261.
    assert list(body[-20:-10]) == [0, 8, 0, 1, 4, 0, 0, 0, 0, 1]
    got = codec.decode(codec.encode(topk(), LABELS), LABELS).draws
    assert got.token_ids.tolist() == [299, 7, 7, 4, 260]


def test_widths_follow_the_most_draws():
    for rate, vocab_size, width in (
        (1, 1, 1),
        (50, 300, 1),
        (51, 300, 2),
        (64, 256, 2),
        (7, 1 << 20, 1),
        (8, 1 << 20, 2),
    ):
        codec = Codec(CodecConfig(draw_rate=rate), vocab_size, 1)
        assert codec.body_bytes(1, 0) - Codec(CodecConfig(), vocab_size, 1).body_bytes(1, 0) == width


@both
def test_the_encoder_refuses_draws_of_another_rate(kind: str):
    for rate in (1, 3, 64):
        with pytest.raises(ValueError, match=f"must have rate {rate}, got 2"):
            codec_of(kind, draw_rate=rate).encode(topk(), LABELS)
    with pytest.raises(ValueError, match="must have rate 0, got 2"):
        codec_of(kind, draw_rate=0).encode(topk(), LABELS)
    with pytest.raises(ValueError, match="must have rate 2, got 0"):
        codec_of(kind).encode(topk(NONE), LABELS)
    with pytest.raises(ValueError, match="must have rate 2, got 0"):
        codec_of(kind).encode(TopKLogprobs.empty(VOCAB_SIZE), LABELS[:0])
    assert codec_of(kind).encode(TopKLogprobs.empty(VOCAB_SIZE, 2), LABELS[:0]) == b""
    assert codec_of(kind).decode(b"", LABELS[:0]).draws.rate == 2


@both
def test_the_encoder_refuses_draws_that_it_cannot_store(kind: str):
    for drawn, match in (
        (TailDraws([0, 0, 1, 1], [1], [-3.0], 2), "one of the head"),
        (TailDraws([0, 0, 1, 1], [VOCAB_SIZE], [-3.0], 2), "drawn token ids"),
        (TailDraws([0, 0, 1, 1], [5], [np.nan], 2), "finite"),
        (TailDraws([0, 0, 1, 1], [5], [-np.inf], 2), "finite"),
        (TailDraws([0, 12, 12, 12], [5] * 12, [-3.0] * 12, 2), "0 to 11 draws"),
        (TailDraws([0, 2, 0, 0], [], [], 2), "0 to 11 draws"),
    ):
        with pytest.raises(ValueError, match=match):
            codec_of(kind).encode(topk(drawn), LABELS)


# --- hostile payloads -------------------------------------------------------------------------------------


@both
def test_counts_that_are_too_large_are_refused(kind: str):
    def change(body: bytearray) -> None:
        body[start(kind, "counts")] = MOST + 1

    refused(kind, change, "at most 11 draws")


@both
def test_counts_that_do_not_match_the_length_are_refused(kind: str):
    for count in (0, 2, 4, MOST):

        def change(body: bytearray, count: int = count) -> None:
            body[start(kind, "counts")] = count

        refused(kind, change, "do not match the payload")


@both
def test_a_drawn_id_outside_the_vocabulary_is_refused(kind: str):
    def change(body: bytearray) -> None:
        body[start(kind, "ids") + 2] += 1  # 299 becomes 300

    refused(kind, change, "drawn token id is outside")


@both
def test_gaps_that_would_wrap_are_refused(kind: str):
    """Two gaps of 65,535 and one of 9 are 7 modulo 2^16, and of the same size as the good ones."""

    def change(body: bytearray) -> None:
        at = start(kind, "ids")
        body[at : at + 3], body[at + 5 : at + 8] = b"\xff\xff\x09", b"\xff\xff\x00"

    refused(kind, change, "drawn token id is outside")


def test_gaps_of_three_bytes_that_would_wrap_32_bits_are_refused():
    """256 gaps of 2^24 - 1 and one of 257 are 1 modulo 2^32."""
    size = 1 << 20
    nodes = np.full((1, 7), -3.0)
    count = 257
    drawn = TailDraws([0, count], np.full(count, 9), np.full(count, -5.0), 64)
    row = TopKLogprobs([0, 1], [1], [0.0], nodes, size, drawn, [0.0])
    codec = Codec(CodecConfig(probabilities="float32", draw_rate=64), size, 1)
    body = bytearray(zstandard.ZstdDecompressor().decompress(codec.encode(row, LABELS[:1])))
    at = len(body) - count * (3 + 4)
    gaps = np.array([(1 << 24) - 1] * 256 + [257])
    assert gaps.sum() % (1 << 32) == 1
    for k in range(3):
        body[at + k * count : at + (k + 1) * count] = ((gaps >> (8 * k)) & 255).astype(np.uint8).tobytes()
    with pytest.raises(CorruptShardError, match="drawn token id is outside"):
        codec.decode(zstandard.ZstdCompressor(write_checksum=True).compress(bytes(body)), LABELS[:1])


@both
def test_cut_and_longer_sections_of_draws_are_refused(kind: str):
    body = body_of(kind)
    for length in range(start(kind, "counts") - 1, len(body)):
        with pytest.raises(CorruptShardError, match=r"do not match|must declare"):
            decode(kind, body[:length])
    with pytest.raises(CorruptShardError, match="do not match"):
        decode(kind, body + b"\0")


@pytest.mark.parametrize("value", [0.01, 3e38, np.nan, -np.nan, np.inf, -np.inf])
def test_logprobs_of_draws_that_cannot_be_are_refused(value: float):
    def change(body: bytearray) -> None:
        for k, byte in enumerate(struct.pack("<f", value)):
            body[start("float32", "logprobs") + 5 * k + 3] = byte

    refused("float32", change, "finite and at most 0")


def test_a_logprob_that_rounding_put_above_0_is_accepted():
    body = body_of("float32")
    for k, byte in enumerate(struct.pack("<f", 5e-4)):
        body[start("float32", "logprobs") + 5 * k] = byte
    assert decode("float32", body).draws.logprobs[0] == np.float32(5e-4)


@both
def test_payloads_of_another_rate_or_without_draws_are_refused(kind: str):
    body = body_of(kind)
    payload = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(body))
    with pytest.raises(CorruptShardError, match=r"do not match|must declare"):
        codec_of(kind, draw_rate=0).decode(payload, LABELS)
    with pytest.raises(CorruptShardError, match=r"do not match|at most"):
        codec_of(kind, draw_rate=64).decode(payload, LABELS)  # counts of two bytes
    without = codec_of(kind, draw_rate=0).encode(topk(NONE), LABELS)
    with pytest.raises(CorruptShardError, match=r"do not match|must declare"):
        codec_of(kind).decode(without, LABELS)


@both
def test_a_frame_that_declares_more_draws_than_there_can_be_is_not_opened(kind: str):
    """A valid frame of a byte too many for heads of `max_k`, the most draws and an unkept label everywhere."""
    codec = codec_of(kind)
    most = codec.body_bytes(3, 3 * 4, 3 * MOST, 3)
    for size, match in ((most, "do not match|at most|head sizes"), (most + 1, "must declare")):
        with pytest.raises(CorruptShardError, match=match):
            decode(kind, bytes(size))
    bomb = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(1 << 26))
    with pytest.raises(CorruptShardError, match="must declare"):
        codec.decode(bomb, LABELS)


@both
def test_every_byte_of_the_draws_is_read_or_refused(kind: str):
    """Any other value of any byte gives other draws or an error, and leaves heads and tails alone."""
    body, good = body_of(kind), decode(kind, body_of(kind))
    for at in range(start(kind, "counts"), len(body)):
        for value in range(256):
            changed = bytearray(body)
            changed[at] = value
            try:
                got = decode(kind, changed)
            except CorruptShardError:
                continue
            same = all(
                getattr(got.draws, name).tobytes() == getattr(good.draws, name).tobytes()
                for name in ("offsets", "token_ids", "logprobs")
            )
            assert same == (value == body[at])
            assert (got.token_ids == good.token_ids).all() and (got.logprobs == good.logprobs).all()
            assert (got.log_tail_nodes == good.log_tail_nodes).all()
            assert got.draws.token_ids.min() >= 0 and got.draws.token_ids.max() < VOCAB_SIZE
