"""Builds of real files with a real model: identity, refusals, bad input, one clear line each."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from cache_builder import BuildConfig, build_cache, plan_build
from cache_builder.build import start_engine
from cache_builder.source import engine_version, open_source, tokenizer_file
from formats.cache import TeacherCache
from formats.errors import AnnealError, ConfigError, CorpusError
from formats.identity.teacher_identity import require_same_teacher


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    from tiny_models import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus") / "text.jsonl")


@pytest.fixture
def config(corpus: Path, tiny_llama_dir: Path, tmp_path: Path) -> BuildConfig:
    return BuildConfig(
        corpus=str(corpus),
        model=str(tiny_llama_dir),
        out=str(tmp_path / "cache"),
        engine="transformers",
        max_length=64,
        min_prob=1e-3,
        rows_per_shard=4,
    )


def changed(config: BuildConfig, **values) -> BuildConfig:
    from dataclasses import replace

    return replace(config, **values)


class Stop(Exception):
    pass


def stop_after_first_shard(name: str) -> None:
    if name == "committed 0":
        raise Stop


@pytest.fixture
def unfinished(config: BuildConfig) -> BuildConfig:
    with pytest.raises(Stop):
        build_cache(config, step=stop_after_first_shard)
    return config


def test_the_whole_path(config: BuildConfig, tiny_llama_dir: Path, tiny_tokenizer) -> None:
    planned = plan_build(config)
    report = build_cache(config)
    cache = TeacherCache(config.out)
    cache.validate(full=True)
    assert (report.num_rows, report.num_tokens) == (planned.num_rows, planned.num_tokens)
    assert {k: v for k, v in planned.identity.teacher.items() if k in cache.identity.teacher} == dict(
        planned.identity.teacher
    )
    assert cache.identity.teacher["dtype"] == "float32"
    assert cache.identity.preprocessing["max_length"] == 64
    parts = require_same_teacher(cache.identity, tiny_llama_dir, tiny_tokenizer, max_length=64)
    assert len(parts) == 8
    from tokenizers import Tokenizer

    text = Tokenizer.from_str(cache.file("tokenizer.json").decode()).decode(cache[0].input_ids.tolist())
    assert text.startswith("# Author")


def test_resuming_ends_with_the_same_bytes(unfinished: BuildConfig, tmp_path: Path) -> None:
    from deterministic_build import contents

    report = build_cache(unfinished)
    fresh = changed(unfinished, out=str(tmp_path / "fresh"))
    build_cache(fresh)
    assert report.num_rows_captured < report.num_rows
    assert contents(Path(unfinished.out)) == contents(Path(fresh.out))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_length": 63}, "--max-length: 64 there, 63 now"),
        ({"min_prob": 0.01}, "--min-prob: 0.001 there, 0.01 now"),
        ({"max_k": 5}, "--max-k: 128 there, 5 now"),
        ({"draw_rate": 9}, "--tail-draws: 8 there, 9 now"),
        ({"positions": "loss"}, "--positions: all there, loss now"),
        ({"limit": 9}, "--limit: none there, 9 now"),
        ({"dtype": "bfloat16"}, "--dtype: auto there, bfloat16 now"),
        ({"engine": "vllm"}, "--engine: transformers there, vllm now"),
        ({"engine_args": {"attn_implementation": "eager"}}, "--engine-arg"),
        ({"text_column": "text"}, "--text-column: none there, text now"),
        ({"rows_per_shard": 5}, "rows_per_shard: 4 there, 5 now"),
    ],
)
def test_each_setting_of_another_command_is_named(unfinished: BuildConfig, change: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_cache(changed(unfinished, **change))
    assert words in str(caught.value) and "--overwrite" in str(caught.value)


def test_another_model_tokenizer_or_corpus_is_named(
    unfinished: BuildConfig, corpus: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(tiny_llama_dir, model)
    assert not open_source(unfinished).settings.differences(
        open_source(changed(unfinished, model=str(model))).settings
    ), "a copy is the same model"
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][3, 3] += np.float32(0.5)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="model weights"):
        build_cache(changed(unfinished, model=str(model)))

    template = tmp_path / "template"
    shutil.copytree(tiny_llama_dir, template)
    (template / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ConfigError, match="chat_template"):
        build_cache(changed(unfinished, model=str(template)))

    moved = tmp_path / "elsewhere.jsonl"
    shutil.copy(corpus, moved)
    other = changed(unfinished, corpus=str(moved))
    assert not open_source(unfinished).settings.differences(open_source(other).settings)
    with open(moved, "a") as file:
        file.write('{"text": "one more document"}\n')
    with pytest.raises(ConfigError, match="corpus contents"):
        build_cache(other)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"corpus": "/nowhere/x.jsonl"}, CorpusError, "/nowhere/x.jsonl"),
        ({"model": "/nowhere/model"}, ConfigError, "/nowhere/model"),
        ({"max_length": 4096}, ConfigError, "at most 1024"),
        ({"text_column": "body"}, AnnealError, "body"),
        ({"engine_args": {"nonsense": "1"}}, ConfigError, "nonsense"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    config: BuildConfig, change: dict, error, words: str
) -> None:
    with pytest.raises(error) as caught:
        build_cache(changed(config, **change))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not Path(config.out).exists()


@pytest.mark.parametrize("content", ["", '{"a": 1}\n', '{"text": ""}\n{"text": ""}\n', "not json\n"])
def test_a_corpus_without_rows_is_one_line_and_leaves_nothing(
    config: BuildConfig, tmp_path: Path, content: str
) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    for command in (build_cache, plan_build):
        with pytest.raises(CorpusError) as caught:
            command(changed(config, corpus=str(tmp_path / "bad.jsonl")))
        assert "\n" not in str(caught.value) and not Path(config.out).exists()


def test_a_corpus_that_breaks_in_the_middle_leaves_nothing(config: BuildConfig, tmp_path: Path) -> None:
    lines = ['{"text": "a fine document of some words"}'] * 2000 + ["{broken"]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    with pytest.raises(CorpusError, match="line 2001"):
        build_cache(changed(config, corpus=str(tmp_path / "bad.jsonl")))
    assert not Path(config.out).exists()


def test_a_model_without_tokenizer_weights_or_config(
    config: BuildConfig, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    for missing, words in (
        ("tokenizer.json", "tokenizer"),
        ("model.safetensors", "got none"),
        ("config.json", r"config\.json"),
    ):
        model = tmp_path / missing
        shutil.copytree(tiny_llama_dir, model)
        (model / missing).unlink()
        with pytest.raises(ConfigError, match=words):
            build_cache(changed(config, model=str(model)))
        assert not Path(config.out).exists()


def test_a_dry_run_starts_no_engine(config: BuildConfig, monkeypatch) -> None:
    from cache_builder import build as build_module

    def never(*args):
        raise AssertionError("the engine was started")

    monkeypatch.setattr(build_module, "start_engine", never)
    report = plan_build(config)
    assert not Path(config.out).exists()
    text = report.text()
    for word in ("rows", "tokens", "positions", "shards", "teacher.weights", "corpus.fingerprint", "⟦"):
        assert word in text
    assert callable(start_engine)


def test_the_tokenizer_file_carries_no_state(tiny_tokenizer) -> None:
    before = tokenizer_file(tiny_tokenizer)
    tiny_tokenizer("text", truncation=True, max_length=2, padding="max_length")
    assert tokenizer_file(tiny_tokenizer) == before
    assert tokenizer_file(object()) is None


def test_engine_versions_are_told_without_an_import() -> None:
    from importlib.metadata import version

    assert engine_version("transformers") == version("transformers")
    assert engine_version("no such package") == "not installed"


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_resumes_with_the_same_bytes(config: BuildConfig, tmp_path: Path) -> None:
    """Every shard is one unit for the engine, so what came before it leaves no trace in its numbers."""
    from deterministic_build import contents

    arguments = {"enforce_eager": True, "max_num_batched_tokens": 96, "max_num_seqs": 4}
    first = changed(config, engine="vllm", engine_args=arguments)
    with pytest.raises(Stop):
        build_cache(first, step=stop_after_first_shard)
    assert build_cache(first).complete
    fresh = changed(first, out=str(tmp_path / "fresh"))
    build_cache(fresh)
    assert contents(Path(first.out)) == contents(Path(fresh.out))


def test_a_revision_of_a_directory_is_refused(config: BuildConfig) -> None:
    with pytest.raises(
        ConfigError, match="a revision is one of a Hugging Face name, got v1 of the directory"
    ):
        build_cache(changed(config, revision="v1"))
    assert not Path(config.out).exists()
