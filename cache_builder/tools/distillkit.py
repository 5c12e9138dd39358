"""The teacher's top-k logprobs as DistillKit stores them: bytes of a position in, token ids and logprobs out.

A position is two byte strings (DistillKit, `distillkit/compression`, as of March 2026; described here, decoded by code
of our own):

    ids       k numbers of ceil(log2 d) bits, one after the other, highest bit first, zero bits behind
    logprobs  exact_k values of exact_dtype
              a coefficient of term_dtype for every polynomial term
              for each residual bin: its scale, then num_elements numbers of element_bits bits, packed as the ids are

all values little-endian. The k - exact_k values that are not exact are sum_i c_i f_i(t) at t = 0, 1, ... (or as many
points from 0 to 1 with normalize_t), f_i a power, a square root or an exponential, plus the bins' numbers times their
scale, from the first on. With delta_encoding all k values are differences and are summed up.

P: positions, B: bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from formats.errors import ConfigError, FormatError, one_line

_WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_KEYS = {
    *(
        "d",
        "k",
        "exact_k",
        "exact_dtype",
        "polynomial_terms",
        "term_dtype",
        "residual_bins",
        "delta_encoding",
    ),
    *("error_diffusion", "normalize_t"),
}
_BIN_KEYS = {"scale_dtype", "element_bits", "num_elements"}


@dataclass(frozen=True, kw_only=True)
class ResidualBin:
    """Some of the values' residuals, as whole numbers times a scale."""

    scale_dtype: str
    """Of the scale."""
    element_bits: int
    """Bits of a number, 1 to 32."""
    num_elements: int
    """Numbers."""

    @property
    def packed_bytes(self) -> int:
        """Bytes of the numbers."""
        return (self.num_elements * self.element_bits + 7) // 8


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What `compression_config.yaml` beside a data set says. `error_diffusion` is the encoder's affair."""

    d: int
    """Size of the vocabulary, as the encoder saw it."""
    k: int
    """Entries of a position."""
    exact_k: int
    """The likeliest of them, stored as they are."""
    exact_dtype: str
    """In this dtype."""
    terms: tuple[int | str, ...]
    """Powers, "sqrt" or "exp"."""
    term_dtype: str
    """Of their coefficients."""
    bins: tuple[ResidualBin, ...]
    """Residual bins, in order."""
    delta_encoding: bool
    """Whether values are differences from the one before."""
    normalize_t: bool
    """Whether terms are taken from 0 to 1."""

    @staticmethod
    def read(path: str | Path) -> "Compression":
        """From YAML.

        Raises:
            ConfigError: no such file, no such format, an unknown key, or a value that is not supported.
        """
        try:
            content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} must be a YAML file, got {one_line(error, whole=True)}") from None
        if not isinstance(content, Mapping) or not {"d", "k", "exact_k"} <= set(content):
            raise ConfigError(
                f"{path} must have d, k and exact_k; it is DistillKit's compression_config.yaml"
            )
        return Compression.of(content)

    @staticmethod
    def of(content: Mapping[str, Any]) -> "Compression":
        """From the same keys.

        Raises:
            ConfigError: an unknown key, or a value that is not supported.
        """
        if unknown := sorted(set(content) - _KEYS):
            raise ConfigError(
                f"a DistillKit compression has the keys {', '.join(sorted(_KEYS))}, got {unknown[0]!r}"
            )
        bins = []
        for entry in content.get("residual_bins") or []:
            if not isinstance(entry, Mapping) or set(entry) != _BIN_KEYS:
                raise ConfigError(f"a residual bin has {', '.join(sorted(_BIN_KEYS))}, got {entry!r}")
            bins.append(
                ResidualBin(
                    scale_dtype=_dtype("scale_dtype", entry["scale_dtype"]),
                    element_bits=_whole("element_bits", entry["element_bits"], 1, 32),
                    num_elements=_whole("num_elements", entry["num_elements"], 1),
                )
            )
        d = _whole("d", content.get("d"), 2, 1 << 24)
        k = _whole("k", content.get("k"), 1, d)
        exact_k = _whole("exact_k", content.get("exact_k"), 0, k)
        terms = tuple(content.get("polynomial_terms") or ())
        for term in terms:
            if term not in ("sqrt", "exp") and type(term) is not int:
                raise ConfigError(f"polynomial_terms must be whole numbers, sqrt or exp, got {term!r}")
        term_dtype = _dtype("term_dtype", content.get("term_dtype", "float32"))
        if terms and exact_k < k and _WIDTHS[term_dtype] == 2:
            raise ConfigError(
                f"term_dtype must be float32 or float64, got {term_dtype}, in which the encoder also rounded the powers"
            )
        if sum(one.num_elements for one in bins) > k - exact_k:
            raise ConfigError(
                f"residual_bins must hold at most k - exact_k = {k - exact_k} elements, got more"
            )
        return Compression(
            d=d,
            k=k,
            exact_k=exact_k,
            exact_dtype=_dtype("exact_dtype", content.get("exact_dtype", "float32")),
            terms=terms,
            term_dtype=term_dtype,
            bins=tuple(bins),
            delta_encoding=_flag("delta_encoding", content.get("delta_encoding", True)),
            normalize_t=_flag("normalize_t", content.get("normalize_t", False)),
        )

    @property
    def id_bits(self) -> int:
        """Bits of a token id; the encoder takes the logarithm in single precision."""
        return int(np.ceil(np.log2(np.float32(self.d))))

    @property
    def id_bytes(self) -> int:
        """Bytes of a position's ids."""
        return (self.k * self.id_bits + 7) // 8

    @property
    def logprob_bytes(self) -> int:
        """Bytes of a position's logprobs."""
        size = self.exact_k * _WIDTHS[self.exact_dtype] + len(self.terms) * _WIDTHS[self.term_dtype]
        return size + sum(_WIDTHS[one.scale_dtype] + one.packed_bytes for one in self.bins)

    def decode_ids(self, packed_PB: np.ndarray) -> np.ndarray:
        """int32 [P, k]: token ids of uint8 [P, id_bytes].

        Raises:
            FormatError: an id of `d` or above, or one that a position has twice: this is not the configuration.
        """
        ids = _unpack(packed_PB, self.id_bits, self.k)
        if ids.size and int(ids.max()) >= self.d:
            raise FormatError(
                f"token ids must be below d = {self.d}, got {int(ids.max())}; another configuration?"
            )
        ordered = np.sort(ids, axis=1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise FormatError(
                "a position's token ids must be distinct, got one twice; another configuration?"
            )
        return ids.astype(np.int32)

    def decode_logprobs(self, packed_PB: np.ndarray) -> np.ndarray:
        """float64 [P, k]: natural logprobs of uint8 [P, logprob_bytes], in the order of the ids.

        Raises:
            FormatError: a value that is NaN or plus infinity: this is not the configuration.
        """
        read = _Reader(packed_PB)
        exact = read.floats(self.exact_dtype, self.exact_k)
        num_rest = self.k - self.exact_k
        rest = np.zeros((len(packed_PB), num_rest))
        if self.terms:
            coefficients = read.floats(self.term_dtype, len(self.terms))
            rest += coefficients @ self._terms(num_rest)
        start = 0
        for one in self.bins:
            scale = read.floats(one.scale_dtype, 1)
            numbers = _unpack(read.bytes(one.packed_bytes), one.element_bits, one.num_elements).astype(
                np.float64
            )
            signed = 2 * numbers - 1 if one.element_bits == 1 else numbers - 2.0 ** (one.element_bits - 1)
            rest[:, start : start + one.num_elements] += signed * scale
            start += one.num_elements
        values = np.concatenate([exact, rest], axis=1)
        if self.delta_encoding:
            values = np.cumsum(values, axis=1)
        if not (values < np.inf).all():
            raise FormatError("logprobs must not be NaN or infinite, got one that is; another configuration?")
        return values

    def _terms(self, num_points: int) -> np.ndarray:
        """float64 [terms, points]."""
        t = np.linspace(0, 1, num_points) if self.normalize_t else np.arange(num_points, dtype=np.float64)
        functions = {"sqrt": np.sqrt, "exp": np.exp}
        return np.stack([functions[term](t) if isinstance(term, str) else t**term for term in self.terms])


class _Reader:
    """Takes a position's bytes from the front, for all positions at once."""

    def __init__(self, packed_PB: np.ndarray) -> None:
        self._packed, self._at = packed_PB, 0

    def bytes(self, count: int) -> np.ndarray:
        """uint8 [P, count]."""
        self._at += count
        return np.ascontiguousarray(self._packed[:, self._at - count : self._at])

    def floats(self, dtype: str, count: int) -> np.ndarray:
        """float64 [P, count]."""
        raw = self.bytes(count * _WIDTHS[dtype])
        if dtype == "bfloat16":
            values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = raw.view({"float16": "<f2", "float32": "<f4", "float64": "<f8"}[dtype])
        return values.astype(np.float64).reshape(len(raw), count)


def _unpack(packed_PB: np.ndarray, bits: int, count: int) -> np.ndarray:
    """int64 [P, count]: numbers of so many bits, the highest first."""
    begin = np.arange(count, dtype=np.int64) * bits
    padded = np.pad(packed_PB, ((0, 0), (0, 4)))  # five bytes hold a number of 32 bits wherever it begins
    window = np.zeros((len(packed_PB), count), np.int64)
    for byte in range(5):
        window = (window << 8) | padded[:, (begin >> 3) + byte]
    return (window >> (40 - bits - (begin & 7))) & ((1 << bits) - 1)


def _dtype(name: str, value: Any) -> str:
    if value not in _WIDTHS:
        raise ConfigError(f"{name} must be one of {', '.join(_WIDTHS)}, got {value!r}")
    return str(value)


def _whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    if type(value) is not int or value < low or (high is not None and value > high):
        limits = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise ConfigError(f"{name} must be a whole number {limits}, got {value!r}")
    return value


def _flag(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise ConfigError(f"{name} must be true or false, got {value!r}")
    return value
