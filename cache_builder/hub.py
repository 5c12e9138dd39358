"""Data sets of the Hugging Face Hub through the `datasets` library, streamed and pinned to one commit.

Offline (HF_HUB_OFFLINE=1) there is nothing to stream from; a copy in the local cache of `datasets` is
memory-mapped instead, so memory stays flat either way.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from cache_builder.readers import Record
from formats.errors import CorpusError

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

    name: HubName
    split: str
    fingerprint: str
    """SHA-256 over repository, configuration, split and commit (or the cache's own fingerprint when
    offline)."""
    load: Callable[[], Any]

    @classmethod
    def open(cls, name: HubName, split: str) -> "HubSource":
        """Resolve the commit and open the split.

        Raises:
            CorpusError: no such data set, configuration or split, no access, or no network.

        """
        import datasets
        from huggingface_hub import HfApi, constants

        offline = constants.HF_HUB_OFFLINE
        try:
            # The commit, so that a resumed build and its fellow workers read the same records.
            revision = (
                name.revision
                if offline
                else HfApi().dataset_info(name.repository, revision=name.revision).sha
            )
            with _quiet(datasets):
                opened = datasets.load_dataset(
                    name.repository, name.config, split=split, revision=revision, streaming=not offline
                )
        except (
            Exception
        ) as error:  # `datasets` raises a dozen unrelated classes here, all meaning "cannot be opened"
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            hint = (
                "; HF_HUB_OFFLINE is set and the data set is not in the local cache"
                if offline
                else "; check the name, or pass a file or directory"
            )
            raise CorpusError(
                f"the corpus must be an existing file or directory, a glob, or a data set name, got "
                f"{name.repository} (split {split}): {reason}{hint}"
            ) from error
        stamp = getattr(opened, "_fingerprint", "") if offline else revision
        digest = hashlib.sha256(
            f"anneal corpus of the hub\n{name.repository}\n{name.config}\n{split}\n{stamp}".encode()
        )
        return cls(name, split, digest.hexdigest(), lambda: opened)

    def records(self) -> Iterator[Record]:
        """The rows of the split, in the data set's order.

        Raises:
            CorpusError: the stream broke off.

        """
        number = 0
        try:
            for number, values in enumerate(self.load(), 1):
                yield Record(values, self.name.repository, number)
        except CorpusError:
            raise
        except Exception as error:  # network, decoding and casting errors of many libraries
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise CorpusError(
                f"the data set must be readable to its end, got {self.name.repository} after row {number}: "
                f"{reason}; run the same command again"
            ) from error


class _quiet:
    """Silence the progress bars of `datasets` while it resolves files."""

    def __init__(self, datasets: Any) -> None:
        self._datasets = datasets

    def __enter__(self) -> None:
        self._was_enabled = self._datasets.is_progress_bar_enabled()
        self._datasets.disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        if self._was_enabled:
            self._datasets.enable_progress_bars()
