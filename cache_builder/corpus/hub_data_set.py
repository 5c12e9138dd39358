"""Data sets of the Hugging Face Hub through the `datasets` library, streamed and pinned to one commit.

Offline (HF_HUB_OFFLINE=1) there is nothing to stream from; a copy in the local cache of `datasets` is
memory-mapped instead, so memory stays flat either way.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from cache_builder.corpus.column_values import plain, plain_untyped
from cache_builder.corpus.readers import Record
from formats.errors import CorpusError, one_line

_NAME = re.compile(
    r"(?P<repository>[\w][\w.-]*(?:/[\w][\w.-]*)?)(?::(?P<config>[\w.+=-]+))?(?:@(?P<revision>[\w./-]+))?"
)
# Suffixes that make a missing path a missing file, not a data set that was never heard of.
_FILE_LIKE = re.compile(r"\.(jsonl?|csv|tsv|parquet|arrow|txt|gz|zst|md|xml|ya?ml)$", re.IGNORECASE)


class HubName(NamedTuple):
    """`owner/name:config@revision` in its parts."""

    repository: str
    config: str | None
    revision: str | None


def parse_hub_name(source: str) -> HubName | None:
    """The parts of a data set name, or None if `source` cannot be one."""
    match = _NAME.fullmatch(source)
    if match is None or _FILE_LIKE.search(match["repository"]):
        return None
    return HubName(match["repository"], match["config"], match["revision"])


@dataclass(frozen=True)
class HubSource:
    """An opened split of a data set: `records()` starts over each time."""

    repository: str
    fingerprint: str
    """SHA-256 over repository, configuration, split and commit; offline, what the local cache calls it."""
    dataset: Any
    """`datasets.IterableDataset`, or the memory-mapped `Dataset` when offline."""

    @classmethod
    def open(cls, name: HubName, split: str) -> "HubSource":
        """Resolve the commit and open the split.

        Raises:
            CorpusError: no such data set, configuration or split, no access, or no network.
        """
        import datasets
        from huggingface_hub import HfApi, constants

        offline = constants.HF_HUB_OFFLINE
        revision = name.revision
        try:
            if not offline:
                # The commit, so that a resumed build and its fellow workers read the same records.
                revision = HfApi().dataset_info(name.repository, revision=revision).sha
            with _without_progress_bars():
                dataset = datasets.load_dataset(
                    name.repository, name.config, split=split, revision=revision, streaming=not offline
                )
        except Exception as error:  # a dozen unrelated classes, all meaning "cannot be opened"
            hint = "unset HF_HUB_OFFLINE, or pass a file" if offline else "check the name, or pass a file"
            raise CorpusError(
                "the corpus must be an existing file or directory, a glob, or a data set name, "
                f"got {name.repository} (split {split}): {_reason(error)}; {hint}"
            ) from error
        stamp = dataset._fingerprint if offline else revision
        identity = f"anneal corpus of the hub\n{name.repository}\n{name.config}\n{split}\n{stamp}"
        return cls(name.repository, hashlib.sha256(identity.encode()).hexdigest(), dataset)

    def records(self) -> Iterator[Record]:
        """The rows of the split, in the data set's order.

        Raises:
            CorpusError: the stream broke off.
        """
        number = 0
        try:
            kinds = _types(self.dataset)
            for number, values in enumerate(self.dataset, 1):
                values = {
                    name: plain(value, kinds[name], decoded=True) if name in kinds else plain_untyped(value)
                    for name, value in values.items()
                }
                yield Record(values, self.repository, number)
        except Exception as error:  # network, decoding and casting errors of many libraries
            raise CorpusError(
                f"the data set must be readable to its end, got {self.repository} after row {number}: "
                f"{_reason(error)}; run the same command again"
            ) from error


def _types(dataset: Any) -> dict[str, Any]:
    """Arrow types by column, as far as the data set tells them before it is read."""
    features = dataset.features
    if features is None:
        return {}
    schema = features.arrow_schema
    return dict(zip(schema.names, schema.types, strict=True))


def _reason(error: Exception) -> str:
    """The error on one line, without a closing full stop."""
    return one_line(error, whole=True).rstrip(".")


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Silence `datasets` while it resolves files."""
    import datasets

    was_enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_enabled:
            datasets.enable_progress_bars()
