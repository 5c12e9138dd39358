"""Opening a corpus: a file, a directory, a glob or a Hugging Face data set, read as a stream of records.

Local files are read directly (`readers.py`), so that an error can name the line; data sets come through the
`datasets` library in streaming mode, pinned to the commit that was current when the corpus was opened.
Only the first record is read on opening. The fingerprint covers the contents of the files in their order, not
their names or place: a corpus may be moved or copied.
"""

import glob
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

from cache_builder.hub import HubSource, parse_hub_name
from cache_builder.readers import FAMILIES, Record, family_of, read_records
from cache_builder.recognise import Layout, recognise
from formats.errors import ConfigError, CorpusError

DEFAULT_SPLIT = "train"
# The words by which data sets name their splits, in files (`test.jsonl`) or folders (`data/train-00000.parquet`).
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
# Written beside the data by `datasets`; they describe it and are not part of it.
METADATA_FILES = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What to read and how to cut it into rows.

    Raises:
        ConfigError: a value is out of its range.
    """

    source: str
    """A .jsonl, .json, .csv, .parquet, .arrow or .txt file (.jsonl also as .gz or .zst), a directory or glob of
    them, or the name of a Hugging Face data set: `owner/name`, `owner/name:config`, `owner/name@revision`."""
    max_length: int = 2048
    """Longest row in tokens. Longer text is split, longer chat and prompt + completion is truncated on the right."""
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
    """End every text document and every string completion with the tokenizer's end-of-sequence token, if it has
    one and has not added it itself. Chat is left to the chat template."""
    batch_size: int = 512
    """Records tokenised at a time. Changes speed and memory, never the rows."""

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
    """An opened corpus. Iterating yields its records anew each time; nothing is kept in memory or left open."""

    def __init__(self, config: CorpusConfig, source: "tuple[Path, ...] | HubSource") -> None:
        self.config = config
        self._source = source
        first = next(self._all_records(), None)
        if first is None:
            what = (
                "holds no records"
                if self.num_files == 1
                else f"holds no records in its {self.num_files} files"
            )
            raise CorpusError(f"the corpus must hold at least one record, got {config.source}, which {what}")
        self.columns: tuple[str, ...] = tuple(first.values)
        """Columns of the first record, in their order."""
        try:
            self.layout: Layout = recognise(first.values, config.text_column)
        except CorpusError as error:
            raise CorpusError(f"{error} [{first.where}]") from None

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
    def num_files(self) -> int:
        """Number of files, 1 for a data set from the hub."""
        return max(len(self.files), 1)

    def __iter__(self) -> Iterator[Record]:
        """The records in order, after `limit` and `seed`.

        Raises:
            CorpusError: a file cannot be read, or a line of it cannot be parsed.
        """
        config = self.config
        if config.limit is None:
            yield from self._all_records()
        elif config.seed is None:
            yield from islice(self._all_records(), config.limit)
        else:
            yield from self._sample(config.limit, random.Random(config.seed))

    def _all_records(self) -> Iterator[Record]:
        if isinstance(self._source, HubSource):
            return self._source.records()
        return chain.from_iterable(read_records(path) for path in self._source)

    def _sample(self, size: int, generator: random.Random) -> Iterator[Record]:
        """Reservoir sampling (Vitter 1985, algorithm R): one pass, memory for `size` records."""
        chosen: list[tuple[int, Record]] = []
        for index, record in enumerate(self._all_records()):
            if index < size:
                chosen.append((index, record))
            elif (slot := generator.randrange(index + 1)) < size:
                chosen[slot] = (index, record)
        yield from (record for _, record in sorted(chosen, key=lambda pair: pair[0]))

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

    def describe(self) -> dict[str, Any]:
        """The corpus as the identity of a cache records it; plain JSON values."""
        return {
            "source": self.config.source,
            "fingerprint": self.fingerprint,
            "format": self.format,
            "columns": list(self.layout.columns),
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
    source = config.source
    path = Path(source).expanduser()
    if path.is_dir():
        return Corpus(config, _files_of_directory(path, config.split))
    if path.exists():
        if family_of(path) is None:
            raise CorpusError(f"a corpus file must end in {_suffixes()}, got {source}")
        return Corpus(config, _without_split(config, (path,)))
    if glob.has_magic(source):
        matches = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        files = tuple(match for match in matches if match.is_file() and _is_data(match))
        if not files:
            raise CorpusError(f"a glob must match files that end in {_suffixes()}, got none for {source}")
        return Corpus(config, _without_split(config, _of_one_family(files, source)))
    name = parse_hub_name(source)
    if name is None:
        raise CorpusError(
            f"the corpus must be an existing file or directory, a glob, or a data set name, got {source}, "
            "which does not exist"
        )
    return Corpus(config, HubSource.open(name, config.split or DEFAULT_SPLIT))


def _suffixes() -> str:
    return ", ".join(FAMILIES)


def _is_data(path: Path) -> bool:
    return family_of(path) is not None and path.name not in METADATA_FILES


def _without_split(config: CorpusConfig, files: tuple[Path, ...]) -> tuple[Path, ...]:
    if config.split is not None:
        raise ConfigError(
            f"split applies to data set names and directories, got split {config.split!r} for {config.source}; leave it out"
        )
    return files


def _of_one_family(files: tuple[Path, ...], source: str) -> tuple[Path, ...]:
    families = sorted({str(family_of(path)) for path in files})
    if len(families) > 1:
        raise CorpusError(
            f"the files of a corpus must be of one kind, got {' and '.join(families)} files in {source}; "
            f"name one kind with a glob such as '{source.rstrip('/')}/*{files[0].suffix}'"
        )
    return files


def _files_of_directory(directory: Path, split: str | None) -> tuple[Path, ...]:
    """All data files below `directory` in the order of their relative paths, hidden ones left out.

    If file or folder names carry split words, those of one split are taken: the others are held out on purpose.
    """
    try:
        found = sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    except OSError as error:
        raise CorpusError(f"a corpus must be readable, got {directory}: {error.strerror}") from error
    relative = [
        path for path in found if _is_data(path) and not any(part.startswith(".") for part in path.parts)
    ]
    if not relative:
        raise CorpusError(
            f"a corpus directory must hold files that end in {_suffixes()}, got none in {directory}"
        )
    splits = {path: _split_of(path) for path in relative}
    named = {word for word in splits.values() if word is not None}
    wanted = SPLIT_WORDS.get(split or DEFAULT_SPLIT, split)
    if named and (split is not None or named != {DEFAULT_SPLIT}):
        relative = [path for path in relative if splits[path] == wanted]
    elif split is not None and wanted != DEFAULT_SPLIT:
        relative = []
    if not relative:
        raise CorpusError(
            f"split must be one of {', '.join(sorted(named)) or DEFAULT_SPLIT} in {directory}, got {split or DEFAULT_SPLIT}; "
            "pass --split NAME or a glob of the files"
        )
    return _of_one_family(tuple(directory / path for path in relative), str(directory))


def _split_of(path: Path) -> str | None:
    """The split that a relative path names by a whole word in its file name, else in its folders."""
    for part in reversed(path.parts):
        word = ""
        for character in [*part.lower(), "."]:
            if character.isalpha():
                word += character
            elif word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
            else:
                word = ""
    return None
