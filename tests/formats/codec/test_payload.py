"""The payload codec: exact where it says exact, within its stated bounds elsewhere, and safe on any input."""

import struct
from dataclasses import replace

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from make_teachers import by_id, capture, labels_for, labels_of, random_row, random_teacher

from formats import TAIL_BETAS, CodecConfig, TailDraws, TopKLogprobs
from formats.codec.layout import SECTIONS
from formats.codec.payload import Codec, section_bytes
from formats.codec.quantise import probability_tables, quantise_probabilities
from formats.errors import CorruptShardError
from formats.logprobs.tail_draws import MAX_RATE

LOSSLESS = CodecConfig.lossless()
DEFAULT = CodecConfig()


def roundtrip(
    topk: TopKLogprobs,
    config: CodecConfig = DEFAULT,
    ranked: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> TopKLogprobs:
    """Through a codec of `config` that has the rate of draws of the positions."""
    labels = labels_of(topk) if labels is None else labels
    codec = Codec(config_for(topk, config), topk.vocab_size, max(1, int(topk.counts.max(initial=1))), ranked)
    return codec.decode(codec.encode(topk, labels), labels)


def assert_same_ids(got: TopKLogprobs, expected: TopKLogprobs) -> None:
    for a, b in zip(by_id(got)[:2], by_id(expected)[:2], strict=True):
        assert (a == b).all()


def assert_within_bounds(
    got: TopKLogprobs,
    expected: TopKLogprobs,
    config: CodecConfig = DEFAULT,
    labels: np.ndarray | None = None,
) -> None:
    """The bounds of docs/format.md."""
    assert_same_ids(got, expected)
    root = np.exp(0.5 * by_id(expected)[2].astype(np.float64))
    got_root = np.exp(0.5 * by_id(got)[2].astype(np.float64))
    bound = 0.5 / (config.sqrt_steps + config.linear_steps * root)
    smallest = 1.0 / (config.sqrt_steps + config.linear_steps / config.sqrt_steps)
    stored = root >= smallest
    assert (np.abs(got_root - root)[stored] <= bound[stored] + 1e-6).all()
    assert (got_root[~stored] <= 1.0 / config.sqrt_steps).all()
    finite = np.isfinite(expected.log_tail_nodes)
    assert (np.isfinite(got.log_tail_nodes) == finite).all()
    difference = np.abs(got.log_tail_nodes[finite] - expected.log_tail_nodes[finite])
    inside = expected.log_tail_nodes[finite] > -32767 / config.tail_steps
    assert (difference[inside] <= 0.5 / config.tail_steps + 1e-4).all()
    assert_same_draws(got.draws, expected.draws, 0.5 / config.draw_steps)
    labels = labels_of(expected) if labels is None else labels
    positions, entries = got.kept_labels(labels)
    assert positions.tolist() == expected.kept_labels(labels)[0].tolist()
    assert (got.label_logprobs[positions] == got.logprobs[entries]).all()
    rest = np.delete(np.arange(len(got)), positions)
    truth = np.maximum(expected.label_logprobs[rest], -255 / 16)
    assert (np.abs(got.label_logprobs[rest] - truth) <= 1 / 32).all()


def assert_same_draws(got: TailDraws, expected: TailDraws, bound: float) -> None:
    """The same tokens as often at every position, with logprobs as far off as `bound` and float32 allow."""
    assert got.rate == expected.rate and (got.counts == expected.counts).all()
    (_, ids, logprobs), (_, expected_ids, before) = by_id(got), by_id(expected)
    assert (ids == expected_ids).all()
    assert (np.abs(logprobs - before) <= bound + (1e-6 * np.abs(before) if bound else 0)).all()


def config_for(topk: TopKLogprobs, config: CodecConfig = DEFAULT) -> CodecConfig:
    return replace(config, draw_rate=topk.draws.rate)


def whole_vocabulary() -> TopKLogprobs:
    return capture(np.random.default_rng(0).normal(size=(5, 31)) * 2, 0.0, 31)


def hand_made(heads: list[list[tuple[int, float]]], tail_mass: list[float], vocab_size: int) -> TopKLogprobs:
    """Heads of (id, p); the tail is uniform over the rest."""
    counts = [len(head) for head in heads]
    nodes = []
    with np.errstate(divide="ignore"):
        for count, mass in zip(counts, tail_mass, strict=True):
            rest = vocab_size - count
            each = np.log(mass / rest) if rest and mass else -np.inf
            nodes.append([np.log(rest) + beta * each if rest else -np.inf for beta in TAIL_BETAS])
        flat = [entry for head in heads for entry in head]
        return TopKLogprobs(
            np.concatenate([[0], np.cumsum(counts)]),
            np.array([token for token, _ in flat]),
            np.log([prob for _, prob in flat]),
            np.array(nodes),
            vocab_size,
            TailDraws.none(len(counts)),
            [
                np.log(dict(head).get(label, mass / max(vocab_size - len(head), 1)))
                for head, mass, label in zip(
                    heads, tail_mass, labels_for(len(heads), vocab_size).tolist(), strict=True
                )
            ],
        )


def with_draws(topk: TopKLogprobs, drawn: list[list[int]], rate: int) -> TopKLogprobs:
    """Draws of these ids, each with a logprob that its id decides."""
    flat = np.array([token for one in drawn for token in one])
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in drawn])])
    return replace(topk, draws=TailDraws(offsets, flat, -0.017 * (flat % 99_991 + 50.0), rate))


