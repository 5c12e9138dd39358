"""The tokens of an API's response as ids: servers name a token by its text, by its bytes, or by `token_id:N`.

Text is not always enough: a token that is part of a character has none, and two ids may have one text. Such an entry
has no id here; its mass belongs to the tail then. Some servers' bytes are those of the text and say no more than it;
and the token that completes a character has, with vLLM, the text of the whole character, as another token may have.
Tokenizers in the manner of Llama 2 decode a single token without the space before it, and so do servers that do not put
it back: there `the` may be either of two tokens.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

_BY_ID = re.compile(r"token_id:(\d+)")
_ESCAPED = re.compile(r"\\x([0-9a-fA-F]{2})")
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
UNKNOWN_TEXT = "\N{REPLACEMENT CHARACTER}"


def byte_of_character() -> dict[str, int]:
    """The characters by which byte-level vocabularies write bytes: printable ones of Latin-1 stand for themselves, the
    others follow each other from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class TokenIds:
    """Looks up the ids of a tokenizer's tokens.

    Args:
        tokenizer: loaded by transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        vocabulary = tokenizer.get_vocab()
        self.size = max(len(tokenizer), 1 + max(vocabulary.values(), default=0))  # ids may have gaps
        added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        byte_level = "ByteLevel" in _kinds(backend.get("decoder"))
        table = byte_of_character()
        self._ids: dict[bytes, list[int]] = {}
        for piece, number in vocabulary.items():
            if piece in added:
                content = piece.encode()
            elif byte_level:
                if not all(character in table for character in piece):
                    continue
                content = bytes(table[character] for character in piece)
            elif single := _FALLBACK.fullmatch(piece):
                content = bytes([int(single[1], 16)])
            else:
                content = piece.replace("\u2581", " ").encode()
            self._ids.setdefault(content, []).append(number)
        self._contents = {number: content for content, numbers in self._ids.items() for number in numbers}
        words = [number for piece, number in vocabulary.items() if re.fullmatch("\u2581[a-z]+", piece)]
        self.may_lose_spaces = bool(words) and not tokenizer.decode(words[:1]).startswith(" ")
        """Whether the tokenizer decodes the token of a word without the space before it."""
        self.lost_spaces = False
        """Whether the server named tokens so."""

    def of(
        self, text: str, content: Iterable[int] | None = None, *, within_character: bool = False
    ) -> int | None:
        """The id of a token; None where its text fits none, or several.

        Args:
            text: as the server names it.
            content: its bytes, where the server says them.
            within_character: the token before it ends within a character.
        """
        if found := _BY_ID.fullmatch(text):
            number = int(found[1])
            return number if number < self.size else None
        key, said = text.encode("utf-8", "replace"), bytes(content or ())
        if said and said != key:
            ids = self._ids.get(said, [])
        elif text.startswith("bytes:"):
            parts = re.split(r"(\\x[0-9a-fA-F]{2})", text.removeprefix("bytes:"))
            escaped = (
                bytes([int(part[2:], 16)]) if _ESCAPED.fullmatch(part) else part.encode() for part in parts
            )
            ids = self._ids.get(b"".join(escaped), [])
        elif (
            not text
            or UNKNOWN_TEXT in text
            or key.decode() != text
            or (within_character and not text.isascii())
        ):
            return None
        else:
            ids = [*self._ids.get(key, []), *(self._ids.get(b" " + key, []) if self.lost_spaces else [])]
        return ids[0] if len(ids) == 1 else None

    def content(self, number: int) -> bytes:
        """The bytes of a token; none where the vocabulary does not say them."""
        return self._contents.get(number, b"")


def _kinds(decoder: Any) -> set[str]:
    """The kinds of a decoder and of those that it is made of."""
    if not isinstance(decoder, dict):
        return set()
    return {str(decoder.get("type"))}.union(*(_kinds(part) for part in decoder.get("decoders", ())))
