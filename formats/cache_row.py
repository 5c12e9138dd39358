"""A row of a cache, and what can be read from one: what statistics and checks are written against.

L: tokens, P: positions with a stored distribution.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from formats.disk.manifest import Manifest
from formats.disk.shard import ShardReader
from formats.disk.token_row import TokenRow
from formats.logprobs.topk import TopKLogprobs


@dataclass(frozen=True, eq=False)
class CacheRow:
    """A training example with its teacher."""

    tokens: TokenRow
    """Token ids and loss mask."""
    teacher: TopKLogprobs
    """One distribution per position, in order."""
    which: str = "loss"
    """The cache's position mode, `loss` or `all`."""

    @property
    def input_ids(self) -> np.ndarray:
        """int32 [L]."""
        return self.tokens.input_ids

    @property
    def loss_mask(self) -> np.ndarray:
        """bool [L]."""
        return self.tokens.loss_mask

    @property
    def key(self) -> bytes:
        """The row's content key, 16 bytes."""
        return self.tokens.key

    @cached_property
    def positions(self) -> np.ndarray:
        """int32 [P]: distribution p of `teacher` is the prediction of token `positions[p] + 1`."""
        return self.tokens.positions(self.which)

    @cached_property
    def label_ids(self) -> np.ndarray:
        """int32 [P]: the token at `positions[p] + 1`, whose logprob is `teacher.label_logprobs[p]`."""
        return self.tokens.label_ids(self.which)

    def __len__(self) -> int:
        return len(self.tokens)


class ReadableCache(Protocol):
    """The part of `TeacherCache` that statistics and checks use."""

    path: str
    """Directory or fsspec URL."""
    manifest: Manifest
    """What the cache is."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> CacheRow: ...

    def shard(self, number: int) -> ShardReader:
        """The reader of shard `number`."""
        ...

    def file(self, name: str, limit: int = ...) -> bytes:
        """An auxiliary file, checked against the manifest."""
        ...