LARGE = hand_made([[(1, 0.5)], [(2, 0.5)], [(3, 0.5)]], [0.5] * 3, 1 << 20)
CASES = {
    "ordinary": capture(np.random.default_rng(1).normal(size=(40, 900)) * 4),
    "whole vocabulary": whole_vocabulary(),
    "one position": capture(np.random.default_rng(2).normal(size=(1, 300)) * 3),
    "uniform": capture(np.zeros((3, 1000)), 1e-3, 128),
    "flat over a large vocabulary": capture(np.zeros((2, 50_000)), 1e-3, 128),
    "certain": hand_made([[(3, 1.0)], [(0, 1.0)]], [0.0, 0.0], 10),
    "certain with an impossible token": hand_made([[(3, 1.0), (4, 0.0)]], [0.0], 10),
    "ties": hand_made([[(5, 0.25), (2, 0.25), (9, 0.25), (0, 0.25)]], [0.0], 10),
    "vocabulary of one": hand_made([[(0, 1.0)]], [0.0], 1),
    "first and last id": hand_made([[(0, 0.5), (9999, 0.4)]], [0.1], 10_000),
    "largest vocabulary": hand_made([[((1 << 20) - 1, 0.5), (1 << 16, 0.3), (0, 0.1)]], [0.1], 1 << 20),
    "extremely sharp": capture(np.eye(4, 50) * 2000.0),
    "draws": capture(np.random.default_rng(1).normal(size=(40, 900)) * 4, 1e-2, draw_rate=8),
    "more draws": capture(np.random.default_rng(3).normal(size=(40, 900)) * 2, 1e-2, 64, draw_rate=31),
    "nothing drawn": with_draws(hand_made([[(3, 1.0)], [(0, 1.0)]], [0.0, 0.0], 10), [[], []], 8),
    "all draws on the first position": with_draws(LARGE, [[9, 1 << 19, 0], [], []], 8),
    "all draws on the last position": with_draws(LARGE, [[], [], [(1 << 20) - 1, 5]], 8),
    "first and last id drawn twice": with_draws(LARGE, [[0, 0], [(1 << 20) - 1] * 2, [7, 0, 7]], 1),
    "as many draws as can be": with_draws(LARGE, [[4] * 2049, [5, 6] * 1024, []], 64),
    "draws of a vocabulary of one": with_draws(hand_made([[(0, 1.0)]], [0.0], 1), [[]], 64),
    "draws of the least probability": replace(
        LARGE, draws=TailDraws([0, 2, 2, 3], [5, 6, 7], [-2047.9, -0.0, -1000.0], 8)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_lossless_is_exact(name: str):
    expected = CASES[name]
    got = roundtrip(expected, LOSSLESS)
    for a, b in zip(by_id(got), by_id(expected), strict=True):
        assert (a == b).all()
    assert (got.log_tail_nodes == expected.log_tail_nodes).all()
    assert got.label_logprobs.tobytes() == expected.label_logprobs.tobytes()
    assert_same_draws(got.draws, expected.draws, 0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranked", [False, True])
def test_compact_stays_within_its_bounds(name: str, ranked: bool):
    expected = CASES[name]
    ids = np.concatenate([expected.token_ids, expected.draws.token_ids[::3]])
    table = np.unique(ids)[::-1][:20].astype(np.int32) if ranked else None
    assert_within_bounds(roundtrip(expected, DEFAULT, table), expected)


@pytest.mark.parametrize("config", [DEFAULT, LOSSLESS])
def test_rows_without_positions_have_no_payload(config: CodecConfig):
    codec = Codec(config, 100, 10)
    none = np.zeros(0, np.int32)
    assert codec.encode(TopKLogprobs.empty(100), none) == b""
    assert len(codec.decode(b"", none)) == 0
    with pytest.raises(CorruptShardError, match="empty payload"):
        codec.decode(b"x", none)


def test_impossible_tokens_stay_impossible():
    got = roundtrip(CASES["certain with an impossible token"])
    assert sorted(got.logprobs.tolist()) == [-np.inf, 0.0]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(2, 40),
    vocab_size=st.sampled_from([2, 3, 255, 256, 257, 5000]),
    max_k=st.sampled_from([1, 2, 64, 300]),
    config=st.builds(
        CodecConfig,
        probabilities=st.sampled_from(["companded", "float32"]),
        sqrt_steps=st.sampled_from([1, 240, 16384]),
        linear_steps=st.sampled_from([0, 2000, 32768]),
        tail_steps=st.sampled_from([1, 64, 256]),
        zstd_level=st.sampled_from([1, 12]),
        draw_rate=st.sampled_from([0, 1, 8, MAX_RATE]),
        draw_steps=st.sampled_from([1, 32, 1024]),
    ),
)
def test_any_row_survives(seed: int, length: int, vocab_size: int, max_k: int, config: CodecConfig):
    rng = np.random.default_rng(seed)
    row = random_row(rng, length, vocab_size)
    expected = random_teacher(rng, row, vocab_size, draw_rate=config.draw_rate).prune(1e-3, max_k)
    ranked = rng.permutation(vocab_size)[: vocab_size // 2].astype(np.int32)
    labels = row.label_ids()
    got = roundtrip(expected, config, ranked, labels)
    if config.probabilities == "float32":
        assert_same_ids(got, expected)
        assert (by_id(got)[2] == by_id(expected)[2]).all()
        assert got.label_logprobs.tobytes() == expected.label_logprobs.tobytes()
        assert_same_draws(got.draws, expected.draws, 0)
    else:
        assert_within_bounds(got, expected, config, labels)


def test_probability_codes_are_monotone_and_end_at_one():
    logprob, mass = probability_tables(240, 2000)
    assert logprob[0] == -np.inf and logprob[-1] == 0 and (np.diff(logprob) > 0).all()
    assert mass[-1] == 1 << 40 and mass[0] == 0
    codes = np.arange(len(logprob))
    assert (quantise_probabilities(logprob, 240, 2000) == codes).all()


def test_decoding_is_deterministic_and_encoding_a_fixed_point():
    codec = Codec(DEFAULT, 900, 128)
    labels = labels_of(CASES["ordinary"])
    first = codec.encode(CASES["ordinary"], labels)
    assert first == Codec(DEFAULT, 900, 128).encode(CASES["ordinary"], labels)
    again = codec.decode(first, labels)
    twice = codec.decode(codec.encode(again, labels), labels)
    assert_same_ids(twice, again)
    assert (by_id(twice)[2] == by_id(again)[2]).all() and (twice.label_logprobs == again.label_logprobs).all()


def test_frames_can_be_read_without_this_module():
    whole = whole_vocabulary()
    payload = Codec(LOSSLESS, 31, 31).encode(whole, labels_of(whole))
    body = zstandard.ZstdDecompressor().decompress(payload)
    assert len(body) == 5 * 1 + 5 * 31 * (1 + 4) + 7 * 5 * 4
    assert body[:5] == bytes([30] * 5)
    # The whole vocabulary has no gaps.
    assert body[5 : 5 + 5 * 31] == bytes(5 * 31)


def test_the_encoder_refuses_what_it_cannot_store():
    topk = CASES["ordinary"]
    with pytest.raises(ValueError, match="vocab_size"):
        Codec(DEFAULT, 901, 128).encode(topk, labels_of(topk))
    with pytest.raises(ValueError, match="max_k"):
        Codec(DEFAULT, 900, 2).encode(topk, labels_of(topk))
    nodes, none = np.full((1, 7), -3.0), TailDraws.none(1)
    unnormalised = TopKLogprobs(np.array([0, 1]), np.array([1]), np.log([0.3]), nodes, 10, none, [-3.0])
    with pytest.raises(ValueError, match="sum to 1"):
        Codec(DEFAULT, 10, 5).encode(unnormalised, np.array([0]))


# --- hostile payloads -------------------------------------------------------------------------------------


def payload_of(body: bytes, **options: object) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True, **options).compress(body)  # type: ignore[arg-type]


def good_body() -> bytes:
    return zstandard.ZstdDecompressor().decompress(Codec(DEFAULT, 10, 4).encode(CASES_SMALL, SMALL_LABELS))


CASES_SMALL = hand_made([[(3, 0.5), (7, 0.25)], [(0, 0.9)]], [0.25, 0.1], 10)
SMALL_LABELS = labels_for(2, 10)


def refused(payload: bytes, match: str, positions: int = 2) -> None:
    with pytest.raises(CorruptShardError, match=match):
        Codec(DEFAULT, 10, 4).decode(payload, labels_for(positions, 10))


def test_the_small_payload_is_good():
    assert_within_bounds(Codec(DEFAULT, 10, 4).decode(payload_of(good_body()), SMALL_LABELS), CASES_SMALL)


def test_a_decompression_bomb_is_refused_before_it_is_opened():
    bomb = payload_of(bytes(1 << 28))
    assert len(bomb) < 30_000
    refused(bomb, "must declare")


@pytest.mark.parametrize("declared", [2**63, 2**64 - 2, 2**32, 10**6, 0])
def test_a_frame_that_lies_about_its_size_is_refused(declared: int):
    # Magic, descriptor: 8-byte content size, single segment, checksum; then an empty last block.
    frame = struct.pack("<IB", 0xFD2FB528, 0b11100100) + struct.pack("<Q", declared) + b"\1\0\0" + b"\0\0\0\0"
    refused(frame, "declare|zstd")


def test_unknown_sizes_missing_checksums_and_trailing_bytes_are_refused():
    body = good_body()
    refused(zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compress(body), "declare")
    refused(zstandard.ZstdCompressor(write_checksum=False).compress(body), "checksum")
    refused(payload_of(body) + b"\0", "zstd")
    refused(payload_of(body) + payload_of(body), "zstd")
    refused(b"", "zstd|declare")
    refused(b"not a frame", "zstd")
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"abcd"
    refused(skippable + payload_of(body), "zstd|declare")


def test_wrong_position_counts_are_refused():
    payload = payload_of(good_body())
    for positions in (1, 3, 2000, 1 << 22, (1 << 22) + 1):
        refused(payload, "declare|head sizes|at most", positions)


def test_broken_bodies_are_refused():
    body = bytearray(good_body())
    for at, value, match in (
        (0, 200, "head sizes"),  # a head of 201
        (0, 4, "head sizes"),  # above max_k, and the length no longer fits
        (2, 255, "outside the vocabulary"),  # first rank 255 of 10
        (3, 9, "outside the vocabulary"),  # gap that runs past the end
        (8, 255, "above the largest"),  # high byte of a code
    ):
        broken = bytearray(body)
        broken[at] = value
        refused(payload_of(bytes(broken)), match)


@pytest.mark.parametrize("name", ["ordinary", "draws"])
def test_every_bit_flip_is_noticed(name: str):
    codec = Codec(config_for(CASES[name]), 900, 128)
    labels = labels_of(CASES[name])
    payload = codec.encode(CASES[name], labels)
    decoded = codec.decode(payload, labels)
    expected = by_id(decoded)
    for bit in range(0, 8 * len(payload), 7):
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << (bit % 8)
        try:
            got = codec.decode(bytes(flipped), labels)
        except CorruptShardError:
            continue
        for a, b in zip(by_id(got), expected, strict=True):
            assert (a == b).all()
        assert (got.label_logprobs == decoded.label_logprobs).all()
        assert_same_draws(got.draws, decoded.draws, 0)


def test_section_bytes_add_up_to_the_payloads():
    basic, draws = SECTIONS[:5], ("draw_counts", "draw_ids", "draw_logprobs")
    for name, sections in (("ordinary", basic), ("draws", basic + draws)):
        topk = CASES[name]
        codec = Codec(config_for(topk), 900, 128)
        nothing = TopKLogprobs.empty(900, topk.draws.rate)
        sizes = section_bytes(codec, [(topk, labels_of(topk)), (nothing, labels_of(nothing))])
        assert tuple(sizes) == sections and min(sizes.values()) > 0
        assert sum(sizes.values()) == pytest.approx(len(codec.encode(topk, labels_of(topk))))
        # The parts depend on the settings and not on what happens to be in the rows.
        assert section_bytes(codec, []) == dict.fromkeys(sections, 0)
    topk = CASES["nothing drawn"]
    sizes = section_bytes(Codec(config_for(topk), 10, 4), [(topk, labels_of(topk))])
    assert tuple(sizes) == basic + draws and sizes["draw_ids"] == sizes["draw_logprobs"] == 0
