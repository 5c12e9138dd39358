"""Which caches a chain needs: ready ones as they are, corpora built by the model that KL holds to.

caches/NAME            built by the initial model
caches/NAME-by-STAGE   built by the model of a stage
caches/*.json          of what a cache was built: a finished one is not built again, and another text is refused

This package never captures anything itself. `Build` and `Look` are handed in by who calls it.
"""

import glob
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.cache import TeacherCache
from formats.disk.durable import atomic_write_bytes, read_json_object
from formats.disk.manifest import MANIFEST_NAME
from formats.disk.unfinished_build import build_progress
from formats.errors import ConfigError, naming
from formats.identity.fingerprint import resolve_model, sha256_json
from trainer.result.lineage import own_weights

Build = Callable[[str, str, str, Mapping[str, Any]], None]
"""(corpus, model, out, options) -> a finished cache in `out`, continued where an earlier call was stopped; one that is
finished is only compared.

Raises:
    AnnealError: it could not be built, or another one is there.
"""
Look = Callable[[str, Mapping[str, Any]], None]
"""(corpus, options) -> nothing, where a build of it can begin; no more of it is read than its first record.

Raises:
    AnnealError: there is no such corpus, or it is none.
"""


def is_cache(place: str) -> bool:
    """Whether a finished cache is there; anything else is taken for a corpus."""
    try:
        TeacherCache(place)
    except (OSError, ValueError):
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class CacheMaker:
    """Finds or builds the caches of one chain.

    Args:
        out: the chain's directory.
        options: of the build.
        build: None where nothing may be built.
        look: opens a corpus before anything runs; None leaves that to the build.
    """

    out: Path
    options: Mapping[str, Any]
    build: Build | None = None
    look: Look | None = None

    def place(self, name: str, text: str, by: str = "") -> str:
        """Where the cache of a text is, or will be; `by` names the stage whose model builds it."""
        if is_cache(text):
            return text
        return str(self.out / "caches" / (f"{name}-by-{by}" if by else name))

    def check(self, text: str, what: str, place: str | None = None) -> None:
        """Refuse a text that is neither a cache nor something to build one from.

        Args:
            what: the text's name, for messages.
            place: where its cache will be; the corpus of one that is there is not looked at again.

        Raises:
            AnnealError: there is nothing, nothing to build from, or nobody who could build.
        """
        if is_cache(text):
            return
        path = Path(text)
        if path.is_dir() and (path / MANIFEST_NAME).exists():
            TeacherCache(text)  # says what is wrong with it
        if self.build is None:
            raise ConfigError(f"{what} must be a cache, got {text}; build one with anneal cache build")
        if text.startswith(("/", ".")) and not path.exists():
            raise ConfigError(f"{what} must be a cache or a corpus, got {text}, which does not exist")
        if self.look is not None and not (place is not None and is_cache(place)):
            with naming(what):
                self.look(text, self.options)

    def refuse_idle(self, *texts: str) -> None:
        """Refuse settings of a build where every text is a cache already.

        Raises:
            ConfigError: names them.
        """
        if self.options and all(map(is_cache, texts)):
            raise ConfigError(
                f"--build settings need a corpus of which a cache is built, got {', '.join(sorted(self.options))} "
                "beside finished caches alone; leave them out"
            )

    def make(self, text: str, model: str, place: str) -> None:
        """See that the cache is there.

        Raises:
            ConfigError: it was built of another text, by another model, or with other options.
            AnnealError: it could not be built.
        """
        if is_cache(text):
            return
        weights = own_weights(resolve_model(model))
        now = {"text": text, "content": content(text), "weights": weights, "options": dict(self.options)}
        note = Path(f"{place}.json")
        before = read_json_object(note) if _is_begun(place) else {}
        # A file is known by what is in it, wherever it is and however that is written. Of a directory only some files
        # are read: the build says whether those are the same, and so it does where the note is gone.
        left_out = {"text": now["content"] is not None, "content": not Path(text).is_file()}
        compared = [key for key in now if not left_out.get(key)]
        differs = next((k for k in compared if before.get(k) != now[k]), None) if before else None
        if differs is not None:
            raise ConfigError(
                f"--out keeps its texts, but in {place} {differs} was {before.get(differs)!r} and is "
                f"{now[differs]!r}; use another --out, or remove that cache and what was trained from it"
            )
        finished = is_cache(place)
        if finished and before and before.get("content") == now["content"]:
            return
        assert self.build is not None
        note.parent.mkdir(parents=True, exist_ok=True)
        noted = json.dumps(now, indent=1, sort_keys=True).encode()
        if not finished:  # so that one that is killed is known
            atomic_write_bytes(note, noted)
        self.build(text, model, place, self.options)
        if finished:
            atomic_write_bytes(note, noted)


def _is_begun(place: str) -> bool:
    """Whether a build has planned its rows there: before that nothing is of any text, and a mended one may follow."""
    _, planned = build_progress(place) or (0, 0)
    return planned > 0 or is_cache(place)


def require_caches(texts: Mapping[str, str], option: str) -> None:
    """Refuse held-out texts that are no finished caches; nobody builds them.

    Raises:
        ConfigError: names the first one, by the option that it was typed with.
    """
    for name, text in texts.items():
        CacheMaker(out=Path(), options={}).check(text, f"{option} {name}")


def content(text: str) -> str | None:
    """SHA-256 of a corpus that is one file, or of all files of a directory or glob with their names, hidden ones left
    out; None for a data set's name.
    """
    path = Path(text)
    if path.is_file():
        return _digest(path)
    if path.is_dir():
        names = sorted(found.relative_to(path).as_posix() for found in path.rglob("*") if found.is_file())
        names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
        files = {name: path / name for name in names}
    else:
        files = {name: Path(name) for name in sorted(glob.glob(text, recursive=True)) if Path(name).is_file()}
    return sha256_json({name: _digest(file) for name, file in files.items()}) if files else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
