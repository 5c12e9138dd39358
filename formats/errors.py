"""Every error a user can cause, one class per kind.

Messages follow one shape: the rule, what was got, what to do. The command line prints them as a single line
and exits with 1; library users catch `AnnealError` or the precise class.
"""

from collections.abc import Iterator
from contextlib import contextmanager

DEVELOPMENT_CACHE = (
    "this cache was built by a development version before the first release; build it again "
    "(anneal cache build CORPUS --model MODEL --out CACHE --overwrite)"
)
"""What to say of a cache of the format's drafts, which nothing reads any more."""


class AnnealError(ValueError):
    """Base of all errors that describe bad input rather than a defect of this program."""


class ConfigError(AnnealError):
    """A setting is out of range, unknown, or contradicts another one."""


class CorpusError(AnnealError):
    """The corpus is missing, empty, unreadable, or has no recognised columns."""


class FormatError(AnnealError):
    """A directory or file is not a teacher cache, or breaks a rule of docs/format.md."""


class UnsupportedVersionError(FormatError):
    """The cache was written by a format version or codec that this reader does not know."""


class CorruptShardError(FormatError):
    """Bytes do not match their checksum, or a length or count is outside its bounds."""


class IncompleteCacheError(FormatError):
    """The directory holds an unfinished build: shards without a manifest."""


class IdentityMismatchError(AnnealError):
    """The cache was built with another model, tokenizer, template, corpus or setting."""


class DivergenceError(AnnealError):
    """A loss, gradient, weight or evaluation is not finite: the run stops, and nothing of it is published."""


@contextmanager
def naming(what: str) -> Iterator[None]:
    """In this block an error says what it is about, before its own message; its class stays."""
    try:
        yield
    except AnnealError as error:
        raise type(error)(f"{what}: {error}") from None


def one_line(error: BaseException, limit: int | None = 300, *, whole: bool = False) -> str:
    """The first line of what an error says, at most `limit` characters of it; its kind where it says nothing.

    Args:
        limit: None for all of them: what this program says itself is never too long.
        whole: all its lines, joined to one: for errors whose first line is not the one that matters.
    """
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return (" ".join(lines if whole else lines[:1]) or type(error).__name__)[:limit]
