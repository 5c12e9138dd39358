"""Sealed JSON: a JSON object that carries the SHA-256 of its own text.

The first line is `{"digest": "<64 hex digits>",` and the digest is taken over every byte after that line,
so any language can check it without agreeing on a canonical form of JSON. Used for the manifest and for the
metadata of each shard; a changed bit in either is an error, never another setting.
"""

import hashlib
import json
import math
import re
from typing import Any

from formats.errors import CorruptShardError, FormatError

_FIRST_LINE = re.compile(rb'\{"digest": "([0-9a-f]{64})",\n')


def seal(content: dict[str, Any], *, indent: int | None = None) -> bytes:
    """The sealed form of a non-empty object; equal objects of equal key order give equal bytes."""
    body = json.dumps(
        content, indent=indent, allow_nan=False, separators=(",", ":") if indent is None else None
    )
    rest = body[1:].lstrip("\n").encode() + b"\n"
    return b'{"digest": "' + hashlib.sha256(rest).hexdigest().encode() + b'",\n' + rest


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key occurs twice")
    return content


def _no_constants(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is too large")
    return value


def unseal(data: bytes, what: str) -> dict[str, Any]:
    """Check and parse; `what` names the source in errors.

    Raises:
        FormatError: not sealed JSON.
        CorruptShardError: the text does not match its digest.
    """
    match = _FIRST_LINE.match(data)
    if match is None:
        raise FormatError(
            f"{what} must start with its digest, got {bytes(data[:24])!r}; it is not from a teacher cache"
        )
    rest = data[match.end() :]
    if hashlib.sha256(rest).hexdigest().encode() != match[1]:
        raise CorruptShardError(
            f"{what} does not match its own digest: it was damaged or edited; copy or build it again"
        )
    try:
        content = json.loads(
            b"{" + rest,
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constants,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} is not valid JSON: {error}") from None
    return content
