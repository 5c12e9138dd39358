"""Opening a corpus: a file, a directory, a glob or a Hugging Face data set, read as a stream of records.

Local files are read directly (`readers.py`), so that an error can name the line; data sets come through the
`datasets` library in streaming mode, pinned to the commit that was current when the corpus was opened.
Only the first record is read on opening. The fingerprint covers the contents of the files in their order, not
their names or place: a corpus may be moved or copied.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

from cache_builder.corpus.fields import known_columns
from cache_builder.corpus.files import DEFAULT_SPLIT, find_files, told_split
from cache_builder.corpus.hub_data_set import HubSource, parse_hub_name
from cache_builder.corpus.layouts import Layout, recognise
from cache_builder.corpus.readers import Columns, Record, read_records
from formats.errors import ConfigError, CorpusError


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What to read and how to cut it into rows.

    Raises:
        ConfigError: a value is out of its range.
    """

    source: str
    """A .jsonl, .json, .csv, .parquet, .arrow or .txt file (.jsonl also as .gz or .zst), a directory or glob
    of them, or the name of a Hugging Face data set: `owner/name`, `owner/name:config`,
    `owner/name@revision`."""
    max_length: int = 2048
    """Longest row in tokens. Longer text is split, anything else is truncated on the right."""
    text_column: str | None = None
    """Train on the plain text of this column, whatever else the corpus holds."""
    split: str | None = None
    """Split of a data set or directory; None is `train`."""
    limit: int | None = None
    """Read only so many records: the first ones, or a sample if `seed` is set. None reads all."""
    seed: int | None = None
    """With `limit`: draw the records uniformly from the whole corpus instead (which reads all of it), keeping
    their order. The same seed draws the same records. Has no effect without `limit`."""
    append_eos: bool = True
    """End every text document and every string completion with the tokenizer's end-of-sequence token, if it
    has one and has not added it itself. Chat is left to the chat template."""
    batch_size: int = 512
    """Records tokenised at a time. Changes speed and memory, never the rows."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables that the chat template gets for every conversation; a record may set others, or overrule them."""
    template_time: datetime | None = None
    """The instant that the template's `strftime_now` tells; None is that of the tokenisation."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", str(self.source))
        if not self.source:
            raise ConfigError("corpus must be a file, directory, glob or data set name, got an empty string")
        for name, least in (("max_length", 2), ("batch_size", 1)):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(
                f"limit must be at least 1, got {self.limit}; leave it out to read the whole corpus"
            )


class Corpus:
    """An opened corpus. Iterating yields its records anew each time; nothing is kept in memory."""

    def __init__(self, config: CorpusConfig, source: "tuple[Path, ...] | HubSource") -> None:
        self.config = config
        self._source = source
        self._opened = [_state(path) for path in self.files]
        first = next(self._all_records(None), None)
        if first is None:
            files = (
                f"{len(self.files)} files without records" if len(self.files) > 1 else "one without records"
            )
            raise CorpusError(f"the corpus must hold at least one record, got {files}: {config.source}")
        self.columns: tuple[str, ...] = tuple(first.values)
        """Columns of the first record, in their order."""
        self.layout: Layout = recognise(first.values, config.text_column)
        """What the records are, and where the loss is."""

    def reconfigured(self, config: CorpusConfig) -> "Corpus":
        """The same source under other settings."""
        return Corpus(config, self._source)

    @property
    def format(self) -> str:
        """Announced name of the layout: `text`, `messages`, `prompt + completion`, ..."""
        return self.layout.name

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read, in order; empty for a data set from the hub."""
        return () if isinstance(self._source, HubSource) else self._source

    @property
    def read_columns(self) -> tuple[str, ...]:
        """Those of `columns` that training examples are made of, required ones first."""
        optional = (column for column in self.layout.optional if column in self.columns)
        return (*self.layout.required, *optional)

    @property
    def unread_columns(self) -> tuple[str, ...]:
        """Those of `columns` that say nothing about what is trained; nobody looks into them."""
        return tuple(column for column in self.columns if column not in self.read_columns)

    def __iter__(self) -> Iterator[Record]:
        """The records in order, after `limit` and `seed`.

        Raises:
            CorpusError: a file cannot be read, a line of it cannot be parsed, or it was written to since the corpus
                was opened, and so is not what the fingerprint is of.
        """
        config = self.config
        layout = self.layout
        known = frozenset() if layout.is_chosen else known_columns()
        records = self._all_records({*layout.required, *layout.optional, *known})
        if config.limit is None:
            yield from records
        elif config.seed is None:
            yield from islice(records, config.limit)
        else:
            yield from _sample(records, config.limit, random.Random(config.seed))
        for path, state in zip(self.files, self._opened, strict=True):
            if _state(path) != state:
                raise CorpusError(
                    f"a corpus must stay as it is while it is read, got other contents of {path}; wait until it is "
                    "complete and run the same command again"
                )

    def _all_records(self, columns: Columns) -> Iterator[Record]:
        if isinstance(self._source, HubSource):
            return self._source.records()
        return chain.from_iterable(read_records(path, columns) for path in self._source)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the SHA-256 of every file in reading order, or the pinned commit of a data set.

        Reads every file once (about 1 GB/s); `limit`, `split` and `text_column` are not part of it.
        """
        if isinstance(self._source, HubSource):
            return self._source.fingerprint
        digest = hashlib.sha256(b"anneal corpus of files\n")
        for path in self._source:
            try:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise CorpusError(f"a corpus must be readable, got {path}: {error.strerror}") from error
        return digest.hexdigest()

    def announcement(self) -> str:
        """One line: what is read."""
        config = self.config
        what = f"{len(self.files)} files of {config.source}" if len(self.files) > 1 else config.source
        if (split := config.split or self._told_split()) is not None:
            what += f", split {split}"
        if config.limit is not None:
            what += f", {'first' if config.seed is None else 'a sample of'} {config.limit} records"
        return f"corpus: {what}"

    def _told_split(self) -> str | None:
        """The split that the names of a directory's files tell; files of another one were left out."""
        directory = Path(self.config.source).expanduser()
        if not self.files or not directory.is_dir():
            return None
        return told_split(directory, self.files[0])

    def describe(self) -> dict[str, Any]:
        """The corpus as the identity of a cache records it; plain JSON values."""
        return {
            "source": self.config.source,
            "fingerprint": self.fingerprint,
            "format": self.format,
            "columns": list(self.read_columns),
            "split": self.config.split,
            "limit": self.config.limit,
            "seed": self.config.seed if self.config.limit is not None else None,
        }


