"""Does this cache belong to this model, loaded by somebody else? What can be said before the first forward pass."""

from pathlib import Path
from typing import Any

from formats.cache import TeacherCache
from formats.errors import IdentityMismatchError
from formats.identity.fingerprint import TokenizerFingerprint
from trainer.preflight.vocabulary import shared_vocabulary
from trainer.result.lineage import lineage_of


def directory_of(model: Any) -> Path | None:
    """Where a loaded model's files are: its directory, or that of the hub's local copy; None when neither is known."""
    name, revision = str(model.config._name_or_path or ""), getattr(model.config, "_commit_hash", None)
    if Path(name).is_dir():
        return Path(name)
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def ancestor_of(cache: TeacherCache, model: Any, tokenizer: Any) -> str | None:
    """The cache's teacher, where the model descends from it; None where it is the teacher, or where no files are
    known: then the KL before the first update decides alone.

    Raises:
        IdentityMismatchError: another vocabulary, or a model whose files say that it is neither.
    """
    if cache.identity.tokenizer.get("vocabulary") != TokenizerFingerprint.of(tokenizer).vocabulary:
        raise IdentityMismatchError(
            f"the tokenizer must have the vocabulary of the cache's teacher, got another than that of {cache.path}; "
            "use the teacher's tokenizer, or build the cache with this model"
        )
    directory = directory_of(model)
    if directory is None:
        return None
    built_by = cache.identity.teacher.get("weights")
    lineage = lineage_of(directory, directory.name)
    found = next((entry for entry in lineage if entry.weights == built_by), None)
    if found is None:
        name = cache.identity.teacher.get("name")
        raise IdentityMismatchError(
            f"the model must be the teacher that built the cache, or descend from it, got {directory} and a cache of "
            f"{name}: {cache.path}; build it with this model, or set allow_different_student to distil on purpose"
        )
    return None if found is lineage[-1] else found.name


def vocabulary_of(cache: TeacherCache, model: Any, tokenizer: Any, *, different_student: bool) -> int:
    """V, as `shared_vocabulary`."""
    num_outputs = int(model.get_output_embeddings().weight.shape[0])
    return shared_vocabulary([cache], num_outputs, tokenizer, different_student=different_student)
