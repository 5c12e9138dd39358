"""Fingerprints of a model directory and of a tokenizer: any change that matters changes them, a move does
not.

Model: one SHA-256 over the digests of all tensors (see safetensors_hash.py), one over config.json without the
keys that describe a session rather than a model.  Tokenizer: separate hashes for the vocabulary, the text
pipeline (normaliser, pre-tokeniser, merges, post-processor), the special tokens and the chat template, so
that a mismatch can say which part differs.

Needs neither torch nor transformers; a tokenizer is anything that offers `get_vocab()`.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.errors import ConfigError, one_line
from formats.identity.config_file import read_config
from formats.identity.hash_memo import remembered
from formats.identity.tensor_hash import hash_span, hash_tensors

VOLATILE_CONFIG_KEYS = frozenset(
    {"transformers_version", "_name_or_path", "_commit_hash", "torch_dtype", "dtype", "use_cache"}
    | {"_attn_implementation", "_attn_implementation_autoset", "_experts_implementation", "output_attentions"}
    | {"output_hidden_states", "return_dict", "_diffusers_version"}
)
"""Keys that differ between two saves of the same model; the dtype of the weights is part of their digests."""

PROBE_TEXTS = (
    "Hello, world! 12345",
    "  two  spaces\n\ttab",
    "naïve café – ß Ω 日本語 🙂",
    "def f(x): return x**2",
)
"""Only for tokenizers without a serialisable pipeline: what they make of these texts stands for it."""


def sha256_json(value: Any) -> str:
    """SHA-256 of the canonical JSON text of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def resolve_model(name_or_path: str | Path, revision: str | None = None, *, what: str = "--model") -> Path:
    """The local directory of a model: the path itself, or a snapshot of a Hugging Face Hub repository.

    Args:
        what: how it was given, for messages.

    Raises:
        ConfigError: there is no such directory, a revision of one, or the Hub could not be asked.
    """
    refuse_idle_revision(name_or_path, revision, what=what)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    name = str(name_or_path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise ConfigError(f"{what} must be a model directory or a Hugging Face name, got {name!r}")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:
        of = name if revision is None else f"{name} at revision {revision}"
        raise ConfigError(
            f"{what} must be a model directory or a Hugging Face name, got {of}: no directory here, "
            f"{_why_not_fetched(error)}"
        ) from None


def refuse_idle_revision(name_or_path: str | Path, revision: str | None, *, what: str = "--model") -> None:
    """Refuse a revision that a person gave of a directory, where it would say nothing.

    Args:
        what: how the model was given, for messages.

    Raises:
        ConfigError: there is a directory of that name, and a revision.
    """
    if revision is not None and Path(name_or_path).expanduser().is_dir():
        raise ConfigError(
            f"a revision is one of a Hugging Face name, got {revision} of the directory {name_or_path} ({what}); "
            "remove it, or name the model as the Hub does"
        )


def _why_not_fetched(error: Exception) -> str:
    """What became of a model that `snapshot_download` did not get, and what to do, on one line."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.HFValidationError):
        return "no name of the Hub, which has the form OWNER/MODEL; correct it"
    if isinstance(error, errors.LocalEntryNotFoundError):
        part = "only a part of it was" if isinstance(error, errors.IncompleteSnapshotError) else "not"
        if constants.HF_HUB_OFFLINE:
            switch = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
            return (
                f"{part} fetched before, while {switch} forbids to fetch; correct the name, or unset {switch}"
            )
        return (
            f"{part} fetched before, while the Hub cannot be reached; correct the name, or mend the network"
        )
    if isinstance(error, errors.GatedRepoError):
        return "the Hub gives it to those only who accepted its terms; do so on its page, then hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the Hub has none of that name, or only for its members; correct it, or hf auth login"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the Hub has no such revision of it; correct the revision"
    return f"it could not be fetched: {one_line(error)}"


def weight_files(model_dir: Path) -> list[Path]:
    """The files that an engine would load: those of the index, else the single file, else all of one kind.

    Raises:
        ConfigError: there are none, the index is torn, or one that it names is missing.
    """
    for pattern, single in (("*.safetensors", "model.safetensors"), ("*.bin", "pytorch_model.bin")):
        index = model_dir / f"{single}.index.json"
        if index.is_file():
            try:
                content = json.loads(index.read_text(encoding="utf-8"))
                names = sorted(set(content["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ConfigError(f"{index} must be a JSON index with a weight_map; copy it again") from None
            missing = [name for name in names if not (model_dir / name).is_file()]
            if missing:
                raise ConfigError(f"{index} names {missing[0]}, which is missing; complete the download")
            return [model_dir / name for name in names]
        if (model_dir / single).is_file():
            return [model_dir / single]
        found = sorted(model_dir.glob(pattern if single.startswith("model") else "pytorch_model*.bin"))
        if found:
            return found
    raise ConfigError(f"a model directory holds *.safetensors or pytorch_model*.bin, got none in {model_dir}")


def stable_config(config: Any) -> Any:
    """`config` without volatile keys and without keys that are null, at every depth."""
    if isinstance(config, Mapping):
        return {
            key: stable_config(value)
            for key, value in config.items()
            if key not in VOLATILE_CONFIG_KEYS and value is not None
        }
    if isinstance(config, list):
        return [stable_config(value) for value in config]
    return config


@dataclass(frozen=True)
class ModelFingerprint:
    """What makes a model this model."""

    weights: str
    """SHA-256 over (name, digest) of all tensors; over (name, digest) of the files for pytorch_model*.bin."""
    config: str
    """SHA-256 of config.json without volatile keys."""
    architecture: str
    """First entry of `architectures`, or the model type."""
    vocab_size: int
    """Rows of the output head according to the configuration."""

    @classmethod
    def of(cls, model_dir: str | Path) -> "ModelFingerprint":
        """Read the fingerprint of a directory as `save_pretrained` leaves it.

        Raises:
            ConfigError: there is no usable config.json, or no weights.
            FormatError: a weight file is torn.
        """
        model_dir = Path(model_dir)
        config = read_config(model_dir)
        files = weight_files(model_dir)
        if files[0].suffix == ".safetensors":
            digests = remembered(files, lambda: hash_tensors(files))
        else:
            digests = remembered(
                files, lambda: {f.name: hash_span(f, 0, f.stat().st_size).hex() for f in files}
            )
        text_config = config.get("text_config") or {}
        return cls(
            weights=sha256_json(sorted(digests.items())),
            config=sha256_json(stable_config(config)),
            architecture=str((config.get("architectures") or [config.get("model_type", "unknown")])[0]),
            vocab_size=int(config.get("vocab_size") or text_config.get("vocab_size") or 0),
        )


@dataclass(frozen=True)
class TokenizerFingerprint:
    """What turns text into these token ids."""

    vocabulary: str
    """SHA-256 of the (token, id) pairs, added tokens included."""
    pipeline: str
    """SHA-256 of normaliser, pre-tokeniser, model and post-processor, without truncation and padding."""
    special_tokens: str
    """SHA-256 of the named special tokens (bos, eos, pad, ...)."""
    chat_template: str
    """SHA-256 of the template text; empty without one."""
    vocab_size: int
    """Number of tokens."""

    @classmethod
    def of(cls, tokenizer: Any) -> "TokenizerFingerprint":
        """Fingerprint of a loaded `transformers` tokenizer, or of a `tokenizers.Tokenizer`."""
        vocabulary = tokenizer.get_vocab()
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if hasattr(backend, "to_str"):
            pipeline = json.loads(backend.to_str())
            pipeline.pop("truncation", None)
            pipeline.pop("padding", None)
        else:
            pipeline = [type(tokenizer).__name__, [list(tokenizer.encode(text)) for text in PROBE_TEXTS]]
        special = {
            name: str(token) for name, token in dict(getattr(tokenizer, "special_tokens_map", {})).items()
        }
        return cls(
            vocabulary=sha256_json(sorted(vocabulary.items())),
            pipeline=sha256_json(pipeline),
            special_tokens=sha256_json(special),
            chat_template=hash_template(getattr(tokenizer, "chat_template", None)),
            vocab_size=len(vocabulary),
        )


def hash_template(template: str | Mapping[str, str] | None) -> str:
    """Hash of a chat template, or of several named ones; empty for none."""
    return sha256_json(template) if template else ""


def tokenizer_files_fingerprint(model_dir: Path) -> dict[str, str]:
    """What can be said of a tokenizer from its files alone: `vocabulary` and `chat_template`.

    The pipeline cannot: `transformers` may rebuild it when it loads. Keys that cannot be told are left out.

    Raises:
        ConfigError: one of the files is damaged.
    """
    found: dict[str, str] = {}
    if (path := model_dir / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        try:
            vocabulary = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
        except Exception as error:  # tokenizers has no class of its own for it
            raise ConfigError(
                f"a model's tokenizer.json must hold a tokenizer, got {path}: {one_line(error)}"
            ) from None
        found["vocabulary"] = sha256_json(sorted(vocabulary.items()))
    has_settings = (model_dir / "tokenizer_config.json").is_file()
    settings = read_config(model_dir, name="tokenizer_config.json") if has_settings else {}
    template = settings.get("chat_template")
    if isinstance(template, list):
        try:
            template = {entry["name"]: entry["template"] for entry in template}
        except (KeyError, TypeError):
            raise ConfigError(
                "a list of chat templates must be objects with name and template, got others in "
                f"{model_dir / 'tokenizer_config.json'}"
            ) from None
    if (model_dir / "chat_template.jinja").is_file():
        template = (model_dir / "chat_template.jinja").read_text(encoding="utf-8")
    if has_settings and not (model_dir / "additional_chat_templates").is_dir():
        found["chat_template"] = hash_template(template)
    return found