def open_corpus(config: CorpusConfig) -> Corpus:
    """Find the corpus, read its first record and recognise its layout.

    Raises:
        ConfigError: `split` is given for a file or glob.
        CorpusError: nothing is found, it is empty, or no layout fits.
    """
    files = find_files(config.source, config.split)
    if files is not None:
        return Corpus(config, files)
    name = parse_hub_name(config.source)
    if name is None:
        raise CorpusError(
            "the corpus must be an existing file or directory, a glob, or a data set name, "
            f"got {config.source:.200}, which does not exist"
        )
    return Corpus(config, HubSource.open(name, config.split or DEFAULT_SPLIT))


def _state(path: Path) -> tuple[int, int]:
    """What a write to a file changes: its size and the time of its last change."""
    try:
        stat = path.stat()
    except OSError as error:
        raise CorpusError(f"a corpus must be readable, got {path}: {error.strerror}") from error
    return stat.st_size, stat.st_mtime_ns


def _sample(records: Iterator[Record], size: int, generator: random.Random) -> Iterator[Record]:
    """Reservoir sampling (Vitter 1985, algorithm R): one pass, memory for `size` records."""
    chosen: list[tuple[int, Record]] = []
    for index, record in enumerate(records):
        if index < size:
            chosen.append((index, record))
        elif (slot := generator.randrange(index + 1)) < size:
            chosen[slot] = (index, record)
    yield from (record for _, record in sorted(chosen, key=lambda pair: pair[0]))
