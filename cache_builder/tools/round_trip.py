"""Store rows in a temporary shard and read them again: what the real codec makes of them, in numbers and in
bytes."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from formats.capture_settings import CaptureSettings
from formats.codec.config import CodecConfig
from formats.disk.byte_source import open_store
from formats.disk.manifest import ShardInfo
from formats.disk.shard import ShardReader, ShardWriter
from formats.disk.token_row import TokenRow
from formats.logprobs.topk import TopKLogprobs


@dataclass(frozen=True)
class Stored:
    """Rows after a trip to the disk and back."""

    topk: list[TopKLogprobs]
    """What a reader gets."""
    info: ShardInfo
    """Size and counts of the shard."""


def stored_and_read(
    rows: Sequence[TokenRow],
    topk: Sequence[TopKLogprobs],
    capture: CaptureSettings,
    codec: CodecConfig,
) -> Stored:
    """Write one shard of these rows, read it back, delete it.

    Raises:
        ValueError: no rows, or rows and distributions that do not fit together.
    """
    if not rows:
        raise ValueError("at least one row is needed, got none")
    with tempfile.TemporaryDirectory(prefix="anneal-") as scratch:
        path = Path(scratch) / "shard-00000.arrow"
        writer = ShardWriter(
            path,
            vocab_size=topk[0].vocab_size,
            positions=capture.positions,
            max_k=capture.max_k,
            codec=codec,
        )
        for row, distributions in zip(rows, topk, strict=True):
            writer.append(row, distributions)
        info = writer.close()
        reader = ShardReader(open_store(scratch).open(path.name), path.name)
        return Stored([reader.teacher(index)[1] for index in range(len(reader))], info)
