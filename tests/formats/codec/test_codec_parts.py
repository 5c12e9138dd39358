"""The parts of the codec by themselves: planes, rank tables, settings."""

import numpy as np
import pytest

from formats import CodecConfig
from formats.codec.layout import bytes_for, from_planes, to_planes
from formats.codec.rank_table import from_text, permutations, rank_by_frequency, to_text
from formats.errors import ConfigError, UnsupportedVersionError
from formats.logprobs.tail_draws import MAX_RATE


def test_planes():
    values = np.array([0, 1, 255, 256, 65535, (1 << 20) - 1])
    for width in (3, 4):
        stored = np.frombuffer(to_planes(values, width).tobytes(), np.uint8)
        assert stored[:6].tolist() == [0, 1, 255, 0, 255, 255]
        assert (from_planes(stored, 0, 6, width) == values).all()
    assert [bytes_for(n) for n in (0, 1, 255, 256, 65535, 65536)] == [1, 1, 1, 2, 2, 3]


def test_rank_table():
    ids = np.repeat([7, 2, 9, 4], [100, 20, 20, 3])
    ranked = rank_by_frequency(ids, 12)
    assert ranked.tolist() == [7, 2, 9]
    id_of_rank, rank_of_id = permutations(ranked, 12)
    assert id_of_rank.tolist() == [7, 2, 9, 0, 1, 3, 4, 5, 6, 8, 10, 11]
    assert (rank_of_id[id_of_rank] == np.arange(12)).all()
    assert (from_text(to_text(ranked), 12) == ranked).all()
    assert to_text(ranked) == "BwAAAgAACQAA"
    for bad in ("BwAAAgAACQA", "BwAABwAA", "!!!!", 7, None, to_text(np.array([12]))):
        with pytest.raises(ValueError, match="ranked_ids"):
            from_text(bad, 12)


@pytest.mark.parametrize(
    "change",
    [
        {"probabilities": "float16"},
        {"sqrt_steps": 0},
        {"sqrt_steps": 2.5},
        {"sqrt_steps": True},
        {"linear_steps": -1},
        {"linear_steps": 1 << 16},
        {"tail_steps": 257},
        {"zstd_level": 0},
        {"zstd_level": 23},
        {"rank_ids": 1},
        {"draw_rate": -1},
        {"draw_rate": MAX_RATE + 1},
        {"draw_rate": 8.0},
        {"draw_rate": True},
        {"draw_steps": 0},
        {"draw_steps": 1025},
        {"draw_steps": 32.0},
    ],
)
def test_codec_settings_are_checked(change: dict):
    with pytest.raises(ConfigError):
        CodecConfig(**change)
    with pytest.raises(UnsupportedVersionError):
        CodecConfig.from_dict(CodecConfig().to_dict() | change)


def test_unknown_codec_keys_are_an_unsupported_version():
    good = CodecConfig(draw_rate=5, draw_steps=20).to_dict()
    assert CodecConfig.from_dict(good) == CodecConfig(draw_rate=5, draw_steps=20)
    missing = [{key: value for key, value in good.items() if key != gone} for gone in good]
    for content in (good | {"new": 1}, *missing, {}, None, []):
        with pytest.raises(UnsupportedVersionError, match="keys"):
            CodecConfig.from_dict(content)
