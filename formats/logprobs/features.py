"""Token features: a few numbers per token of the vocabulary, so that a cache can say what a tail is made of.

A cache stores, beside the mass of a position's tail, the sums of the tail's probabilities times the features
of its tokens (the *tail moments*). The loss uses them to reweight the student's own tail until it has the
teacher's moments (docs/method.md). Features are the leading principal components of the teacher's output
embeddings, scaled to unit variance over the vocabulary and stored in one signed byte each.

V: tokens, F: features.
"""

from dataclasses import dataclass

import numpy as np

from formats.errors import CorruptShardError

FEATURES_FILE = "token_features.bin"
"""Its name in a cache."""
FEATURE_UNIT = 32
"""Steps per standard deviation."""
MAX_CODE = 127
LARGEST_FEATURE = MAX_CODE / FEATURE_UNIT
MAX_FEATURES = 64


@dataclass(frozen=True, eq=False)
class TokenFeatures:
    """The features of every token.

    Raises:
        ValueError: not a matrix of bytes from -127 to 127.
    """

    codes: np.ndarray
    """int8 [V, F]: feature times `FEATURE_UNIT`."""

    def __post_init__(self) -> None:
        codes = self.codes
        if codes.dtype != np.int8 or codes.ndim != 2 or not 1 <= codes.shape[1] <= MAX_FEATURES:
            raise ValueError(
                f"token features must be int8 [V, 1 to {MAX_FEATURES}], got {codes.dtype} {codes.shape}"
            )
        if codes.size and int(codes.min()) < -MAX_CODE:
            raise ValueError(f"feature codes must be from -{MAX_CODE} to {MAX_CODE}")

    @property
    def num_features(self) -> int:
        """F."""
        return self.codes.shape[1]

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.codes.shape[0]

    def of(self, token_ids: np.ndarray) -> np.ndarray:
        """float32 [N, F]: the features of the given tokens."""
        return self.codes[token_ids].astype(np.float32) / np.float32(FEATURE_UNIT)

    def to_bytes(self) -> bytes:
        """V rows of F signed bytes."""
        return np.ascontiguousarray(self.codes).tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, vocab_size: int, num_features: int) -> "TokenFeatures":
        """Inverse of `to_bytes`.

        Raises:
            CorruptShardError: another size, or a code outside the range.
        """
        if len(data) != vocab_size * num_features:
            raise CorruptShardError(
                f"{FEATURES_FILE} must have {vocab_size} x {num_features} bytes, got {len(data)}; "
                "copy or build the cache again"
            )
        try:
            # Copied: a view of bytes is read-only, which torch warns about.
            return cls(np.frombuffer(data, np.int8).reshape(vocab_size, num_features).copy())
        except ValueError as error:
            raise CorruptShardError(f"{FEATURES_FILE}: {error}; copy or build the cache again") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenFeatures) and np.array_equal(self.codes, other.codes)

    __hash__ = None  # type: ignore[assignment]
