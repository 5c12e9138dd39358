"""Token features: what they accept, and their bytes."""

import numpy as np
import pytest
from make_teachers import plain_features

from formats.errors import CorruptShardError
from formats.logprobs.features import LARGEST_FEATURE, MAX_FEATURES, TokenFeatures


def test_features_by_hand():
    features = TokenFeatures(np.array([[32, -127], [0, 127], [-1, 16]], np.int8))
    assert (features.vocab_size, features.num_features) == (3, 2)
    assert features.of(np.array([2, 0])).tolist() == [[-1 / 32, 0.5], [1.0, -LARGEST_FEATURE]]
    assert features.of(np.array([1])).dtype == np.float32
    assert features.of(np.zeros(0, np.int32)).shape == (0, 2)
    assert features.to_bytes() == bytes([32, 256 - 127, 0, 127, 255, 16])


def test_bytes_round_trip_from_any_layout():
    features = plain_features(70, 5)
    for codes in (features.codes, np.asfortranarray(features.codes), np.repeat(features.codes, 2, 0)[::2]):
        data = TokenFeatures(codes).to_bytes()
        assert data == features.to_bytes() and TokenFeatures.from_bytes(data, 70, 5) == features
    other = features.codes.copy()
    other[69, 4] ^= 1
    assert TokenFeatures(other) != features


@pytest.mark.parametrize(
    "codes",
    [
        np.zeros((4, 2), np.uint8),
        np.zeros((4, 2), np.float32),
        np.zeros(4, np.int8),
        np.zeros((4, 2, 1), np.int8),
        np.zeros((4, 0), np.int8),
        np.zeros((4, MAX_FEATURES + 1), np.int8),
        np.full((4, 2), -128, np.int8),
    ],
)
def test_other_arrays_are_refused(codes: np.ndarray):
    with pytest.raises(ValueError, match="feature"):
        TokenFeatures(codes)


def test_the_most_features_are_accepted():
    assert TokenFeatures(np.full((4, MAX_FEATURES), -127, np.int8)).num_features == MAX_FEATURES == 64


@pytest.mark.parametrize("data", [b"", bytes(349), bytes(351), bytes(349) + b"\x80"])
def test_files_of_another_size_or_range_are_corrupt(data: bytes):
    assert TokenFeatures.from_bytes(bytes(350), 70, 5).codes.shape == (70, 5)
    with pytest.raises(CorruptShardError, match=r"token_features\.bin"):
        TokenFeatures.from_bytes(data, 70, 5)
