"""`NAME=PATH`, the form in which commands take models and caches, and what one without a name is called."""

import os
import re
from typing import Any


def split_name(word: str) -> tuple[str, str]:
    """Name, empty where none is given, and path.

    Names and paths may hold `=` themselves, as those of a sweep's runs do (`kl_coef=1,lr=1e-4`): a word that is a path
    here is no name, and of several splits the first counts whose right side is a path here. A name has no slash.
    """
    if os.path.lexists(word):
        return "", word
    splits = [(word[: at.start()], word[at.end() :]) for at in re.finditer("=", word)]
    possible = [(name, path) for name, path in splits if name and "/" not in name]
    here = (split for split in possible if split[1] and os.path.lexists(split[1]))
    return next(here, possible[0] if possible else ("", word))


def short_name(path: Any) -> str:
    """The last part of a directory or hub name."""
    return str(path).rstrip("/").rsplit("/", 1)[-1]
