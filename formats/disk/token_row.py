"""A row: one training example as the model sees it, and the content key that names it.

L: tokens in the row, P: selected positions.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from formats.capture_settings import POSITION_MODES, CaptureSettings

KEY_BYTES = 16
IGNORED = -100
"""The label of a token that carries no loss, as torch and transformers have it."""


def content_key(input_ids: np.ndarray, loss_mask: np.ndarray) -> bytes:
    """16-byte BLAKE2b over the token ids (uint32, little-endian) and the loss mask (one byte per token).

    Training joins teacher payloads to examples by this key, never by their order.
    """
    digest = hashlib.blake2b(digest_size=KEY_BYTES, person=b"anneal-row-v1")
    digest.update(len(input_ids).to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(input_ids, dtype="<u4").tobytes())
    digest.update(np.ascontiguousarray(loss_mask, dtype=np.uint8).tobytes())
    return digest.digest()


@dataclass(frozen=True, eq=False)
class TokenRow:
    """Token ids and the mask of those that carry cross-entropy.

    Raises:
        ValueError: the arrays are not one-dimensional and of equal length, or the first token carries loss.
    """

    input_ids: np.ndarray
    """int32 [L]: the whole sequence, special tokens included."""
    loss_mask: np.ndarray
    """bool [L]: token t is a target. `loss_mask[0]` is False: nothing predicts the first token."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_ids", np.ascontiguousarray(self.input_ids, dtype=np.int32))
        object.__setattr__(self, "loss_mask", np.ascontiguousarray(self.loss_mask, dtype=np.bool_))
        if self.input_ids.ndim != 1 or self.input_ids.shape != self.loss_mask.shape:
            raise ValueError(
                "input_ids and loss_mask must be one-dimensional and of equal length, "
                f"got {self.input_ids.shape} and {self.loss_mask.shape}"
            )
        if len(self.loss_mask) and self.loss_mask[0]:
            raise ValueError("the first token of a row has no prediction, got a loss mask that selects it")

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def key(self) -> bytes:
        """The row's content key, 16 bytes."""
        return content_key(self.input_ids, self.loss_mask)

    def positions(self, which: str = CaptureSettings.positions) -> np.ndarray:
        """int32 [P], ascending: the indices i whose *next* token, i + 1, is selected.

        `loss` selects the targets of the loss mask, `all` every position that has a next token.
        """
        if which == "all":
            return np.arange(max(len(self) - 1, 0), dtype=np.int32)
        if which == "loss":
            return np.flatnonzero(self.loss_mask[1:]).astype(np.int32)
        raise ValueError(f"positions must be one of {', '.join(POSITION_MODES)}, got {which!r}")

    def label_ids(self, which: str = CaptureSettings.positions) -> np.ndarray:
        """int32 [P]: the *label* of each of these positions, the token that comes next."""
        return self.input_ids[self.positions(which) + 1]
