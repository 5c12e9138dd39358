"""What is probed: words of a command in, labels and directories out, in the order in which they were given."""

from collections.abc import Iterable
from pathlib import Path

from formats.errors import ConfigError
from formats.identity.fingerprint import refuse_idle_revision, resolve_model
from formats.named_path import short_name, split_name


def named_models(words: Iterable[str]) -> dict[str, tuple[str, str | None]]:
    """Label -> (model, revision).

    Args:
        words: `MODEL`, `LABEL=MODEL` or either with `@REVISION`; without a label the revision is one, or the last part
            of the name.

    Raises:
        ConfigError: two labels are the same, or a revision is one of a directory.
    """
    found: dict[str, tuple[str, str | None]] = {}
    for word in words:
        label, rest = split_name(word)
        model, revision = rest, None
        if "@" in rest and not Path(rest).exists():
            model, _, revision = rest.rpartition("@")
        refuse_idle_revision(model, revision, what="MODEL")
        label = label or revision or short_name(model)
        if label in found:
            raise ConfigError(f"models must have different labels, got {label!r} twice; write LABEL=MODEL")
        found[label] = (model, revision)
    return found


def resolved(words: Iterable[str]) -> dict[str, Path]:
    """Label -> directory.

    Raises:
        ConfigError: as `named_models`, or a model is not there.
    """
    return {
        label: resolve_model(model, revision, what="MODEL")
        for label, (model, revision) in named_models(words).items()
    }
