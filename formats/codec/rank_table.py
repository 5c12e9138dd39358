"""Token ids by falling frequency: the order in which heads store them.

Sorted by rank, a head's ids are dense at the start and sparse at the end, and their differences compress
about a fifth better than those of raw ids. The table is learned from the first rows of a shard, travels in
its metadata and lists only ids that occur often enough there to pay for their four bytes; all others follow
in id order.
"""

import base64
import binascii

import numpy as np

from formats.errors import FormatError

MAX_RANKED_IDS = 1 << 16
LEAST_OCCURRENCES = 16


def rank_by_frequency(token_ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """int32 [F]: the ids that occur at least `LEAST_OCCURRENCES` times, most frequent first, ties by id."""
    counts = np.bincount(token_ids, minlength=vocab_size)
    often = np.flatnonzero(counts >= LEAST_OCCURRENCES)
    return often[np.argsort(-counts[often], kind="stable")][:MAX_RANKED_IDS].astype(np.int32)


def to_text(ranked_ids: np.ndarray) -> str:
    """Base64 of the ids as 3-byte little-endian numbers."""
    as_bytes = np.ascontiguousarray(ranked_ids, dtype="<u4").view(np.uint8).reshape(-1, 4)
    return base64.b64encode(as_bytes[:, :3].tobytes()).decode()


def from_text(text: object, vocab_size: int) -> np.ndarray:
    """Inverse of `to_text`.

    Raises:
        FormatError: not base64, or ids that repeat or lie outside the vocabulary.
    """
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else b"?"
    except (binascii.Error, ValueError):
        data = b"?"
    if len(data) % 3 or len(data) > 3 * min(MAX_RANKED_IDS, vocab_size):
        raise FormatError(
            "ranked_ids must be base64 of at most 65,536 three-byte token ids of the vocabulary"
        )
    padded = np.zeros((len(data) // 3, 4), np.uint8)
    padded[:, :3] = np.frombuffer(data, np.uint8).reshape(-1, 3)
    ids = padded.view("<u4").ravel().astype(np.int32)
    if len(ids) and (ids.max() >= vocab_size or len(np.unique(ids)) != len(ids)):
        raise FormatError("ranked_ids must be distinct token ids of the vocabulary")
    return ids


def permutations(ranked_ids: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(id_of_rank, rank_of_id), int32 [V] each: the listed ids first, the rest in id order."""
    rest = np.ones(vocab_size, np.bool_)
    rest[ranked_ids] = False
    id_of_rank = np.concatenate([ranked_ids, np.flatnonzero(rest)]).astype(np.int32)
    rank_of_id = np.empty(vocab_size, np.int32)
    rank_of_id[id_of_rank] = np.arange(vocab_size, dtype=np.int32)
    return id_of_rank, rank_of_id
