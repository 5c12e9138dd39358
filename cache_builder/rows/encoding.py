"""Strings to token ids through a `transformers` tokenizer, and character spans to token masks.

N: tokens of one string.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from formats.errors import ConfigError

# A longer document is tokenised in pieces, cut after a line break, so that the tokenizer's working memory
# (some hundred bytes per token) stays small.
PIECE_CHARS = 1 << 20


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example, before it is cut to length."""

    input_ids: np.ndarray
    """int32 [N]."""
    loss_mask: np.ndarray
    """bool [N]."""
    splittable: bool
    """Longer than a row: split into several (documents) or truncate."""


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens that the tokenizer puts around every plain text of its own accord."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    eos: int | None

    @classmethod
    def of(cls, tokenizer: Any) -> "SpecialTokens":
        """Found by tokenising a probe with and without special tokens."""
        bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        full = list(tokenizer("a")["input_ids"])
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                end = start + len(bare)
                return cls(tuple(full[:start]), tuple(full[end:]), tokenizer.eos_token_id)
        raise ConfigError(
            "the tokenizer must only add tokens before or after a text, got one that changes the text"
        )

    def appended_eos(self, wanted: bool) -> tuple[int, ...]:
        """The end-of-sequence token to append, unless there is none or the tokenizer adds it itself."""
        if not wanted or self.eos is None or self.eos in self.suffix:
            return ()
        return (self.eos,)


def encode_documents(tokenizer: Any, texts: list[str], special: SpecialTokens) -> list[np.ndarray]:
    """Token ids of each text as `tokenizer(text)` gives them, special tokens included; int32 [N] each."""
    short = [text for text in texts if len(text) <= PIECE_CHARS]
    encoded = iter(tokenizer(short, verbose=False)["input_ids"] if short else ())
    return [
        np.array(next(encoded), dtype=np.int32)
        if len(text) <= PIECE_CHARS
        else _encode_long(tokenizer, text, special)
        for text in texts
    ]


def _encode_long(tokenizer: Any, text: str, special: SpecialTokens) -> np.ndarray:
    pieces = [np.array(special.prefix, dtype=np.int32)]
    start = 0
    while start < len(text):
        end = min(start + PIECE_CHARS, len(text))
        if end < len(text):
            end = text.rfind("\n", start + 1, end) + 1 or end
        ids = tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"]
        pieces.append(np.array(ids, dtype=np.int32))
        start = end
    pieces.append(np.array(special.suffix, dtype=np.int32))
    return np.concatenate(pieces)


def encode_spans(
    tokenizer: Any, texts: list[str], spans: list[list[tuple[int, int]]], *, add_special_tokens: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids (int32 [N]) of each text and the mask (bool [N]) of the tokens that touch one of its spans.

    A span is a half-open range of characters. A token that straddles the start of a span belongs to it: it
    cannot be predicted without predicting a character of the span.

    Raises:
        ConfigError: the tokenizer cannot say which characters a token covers.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            "a corpus with a loss on parts of its text needs a fast tokenizer (tokenizer.json), got "
            f"{type(tokenizer).__name__}; convert the tokenizer, or bring input_ids with a loss_mask"
        )
    batch = tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)
    result = []
    for encoding, ranges in zip(batch.encodings, spans, strict=True):
        ids = np.array(encoding.ids, dtype=np.int32)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        result.append((ids, spans_to_mask(offsets, ranges)))
    return result


def spans_to_mask(offsets_N2: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """bool [N]: tokens that share a character with a span.

    Tokenizers that trim white space from offsets give a blank token an empty range; it counts where it
    stands. Tokens that stand for no text, as added special tokens do, have the range (0, 0) and count
    nowhere.
    """
    start_N, end_N = offsets_N2[:, 0], offsets_N2[:, 1]
    mask = np.zeros(len(offsets_N2), dtype=np.bool_)
    for start, end in spans:
        mask |= (end_N > start) & (start_N < end)
    return mask
