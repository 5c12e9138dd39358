"""Which files make up a local corpus: a file, a glob or a directory to an ordered tuple of paths.

Order is the order of the relative paths, so it does not depend on the file system. What could be held-out
data is never mixed in silently: where every file of a directory names a split, one split is read; where only
some do, the user has to say.
"""

import glob
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from cache_builder.corpus.readers import FAMILIES, family_of
from formats.errors import ConfigError, CorpusError

DEFAULT_SPLIT = "train"
# The words by which data sets name their splits, in files (`test.jsonl`) or folders (`train/part-0.parquet`).
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


def find_files(source: str, split: str | None) -> tuple[Path, ...] | None:
    """The files that `source` names, in reading order; None if it names nothing on this machine and is no
    glob.

    Raises:
        ConfigError: `split` is given where no splits can be told apart.
        CorpusError: no file with a known suffix, files of several kinds, or no such split.
    """
    path = Path(source).expanduser()
    try:
        exists, is_directory = path.exists(), path.is_dir()
    except OSError as error:
        raise CorpusError(f"a corpus must be readable, got {source:.200}: {error.strerror}") from error
    if is_directory:
        return _of_directory(path, split)
    if exists:
        if family_of(path) is None:
            raise CorpusError(f"a corpus file must end in {_suffixes()}, got {source}")
        files: tuple[Path, ...] = (path,)
    elif glob.has_magic(source):
        matches = sorted({Path(name) for name in glob.glob(str(path), recursive=True)})
        files = tuple(match for match in matches if match.is_file() and _is_data(match))
        if not files:
            raise CorpusError(f"a glob must match files that end in {_suffixes()}, got none for {source}")
    else:
        return None
    if split is not None:
        raise ConfigError(
            f"split applies to data set names and directories, got split {split} for {source}; leave it out"
        )
    return _of_one_family(files, source)


def _suffixes() -> str:
    return ", ".join(FAMILIES)


def _is_data(path: Path) -> bool:
    return family_of(path) is not None and path.name not in METADATA_FILES


def _of_one_family(files: tuple[Path, ...], source: str) -> tuple[Path, ...]:
    families = sorted({str(family_of(path)) for path in files})
    if len(families) > 1:
        raise CorpusError(
            f"the files of a corpus must be of one kind, got {' and '.join(families)} files in {source}; "
            "name one kind with a glob such as 'folder/*.jsonl'"
        )
    return files


def _of_directory(directory: Path, split: str | None) -> tuple[Path, ...]:
    """The data files below `directory` of one split, hidden ones left out."""
    found = sorted(_visible_files(directory))
    saved = _saved_dataset_files(directory, found)
    data = [
        path for path in found if _is_data(path) and (path.parent not in saved or path in saved[path.parent])
    ]
    if not data:
        raise CorpusError(
            f"a corpus directory must hold files that end in {_suffixes()}, got none in {directory}"
        )
    named = _named_splits(directory)
    splits = {path: split_of(path, named) for path in data}
    names = sorted({name for name in splits.values() if name is not None})
    if names and None in splits.values() and split is None:
        plain = next(path for path in data if splits[path] is None)
        raise CorpusError(
            f"either all files of a directory name a split or none does, got {plain} beside files of "
            f"{', '.join(names)} in {directory}; pass --split NAME or a glob of the files to read"
        )
    wanted = _wanted(names, split, named)
    if names:
        data = [path for path in data if splits[path] == wanted]
    elif wanted != DEFAULT_SPLIT:
        data = []
    if not data:
        raise CorpusError(
            f"split must be one of {', '.join(names) or DEFAULT_SPLIT} in {directory}, got "
            f"{split or f'{DEFAULT_SPLIT} (the default)'}; pass --split NAME or a glob of the files to read"
        )
    return _of_one_family(tuple(directory / path for path in data), str(directory))


def _saved_dataset_files(directory: Path, found: list[Path]) -> dict[Path, set[Path]]:
    """Folders written by `Dataset.save_to_disk`, with the data files that belong to each.

    `datasets` later leaves its own caches beside them, which are copies of the same records.
    """
    saved = {}
    for path in found:
        if path.name == "state.json":
            try:
                state = json.loads((directory / path).read_text(encoding="utf-8"))
                saved[path.parent] = {path.parent / entry["filename"] for entry in state["_data_files"]}
            except (OSError, ValueError, KeyError, TypeError):
                continue  # some other program's state.json
    return saved


def told_split(directory: Path, path: Path) -> str | None:
    """The split that a file below a corpus directory belongs to."""
    return split_of(path.relative_to(directory), _named_splits(directory))


def _visible_files(directory: Path) -> Iterator[Path]:
    """Relative paths of the files below a directory, behind links too; hidden ones and circles left out."""
    seen = set()
    for folder, folders, files in os.walk(directory, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in files:
            if not name.startswith(".") and (path := Path(folder, name)).is_file():
                yield path.relative_to(directory)


def _named_splits(directory: Path) -> tuple[str, ...]:
    """Folders that `DatasetDict.save_to_disk` lists as splits, whatever they are called."""
    try:
        splits = json.loads((directory / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    return tuple(name for name in splits if isinstance(name, str)) if isinstance(splits, list) else ()


def _wanted(names: list[str], split: str | None, named: tuple[str, ...]) -> str | None:
    """The split to read, as the files have it."""
    asked = split or DEFAULT_SPLIT
    if not named:
        return SPLIT_WORDS.get(asked, split)
    if asked in names:
        return asked
    alike = [name for name in names if SPLIT_WORDS.get(name) == SPLIT_WORDS.get(asked, asked)]
    if split is None and len(names) == 1:
        alike = names
    return alike[0] if len(alike) == 1 else None


def split_of(path: Path, named: tuple[str, ...] = ()) -> str | None:
    """The split that a relative path names: by its first folder, if that is one of `named`; else by a whole word in its
    file name, or in its innermost folder."""
    if path.parts[0] in named:
        return path.parts[0]
    for part in reversed(path.parts):
        for word in re.findall(r"[a-z]+", part.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None
