"""Probabilities below the smallest code: rounded up to it, so that many of them would change a distribution."""

import numpy as np
import pytest
from make_teachers import capture

from formats import CacheWriter, CodecConfig, TokenRow
from formats.codec.config import MASS_TOLERANCE
from formats.codec.payload import Codec
from formats.codec.quantise import probability_tables
from formats.errors import ConfigError


@pytest.mark.parametrize("config", [CodecConfig(), CodecConfig(linear_steps=0), CodecConfig(sqrt_steps=1)])
def test_the_least_probability_is_that_of_code_1(config: CodecConfig):
    logprob, _ = probability_tables(config.sqrt_steps, config.linear_steps)
    assert config.least_prob == pytest.approx(np.exp(float(logprob[1])), rel=1e-6)
    assert CodecConfig.lossless().least_prob == 0


def likeliest(max_k: int) -> tuple[float, float]:
    """The probability of a peaked distribution's first token, as captured with no threshold and as stored and divided
    by its sum, which is what a loss makes of it."""
    size = 20_000
    first, label = capture(-2 * np.log(np.arange(size) + 1.0)[None], 0.0, max_k), np.array([3])
    codec = Codec(CodecConfig(), size, max_k)
    stored = codec.decode(codec.encode(first, label), label)
    return float(np.exp(first.logprobs[0])), float(
        np.exp(stored.logprobs.max() - stored.log_partition(1.0)[0])
    )


def test_what_is_allowed_leaves_the_likely_tokens_alone(tmp_path):
    config = CodecConfig()
    most = int(MASS_TOLERANCE / config.least_prob)
    right, stored = likeliest(most)
    assert stored == pytest.approx(right, rel=MASS_TOLERANCE)
    right, stored = likeliest(8 * most)  # 0.61, stored as 0.55
    assert stored < 0.92 * right
    config.require_codes(0.0, most)
    config.require_codes(1.01 * config.least_prob, 8 * most)
    CodecConfig.lossless().require_codes(0.0, 8 * most)
    with pytest.raises(
        ConfigError, match=r"min_prob must be at least 2\.45e-05 where max_k is above 825, got 0 and 6600"
    ):
        config.require_codes(0.0, 8 * most)


def test_a_writer_refuses_before_it_writes(tmp_path):
    with pytest.raises(ConfigError, match="min_prob must be at least"):
        CacheWriter(tmp_path / "cache", identity={}, vocab_size=20_000, max_k=4096)
    with CacheWriter(tmp_path / "small", identity={}, vocab_size=500, positions="all", max_k=4096) as writer:
        row = TokenRow(np.arange(3), np.arange(3) > 0)
        writer.append(row, capture(np.zeros((2, 500)), 0.0, 500, label_ids=row.label_ids("all")))
