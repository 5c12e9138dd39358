"""How far a cache will turn the gradient of a training step, foretold from the teacher alone.

The cache's KL gradient differs from the exact one by an angle. Where it comes from depends on the draws.

**With draws** it is noise: each token is independent, so it falls with the root of the tokens of a step. Let
the student's log-probabilities differ from the teacher's by independent numbers of one variance. Then both the
square of the exact gradient of a token, with respect to the logits, and the variance that draws add to it are
this variance times what the teacher alone knows,

    signal = sum p^2 - 2 sum p^3 + (sum p^2)^2                            over the vocabulary
    noise  = sum p^2 f (1 - f) / pi^2,  pi = rate p^(3/4), f = pi mod 1   over the tail

(f (1 - f) is the variance of a systematic count with mean pi). Of a step's N gradients most of the signal
cancels, since tokens pull in different directions, and none of the noise's variance does:

    angle = atan(NOISE_FACTOR * sqrt(mean noise / (mean signal * N)))

**Without draws** it is bias, which no number of tokens takes away: in proportion to the mass that is missed,
`BIAS_DEGREES` times it.

Both constants were measured on three teachers (docs/benchmarks.md, "Three teachers"), which also says how far
a real angle may be from the expected one: drift, text and model decide, and none of them is known here.
P: positions.
"""

import math

import numpy as np

from formats.logprobs import ragged
from formats.logprobs.tail_draws import POWER
from formats.logprobs.topk import TopKLogprobs

STEP_TOKENS = 65_536
"""Tokens of a default step: 32 rows of up to 2,048."""
NOISE_FACTOR = 10.0
BIAS_DEGREES = 50.0
UNCERTAINTY = 2.0
"""Measured angles lie within this factor of the expected ones, either way."""


def signal(captured: TopKLogprobs) -> np.ndarray:
    """float64 [P]: the square of the exact gradient of each position, in units of the drift's variance."""
    p = np.exp(captured.logprobs.astype(np.float64))
    squares = ragged.segment_sum(p**2, captured.offsets) + np.exp(captured.log_tail(0.5).astype(np.float64))
    return squares - 2 * ragged.segment_sum(p**3, captured.offsets) + squares**2


def draw_noise(captured: TopKLogprobs, pruned: TopKLogprobs, rate: int) -> np.ndarray:
    """float64 [P]: the variance that draws at this rate add to the gradient of each position, same units.

    Args:
        captured: heads as large as they are known: their tokens count one by one where they are in the tail
            of `pruned`, all others are taken to be drawn less than once.
        pruned: the heads that are stored, each a part of the captured one.
        rate: at least 1.
    """
    far = np.exp(captured.log_tail(1 / (2 - POWER)).astype(np.float64)) / rate
    far = np.maximum(far - np.exp(captured.log_tail(0.5).astype(np.float64)), 0)
    size = captured.vocab_size
    all_tokens = ragged.segment_of(captured.offsets) * size + captured.token_ids
    kept = ragged.segment_of(pruned.offsets) * size + pruned.token_ids
    p = np.where(np.isin(all_tokens, kept), 0, np.exp(captured.logprobs.astype(np.float64)))
    expected = rate * np.maximum(p, 1e-30) ** POWER
    part = expected % 1
    return far + ragged.segment_sum(p**2 * part * (1 - part) / expected**2, captured.offsets)


def expected_angle(
    captured: TopKLogprobs, pruned: TopKLogprobs, rate: int, step_tokens: int = STEP_TOKENS
) -> float:
    """Degrees between the cache's gradient and the exact one at T = 1, for a step of so many tokens.

    Args:
        captured, pruned, rate: as for `draw_noise`; rate may be 0.
        step_tokens: N, positions that are averaged over.
    """
    if rate == 0:
        return min(90.0, BIAS_DEGREES * float(1 - pruned.head_mass(1.0).mean()))
    strength = float(signal(captured).mean())
    if strength <= 0:
        return 0.0
    ratio = float(draw_noise(captured, pruned, rate).mean()) / strength
    return math.degrees(math.atan(NOISE_FACTOR * math.sqrt(ratio / step_tokens)))
