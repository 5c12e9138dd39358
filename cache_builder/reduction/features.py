"""Token features of a teacher: the leading principal components of its output embeddings.

A student that drifts moves the logits of the tail by W dh: a few directions of the output embedding W carry
most of it, so the tail's mean in those directions says most of what the tail's shape has to say
(docs/method.md, "The shape of the tail").

Found by block power iteration from a fixed start, in float64 and over slices of the vocabulary, so that any
machine finds the same bytes and the embedding is never in memory as a whole. Cost: `PASSES` + 3 passes over
the embedding; 20 s on two cores at V = 128,256 and D = 2,048.

V: vocabulary, D: hidden size, F: features, Q: directions iterated.
"""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from formats.errors import ConfigError
from formats.identity.fingerprint import weight_files
from formats.identity.tensor_hash import read_header
from formats.logprobs.features import FEATURE_UNIT, FEATURES_FILE, MAX_CODE, TokenFeatures

SLICE_ROWS = 8192
PASSES = 8
EXTRA_DIRECTIONS = 8
"""Iterated beside the wanted ones, so that those converge faster."""
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F64": np.dtype("<f8"),
}
OUTPUT_NAMES = ("lm_head.weight", "embed_out.weight", "output.weight", "output_layer.weight")
INPUT_NAMES = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""Ends of tensor names: output embeddings, and the input embeddings that stand in for tied ones."""


@dataclass(frozen=True)
class Embedding:
    """Where a checkpoint keeps one row per token."""

    path: Path
    name: str
    dtype: str
    num_rows: int
    hidden_size: int
    offset: int

    def slices(self, vocab_size: int) -> Iterator[np.ndarray]:
        """float64 [at most SLICE_ROWS, D]: the rows of the first `vocab_size` tokens."""
        shape = (self.num_rows, self.hidden_size)
        rows: np.ndarray = np.memmap(
            self.path, dtype=DTYPES[self.dtype], mode="r", offset=self.offset, shape=shape
        )
        for start in range(0, vocab_size, SLICE_ROWS):
            part = np.asarray(rows[start : min(start + SLICE_ROWS, vocab_size)])
            if self.dtype == "BF16":
                part = (part.astype(np.uint32) << 16).view(np.float32)
            yield part.astype(np.float64)


def find_embedding(model_dir: Path, vocab_size: int) -> Embedding | None:
    """The output embedding of a checkpoint, else its input embedding; None where there is none to read.

    Quantised embeddings and checkpoints without safetensors are not read.

    Raises:
        ConfigError, FormatError: weights are missing or torn.
    """
    paths = [path for path in weight_files(model_dir) if path.suffix == ".safetensors"]
    headers = [(path, *read_header(path)) for path in paths]
    for ending in (*OUTPUT_NAMES, *INPUT_NAMES):
        for path, header, start in headers:
            for name, entry in sorted(header.items()):
                shape, dtype = entry.get("shape", ()), entry.get("dtype")
                if not (name == ending or name.endswith("." + ending)) or dtype not in DTYPES:
                    continue
                begin, end = entry["data_offsets"]
                num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
                if len(shape) == 2 and shape[0] >= vocab_size and num_bytes == end - begin:
                    return Embedding(path, name, dtype, shape[0], shape[1], start + begin)
    return None


def token_features(embedding: Embedding, vocab_size: int, num_features: int) -> TokenFeatures:
    """The leading `num_features` principal components of the first `vocab_size` rows, scaled to variance one.

    The sign of each is such that its largest weight is positive. Directions without variance (fewer tokens or
    hidden units than features) give features of zero.

    Raises:
        ConfigError: the embedding holds NaN or infinity.
    """
    width = embedding.hidden_size
    mean_D = sum(part.sum(0) for part in embedding.slices(vocab_size)) / vocab_size
    if not np.isfinite(mean_D).all():
        raise ConfigError(
            f"the embedding must be finite, got NaN or infinity in {embedding.name} of {embedding.path}; "
            "the weights are damaged, copy them again"
        )
    num_directions = min(width, num_features + EXTRA_DIRECTIONS)
    start = np.random.Generator(np.random.PCG64(0)).random((width, num_directions)) - 0.5
    basis_DQ, _ = np.linalg.qr(start)
    for _ in range(PASSES):
        basis_DQ, _ = np.linalg.qr(_covariance_times(embedding, vocab_size, mean_D, basis_DQ))
    small_QQ = basis_DQ.T @ _covariance_times(embedding, vocab_size, mean_D, basis_DQ)
    values_Q, rotation_QQ = np.linalg.eigh((small_QQ + small_QQ.T) / 2)
    best = np.argsort(-values_Q)[:num_features]
    directions_DF, variance_F = basis_DQ @ rotation_QQ[:, best], values_Q[best]
    largest = np.abs(directions_DF).argmax(0)
    directions_DF *= np.sign(directions_DF[largest, np.arange(len(best))])
    least = 1e-12 * max(float(values_Q.max()), 1e-300)
    scale_F = np.where(variance_F > least, FEATURE_UNIT / np.sqrt(np.maximum(variance_F, least)), 0.0)
    codes = np.zeros((vocab_size, num_features), np.int8)
    at = 0
    for part in embedding.slices(vocab_size):
        projected = ((part - mean_D) @ directions_DF) * scale_F
        codes[at : at + len(part), : len(best)] = np.clip(np.rint(projected), -MAX_CODE, MAX_CODE)
        at += len(part)
    return TokenFeatures(codes)


@contextmanager
def temporary_file(features: TokenFeatures | None) -> Iterator[Path | None]:
    """A file that engines read `features` from while they start; None without features."""
    if features is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="anneal-") as folder:
        path = Path(folder) / FEATURES_FILE
        path.write_bytes(features.to_bytes())
        yield path


def _covariance_times(
    embedding: Embedding, vocab_size: int, mean_D: np.ndarray, basis_DQ: np.ndarray
) -> np.ndarray:
    """[D, Q]: the covariance of the embedding times `basis_DQ`."""
    total = np.zeros_like(basis_DQ)
    for part in embedding.slices(vocab_size):
        part -= mean_D
        total += part.T @ (part @ basis_DQ)
    return total / vocab_size
