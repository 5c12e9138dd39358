"""Vectorised reductions over ragged arrays: segment p of a flat array is `values[offsets[p]:offsets[p + 1]]`.

Every function is a handful of numpy passes over the flat array, never a loop over segments. Empty segments
are allowed and give the neutral element. P: segments, N: flat entries.
"""

import numpy as np


def segment_of(offsets: np.ndarray) -> np.ndarray:
    """int64 [N]: the segment that each flat entry belongs to."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def rank_in_segment(offsets: np.ndarray) -> np.ndarray:
    """int64 [N]: 0, 1, 2, ... counted from the start of each segment."""
    return np.arange(int(offsets[-1] - offsets[0])) - np.repeat(offsets[:-1] - offsets[0], np.diff(offsets))


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """int64 [P+1]: the offsets of segments of these lengths."""
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def taken(offsets: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(offsets of the segments with these indices, in that order; indices of their entries)."""
    found = offsets_of(np.diff(offsets)[chosen])
    return found, np.repeat(offsets[:-1][chosen], np.diff(found)) + rank_in_segment(found)


def _reduce(ufunc: np.ufunc, values: np.ndarray, offsets: np.ndarray, neutral: float) -> np.ndarray:
    out = np.full(len(offsets) - 1, neutral, dtype=values.dtype)
    filled = offsets[1:] > offsets[:-1]
    if filled.any():
        # Starts of the filled segments are strictly increasing, which is what reduceat needs.
        out[filled] = ufunc.reduceat(values, offsets[:-1][filled])
    return out


def segment_sum(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """[P]: the sum of each segment, 0 where it is empty."""
    return _reduce(np.add, values, offsets, 0)


def segment_max(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """[P]: the maximum of each segment, -inf where it is empty."""
    return _reduce(np.maximum, values, offsets, -np.inf)


def segment_logsumexp(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """[P]: log(sum(exp(values))) of each segment, -inf where it is empty or holds only -inf."""
    peak = segment_max(values, offsets)
    shift = np.where(np.isfinite(peak), peak, 0).astype(values.dtype)
    total = segment_sum(np.exp(values - np.repeat(shift, np.diff(offsets))), offsets)
    with np.errstate(divide="ignore"):
        return np.log(total) + shift


def segment_order(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """int64 [N]: the permutation that sorts each segment by ascending `values`, ties in their given order."""
    segment = segment_of(offsets)
    if np.issubdtype(values.dtype, np.integer) and len(values):
        # Segment, value and place in one integer: numpy sorts those ten times as fast as it sorts two keys.
        low = int(values.min())
        value_bits, place_bits = (int(values.max()) - low).bit_length(), (len(values) - 1).bit_length()
        if (len(offsets) - 2).bit_length() + value_bits + place_bits < 63:
            keys = (segment << value_bits | (values.astype(np.int64) - low)) << place_bits
            keys |= np.arange(len(values))
            keys.sort()
            return keys & ((1 << place_bits) - 1)
    return np.lexsort((values, segment))
