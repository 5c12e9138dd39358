"""Strings to token ids through a `transformers` tokenizer, and character spans to token masks.

N: tokens of one string.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from formats.errors import ConfigError

# A longer document is tokenised in pieces, cut after a line break or before a blank, so that the tokenizer's working
# memory (some hundred bytes per token) stays small.
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
    where: str
    """The record's place."""
    is_empty: bool = False
    """Nothing but white space and special tokens to learn: the record is skipped."""


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens that the tokenizer puts around every plain text of its own accord.

    Text that already went through a chat template, or was decoded from tokens, brings them along: what stands in
    the text is not added again.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    eos: int | None
    texts: dict[int, str]
    """How each of them is written in a text, if it can be."""

    @classmethod
    def of(cls, tokenizer: Any) -> "SpecialTokens":
        """Found by tokenising a probe with and without special tokens."""
        bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        full = list(tokenizer("a")["input_ids"])
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                prefix, suffix = tuple(full[:start]), tuple(full[start + len(bare) :])
                break
        else:
            raise ConfigError(
                "the tokenizer must only add tokens before or after a text, got one that changes the text"
            )
        eos = tokenizer.eos_token_id
        texts = {}
        for token in {*prefix, *suffix, *([] if eos is None else [eos])}:
            text = tokenizer.convert_ids_to_tokens(token)
            if list(tokenizer(text, add_special_tokens=False)["input_ids"]) == [token]:
                texts[token] = text
        return cls(prefix, suffix, eos, texts)

    def appended_eos(self, wanted: bool) -> tuple[int, ...]:
        """The end-of-sequence token to append, unless there is none or the tokenizer adds it itself."""
        if not wanted or self.eos is None or self.eos in self.suffix:
            return ()
        return (self.eos,)

    def around(self, text: str, *, append_eos: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens to put before and after `text`: those that it does not bring itself, white space apart."""
        start, end = text.lstrip(), text.rstrip()
        before, after = self.prefix, self.suffix
        for size in range(len(before), 0, -1):
            written = self._written(before[-size:])
            if written and start.startswith(written):
                before = before[:-size]
                break
        for size in range(len(after), 0, -1):
            written = self._written(after[:size])
            if written and end.endswith(written):
                after = after[size:]
                break
        eos = self.appended_eos(append_eos)
        if eos and not (self.texts.get(eos[0]) and end.endswith(self.texts[eos[0]])):
            after = (*after, *eos)
        return before, after

    def _written(self, tokens: tuple[int, ...]) -> str:
        """The text that stands for `tokens`; empty if one of them cannot be written."""
        written = [self.texts.get(token, "") for token in tokens]
        return "".join(written) if all(written) else ""

    def is_blank(self, text: str) -> bool:
        """Whether nothing but white space and these tokens stands in `text`."""
        for written in self.texts.values():
            text = text.replace(written, "")
        return not text.strip()


def encode_documents(
    tokenizer: Any, texts: list[str], special: SpecialTokens, *, append_eos: bool
) -> list[np.ndarray]:
    """Token ids of each text with the special tokens around it; int32 [N] each."""
    short = [text for text in texts if len(text) <= PIECE_CHARS]
    encoded = iter(tokenizer(short, add_special_tokens=False, verbose=False)["input_ids"] if short else ())
    documents = []
    for text in texts:
        ids = next(encoded) if len(text) <= PIECE_CHARS else _encode_long(tokenizer, text)
        before, after = special.around(text, append_eos=append_eos)
        documents.append(np.array([*before, *ids, *after], dtype=np.int32))
    return documents


def _encode_long(tokenizer: Any, text: str) -> list[int]:
    pieces: list[int] = []
    start = 0
    while start < len(text):
        end = min(start + PIECE_CHARS, len(text))
        if end < len(text):
            end = text.rfind("\n", start + 1, end) + 1 or max(text.rfind(" ", start + 1, end), 0) or end
        pieces += _encode_behind(tokenizer, text[start - 1 : start] if start else "", text[start:end])
        start = end
    return pieces


def _encode_behind(tokenizer: Any, before: str, piece: str) -> list[int]:
    """Tokens of a piece that stands behind the character `before`: SentencePiece's vocabularies put a blank before
    whatever they take for the beginning of a text, and it must not get into the middle.
    """
    anchor, ids = (
        list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []
        for text in (before, before + piece)
    )
    if ids[: len(anchor)] == anchor:
        return ids[len(anchor) :]
    return list(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])


def encode_spans(
    tokenizer: Any, texts: list[str], spans: list[list[tuple[int, int]]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids (int32 [N]) of each text and the mask (bool [N]) of the tokens that touch one of its spans.

    A span is a half-open range of characters. A token that straddles the start of a span belongs to it: it
    cannot be predicted without predicting a character of the span. No special tokens are added.

    Raises:
        ConfigError: the tokenizer cannot say which characters a token covers.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            "a corpus with a loss on parts of its text needs a fast tokenizer (tokenizer.json), got "
            f"{type(tokenizer).__name__}; convert the tokenizer, or bring input_ids with a loss_mask"
        )
    batch = tokenizer(texts, add_special_tokens=False, verbose=False)
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
