"""SHA-256 of every tensor in a set of safetensors files, read with nothing but the standard library.

A safetensors file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape,
data_offsets}} and one byte buffer.  Each tensor's bytes are cut into pieces of 64 MiB; a piece is hashed by a
thread of its own (hashlib releases the interpreter lock), and a tensor's digest is the hash of its dtype,
shape and piece digests.  The result does not depend on how tensors are split over files, on their order, or
on where the files lie.

Cost: one sequential read of the weights, about one second per gigabyte and core; memory: one piece per
thread.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from formats.errors import FormatError

PIECE_BYTES = 64 << 20
BLOCK_BYTES = 1 << 20
MAX_HEADER_BYTES = 100 << 20  # the bound of the safetensors specification


def read_header(path: Path) -> tuple[dict[str, dict], int]:
    """The tensor table of one file, and the offset at which its byte buffer starts.

    Raises:
        FormatError: the header is torn, too long, or describes bytes that the file does not have.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise FormatError(f"a safetensors file starts with its header length, got {path} of {size} bytes")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise FormatError(f"a safetensors header is JSON, got {path}: {error}") from None
    if not isinstance(header, dict):
        raise FormatError(f"a safetensors header is a JSON object, got another value in {path}")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            _ = entry["dtype"], math.prod(entry["shape"])
        except (KeyError, TypeError, ValueError):
            raise FormatError(
                f"a safetensors header must give dtype, shape and data_offsets of {name}, got others in "
                f"{path}; copy it again"
            ) from None
        if not 0 <= begin <= end <= size - 8 - length:
            raise FormatError(f"{path} is cut short: the bytes of {name} lie outside the file; copy it again")
    return header, 8 + length


def hash_span(path: Path, offset: int, length: int) -> bytes:
    """SHA-256 of `length` bytes at `offset`, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        buffer = memoryview(bytearray(min(BLOCK_BYTES, max(length, 1))))
        while length:
            num_read = file.readinto(buffer[: min(length, len(buffer))])
            if not num_read:
                raise FormatError(f"{path} became shorter while it was read")
            digest.update(buffer[:num_read])
            length -= num_read
    return digest.digest()


def hash_tensors(paths: Sequence[Path], num_threads: int | None = None) -> dict[str, str]:
    """Hex digest per tensor name over all files.

    Raises:
        FormatError: a file is malformed, or two files hold a tensor of the same name.
    """
    with ThreadPoolExecutor(num_threads or min(16, os.cpu_count() or 1)) as pool:
        pending: dict[str, tuple[dict, list]] = {}
        for path in paths:
            header, start = read_header(path)
            for name, entry in header.items():
                if name in pending:
                    raise FormatError(f"a tensor is stored once, got {name} again in {path}")
                begin, end = entry["data_offsets"]
                pieces = [
                    pool.submit(hash_span, path, start + at, min(PIECE_BYTES, end - at))
                    for at in range(begin, end, PIECE_BYTES)
                ]
                pending[name] = (entry, pieces)
        digests = {}
        for name, (entry, pieces) in pending.items():
            digest = hashlib.sha256(f"{entry['dtype']} {entry['shape']}\n".encode())
            for piece in pieces:
                digest.update(piece.result())
            digests[name] = digest.hexdigest()
    return digests
