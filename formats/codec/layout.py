"""What both directions of the payload codec know: its sections, how wide their numbers are, and the order of ids."""

import numpy as np

from formats.codec.config import CodecConfig
from formats.codec.quantise import probability_tables
from formats.codec.rank_table import permutations
from formats.logprobs.tail_draws import most_draws
from formats.logprobs.tail_function import TAIL_BETAS

MAX_BODY_BYTES = (1 << 31) - 1
MAX_ROW_POSITIONS = 1 << 22
SECTIONS = ("counts", "ids", "probabilities", "tails", "labels", "draw_counts", "draw_ids", "draw_logprobs")


def bytes_for(largest: int) -> int:
    """Byte planes that hold the numbers 0 to `largest`."""
    return max(1, (int(largest).bit_length() + 7) // 8)


def to_planes(values: np.ndarray, width: int) -> np.ndarray:
    """uint8 [width, *shape of values]: all low bytes, then all second bytes, ..."""
    as_bytes = np.ascontiguousarray(values, dtype="<u4").view(np.uint8).reshape(*values.shape, 4)
    return np.ascontiguousarray(np.moveaxis(as_bytes[..., :width], -1, 0))


def from_planes(body: np.ndarray, start: int, count: int, width: int) -> np.ndarray:
    """uint32 [count]: the inverse of `to_planes`, read at body[start:]."""
    planes = body[start : start + count * width].reshape(width, count)
    values = planes[0].astype(np.uint32)
    for k in range(1, width):
        values |= planes[k].astype(np.uint32) << np.uint32(8 * k)
    return values


class Layout:
    """The sections of one configuration, vocabulary and rank table.

    Args:
        config: what to store and how finely.
        vocab_size: V.
        max_k: the most entries a head may have.
        ranked_ids: int32, frequent token ids first (see `rank_table.py`); None or empty for id order.
    """

    def __init__(
        self, config: CodecConfig, vocab_size: int, max_k: int, ranked_ids: np.ndarray | None = None
    ) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.max_k = min(max_k, vocab_size)
        self._id_of_rank: np.ndarray | None = None
        if ranked_ids is not None and len(ranked_ids):
            self._id_of_rank, self._rank_of_id = permutations(ranked_ids, vocab_size)
        self._count_width = bytes_for(self.max_k - 1)
        self._id_width = bytes_for(vocab_size - 1)
        self._most_draws = most_draws(vocab_size, config.draw_rate) if config.draw_rate else 0
        self._draw_count_width = bytes_for(self._most_draws)
        self._exact = config.probabilities == "float32"
        self._number_width = 4 if self._exact else 2
        self._label_width = 4 if self._exact else 1
        self._logprob_table, self._mass_table = probability_tables(config.sqrt_steps, config.linear_steps)

    def body_bytes(
        self, num_positions: int, num_entries: int, num_draws: int = 0, num_labels: int = 0
    ) -> int:
        """Bytes of a row before compression; `num_labels` counts the labels that are not kept."""
        per_position = self._count_width + self._number_width * len(TAIL_BETAS)
        if self.config.draw_rate:
            per_position += self._draw_count_width
        per_token = self._id_width + self._number_width
        tokens = (num_entries + num_draws) * per_token
        return num_positions * per_position + tokens + num_labels * self._label_width
