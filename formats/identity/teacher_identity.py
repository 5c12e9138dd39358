"""The identity of a cache: everything that decides which numbers are in it.

Four sections: `teacher`, `tokenizer`, `corpus`, `preprocessing`, each a flat mapping of strings to JSON
values.  Two caches with equal identities hold the same numbers up to the noise of one engine; a cache may
only be used with the model, tokenizer, template and length it was made for.  A mismatch is an error that
names the part, never a warning: a wrong teacher does not crash a training run, it quietly ruins it.

Names and paths are recorded for people (`DESCRIPTIVE`) and never compared: moving a model, a corpus or a
cache is no mismatch.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from formats.errors import ConfigError, IdentityMismatchError
from formats.identity.fingerprint import (
    ModelFingerprint,
    TokenizerFingerprint,
    resolve_model,
    sha256_json,
    tokenizer_files_fingerprint,
)

SECTIONS = ("teacher", "tokenizer", "corpus", "preprocessing")
DESCRIPTIVE = frozenset(
    {("teacher", "name"), ("teacher", "revision"), ("corpus", "source"), ("tokenizer", "name")}
    | {("corpus", "counts"), ("corpus", "notes")}
)
"""Recorded so that people recognise a cache; not part of the identity."""

MEANINGS = {
    ("teacher", "weights"): "model weights",
    ("teacher", "config"): "model configuration (config.json)",
    ("tokenizer", "vocabulary"): "tokenizer vocabulary",
    ("tokenizer", "pipeline"): "tokenizer pipeline (normaliser, merges, pre-tokeniser)",
    ("tokenizer", "special_tokens"): "special tokens",
    ("tokenizer", "chat_template"): "chat template",
    ("corpus", "fingerprint"): "corpus contents",
    ("preprocessing", "max_length"): "maximum length",
}


@dataclass(frozen=True)
class Difference:
    """One part in which two identities disagree."""

    section: str
    key: str
    recorded: Any
    given: Any

    def __str__(self) -> str:
        name = MEANINGS.get((self.section, self.key), f"{self.section}.{self.key}")
        return f"{name}: {short(self.recorded)} in the cache, {short(self.given)} given"


def short(value: Any) -> str:
    """A value for one line of text: hashes cut to twelve characters."""
    if isinstance(value, str) and len(value) == 64 and all(c in "0123456789abcdef" for c in value):
        return value[:12]
    if value is None or value == "":
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class TeacherIdentity:
    """Which model, tokenizer, corpus and settings produced a cache.

    Raises:
        ConfigError: a section is not a mapping of strings to JSON values.
    """

    teacher: Mapping[str, Any] = field(default_factory=dict)
    """weights, config (hashes), architecture, dtype, head_dtype, engine, engine_version, name."""
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    """vocabulary, pipeline, special_tokens, chat_template (hashes), vocab_size."""
    corpus: Mapping[str, Any] = field(default_factory=dict)
    """source, fingerprint, columns, split, limit; of generated text generate, prompts, seed, ..."""
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    """max_length, positions, min_prob, max_k, seed, format."""

    def __post_init__(self) -> None:
        for section in fields(self):
            value = getattr(self, section.name)
            if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
                raise ConfigError(f"identity section {section.name} must map names to values, got {value!r}")
            try:
                plain = json.loads(json.dumps(dict(value), sort_keys=True, allow_nan=False))
            except (TypeError, ValueError) as error:
                raise ConfigError(f"identity section {section.name} must be JSON, got {error}") from None
            object.__setattr__(self, section.name, plain)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """A JSON-ready copy."""
        return {section: dict(getattr(self, section)) for section in SECTIONS}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TeacherIdentity":
        """The inverse of `to_dict`.

        Raises:
            ConfigError: `data` has other sections than the four.
        """
        if not isinstance(data, Mapping) or set(data) - set(SECTIONS):
            raise ConfigError(f"an identity has the sections {', '.join(SECTIONS)}, got {sorted(data)}")
        return cls(**{section: data.get(section, {}) for section in SECTIONS})

    def compared(self) -> dict[str, dict[str, Any]]:
        """`to_dict` without the descriptive entries."""
        return {
            section: {k: v for k, v in entries.items() if (section, k) not in DESCRIPTIVE}
            for section, entries in self.to_dict().items()
        }

    def digest(self) -> str:
        """SHA-256 of the compared parts: the id of a cache."""
        return sha256_json(self.compared())

    def differences(
        self,
        other: "TeacherIdentity",
        sections: Iterable[str] = SECTIONS,
        ignore: Iterable[tuple[str, str]] = (),
    ) -> list[Difference]:
        """Every compared part in which `other` disagrees, in a stable order."""
        mine, theirs, skip = self.compared(), other.compared(), set(ignore)
        return [
            Difference(section, key, mine[section].get(key), theirs[section].get(key))
            for section in sections
            for key in sorted({*mine[section], *theirs[section]})
            if (section, key) not in skip and mine[section].get(key) != theirs[section].get(key)
        ]


def refuse(differences: list[Difference]) -> None:
    """Raise one error for a non-empty list of differences.

    Raises:
        IdentityMismatchError: always, unless the list is empty.
    """
    if differences:
        raise IdentityMismatchError(
            "a cache serves only the model and settings it was built with, but these differ: "
            + "; ".join(str(d) for d in differences)
            + ". Use the original, or rebuild with `anneal cache build`"
        )


def require_same_teacher(
    identity: TeacherIdentity,
    model_dir: str | Path,
    tokenizer: Any | None = None,
    max_length: int | None = None,
    teachers: Collection[str] = (),
) -> list[str]:
    """The check that `train`, `verify` and `inspect --model` make before they use a cache with a model.

    Weights and configuration are always compared.  With `tokenizer` (a loaded one) all its parts are, without
    it those that the files in `model_dir` tell: vocabulary and chat template. `teachers` are fingerprints of
    further weights that may have built the cache: those of the model's ancestors.

    Returns:
        The names of the parts that were compared and agree, for a line of output.

    Raises:
        IdentityMismatchError: a part differs; the message names all that do, and how to rebuild.
        ConfigError: `model_dir` is not a model.
    """
    model_dir = resolve_model(model_dir)
    model = ModelFingerprint.of(model_dir)
    built_by = identity.teacher.get("weights")
    parts: dict[tuple[str, str], Any] = {
        ("teacher", "weights"): built_by if built_by in teachers else model.weights,
        ("teacher", "config"): model.config,
    }
    if tokenizer is not None:
        found = vars(TokenizerFingerprint.of(tokenizer))
    else:
        found = tokenizer_files_fingerprint(model_dir)
    parts |= {("tokenizer", key): value for key, value in found.items()}
    if max_length is not None:
        parts["preprocessing", "max_length"] = max_length
    return _require_equal(identity, parts)


def require_same_tokenizer(identity: TeacherIdentity, tokenizer: Any) -> list[str]:
    """The check of a cache whose tokens are read and whose teacher's numbers are not: vocabulary, pipeline,
    special tokens and chat template, whichever model built it.

    Returns:
        The names of the parts that agree.

    Raises:
        IdentityMismatchError: a part differs.
    """
    found = vars(TokenizerFingerprint.of(tokenizer))
    return _require_equal(identity, {("tokenizer", key): value for key, value in found.items()})


def _require_equal(identity: TeacherIdentity, parts: Mapping[tuple[str, str], Any]) -> list[str]:
    recorded = identity.to_dict()
    refuse(
        [Difference(s, k, recorded[s].get(k), v) for (s, k), v in parts.items() if recorded[s].get(k) != v]
    )
    return [MEANINGS.get(part, part[1]) for part in parts]
