"""Builds of a real model with tail moments: from the checkpoint to the stored numbers, and without them."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from deterministic_build import Stop, contents, stop_at
from teacher_agreement import dense_logprobs, dense_moments
from tiny_models import VOCAB_SIZE

from cache_builder import BuildConfig, build_cache, estimate_cache, plan_build
from cache_builder.config import DEFAULT_TAIL_FEATURES
from cache_builder.reduction.features import find_embedding, token_features
from cache_builder.source import _tail_features
from cache_builder.teachers.protocol import TeacherConfig, TeacherError, make_teacher
from formats.cache import TeacherCache
from formats.errors import ConfigError


@pytest.fixture(scope="module")
def config(default_config: BuildConfig) -> BuildConfig:
    return default_config


@pytest.fixture(scope="module")
def cache(default_cache: TeacherCache) -> TeacherCache:
    return default_cache


def manifest_of(cache: TeacherCache) -> dict:
    return json.loads((Path(cache.path) / "manifest.json").read_text())


def test_the_cache_says_what_its_moments_are_moments_of(cache: TeacherCache, tiny_llama_dir: Path) -> None:
    cache.validate(full=True)
    manifest = manifest_of(cache)
    assert manifest["version"] == 3 and "token_features.bin" in manifest["files"]
    assert manifest["codec"]["num_features"] == DEFAULT_TAIL_FEATURES == 16
    embedding = find_embedding(tiny_llama_dir, VOCAB_SIZE)
    assert embedding is not None and embedding.name == "lm_head.weight"
    assert cache.features == token_features(embedding, VOCAB_SIZE, 16)


def test_stored_moments_are_those_of_the_teacher(cache: TeacherCache, tiny_llama_dir: Path) -> None:
    """Half a step of the codec and nothing else, whether the engine computes them again or a dense sum."""
    from transformers import AutoModelForCausalLM

    assert cache.features is not None
    settings = TeacherConfig(
        model=str(tiny_llama_dir),
        min_prob=cache.manifest.min_prob,
        max_k=cache.manifest.max_k,
        features=str(Path(cache.path) / "token_features.bin"),
        max_length=64,
    )
    teacher = make_teacher("transformers", settings)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    rows = list(cache.rows())
    half_a_step = 0.5 / cache.manifest.codec.moment_steps
    largest = 0.0
    for row, again in zip(rows, teacher.prefill([row.tokens for row in rows]), strict=True):
        stored = row.teacher.tail_moments
        np.testing.assert_allclose(stored, again.tail_moments, atol=half_a_step + 1e-6, rtol=0)
        dense = dense_moments(row.teacher, dense_logprobs(model, row.tokens, row.positions), cache.features)
        np.testing.assert_allclose(stored, dense, atol=half_a_step + 1e-5, rtol=0)
        largest = max(largest, float(np.abs(dense).max()))
    teacher.close()
    assert largest > 10 * half_a_step, "too small to be told from nothing"


def test_as_many_features_as_asked_for(config: BuildConfig, cache: TeacherCache, tmp_path: Path) -> None:
    build_cache(replace(config, out=str(tmp_path / "c"), tail_features=3))
    fewer = TeacherCache(tmp_path / "c")
    assert cache.features is not None and fewer.features is not None
    assert fewer.manifest.codec.num_features == fewer[0].teacher.num_features == 3
    assert fewer.features.codes.shape == (VOCAB_SIZE, 3)


def test_neither_features_nor_draws_is_a_cache_of_version_1(
    config: BuildConfig, cache: TeacherCache, tmp_path: Path
) -> None:
    build_cache(replace(config, out=str(tmp_path / "c"), tail_features=0, tail_draws=0))
    plain = TeacherCache(tmp_path / "c")
    manifest = manifest_of(plain)
    assert manifest["version"] == 1 and list(manifest["files"]) == ["tokenizer.json"]
    assert not {"num_features", "moment_steps", "draw_rate", "draw_steps"} & set(manifest["codec"])
    assert not (tmp_path / "c" / "token_features.bin").exists() and plain.features is None
    for one, other in zip(plain.rows(), cache.rows(), strict=True):
        assert one.key == other.key and one.teacher.num_features == 0
        np.testing.assert_array_equal(one.teacher.token_ids, other.teacher.token_ids)
        np.testing.assert_array_equal(one.teacher.log_tail_nodes, other.teacher.log_tail_nodes)


@pytest.mark.parametrize("name", ["features", "planned", "committed 0", "tokenizer"])
def test_a_stopped_build_ends_with_the_same_bytes(
    config: BuildConfig, cache: TeacherCache, tmp_path: Path, name: str
) -> None:
    unfinished = replace(config, out=str(tmp_path / "c"))
    with pytest.raises(Stop):
        build_cache(unfinished, step=stop_at(name))
    assert build_cache(unfinished).complete
    assert contents(tmp_path / "c") == contents(Path(cache.path))


@pytest.mark.parametrize(
    ("asked", "words"),
    [(3, "--tail-features: 16 there, 3 now"), (0, "--tail-features: 16 there, 0 now")],
)
def test_another_number_into_the_same_directory_is_refused(
    config: BuildConfig, cache: TeacherCache, tmp_path: Path, asked: int, words: str
) -> None:
    unfinished = replace(config, out=str(tmp_path / "c"))
    with pytest.raises(Stop):
        build_cache(unfinished, step=stop_at("committed 0"))
    for held in (unfinished, config):
        before = contents(Path(held.out))
        with pytest.raises(ConfigError) as caught:
            build_cache(replace(held, tail_features=asked))
        assert words in str(caught.value) and "--overwrite" in str(caught.value)
        assert "\n" not in str(caught.value) and contents(Path(held.out)) == before
    assert build_cache(replace(config, tail_features=16)).was_complete, "16 is what the default was"


def test_overwrite_removes_the_features_of_the_old_cache(
    config: BuildConfig, cache: TeacherCache, tmp_path: Path
) -> None:
    shutil.copytree(cache.path, tmp_path / "c")
    build_cache(replace(config, out=str(tmp_path / "c"), tail_features=0, overwrite=True))
    build_cache(replace(config, out=str(tmp_path / "fresh"), tail_features=0))
    assert contents(tmp_path / "c") == contents(tmp_path / "fresh")


@pytest.fixture(scope="module")
def pickled(tiny_llama_dir: Path, tmp_path_factory) -> Path:
    """The same model as people saved it before safetensors."""
    from safetensors.torch import load_file

    directory = tmp_path_factory.mktemp("pickled") / "model"
    shutil.copytree(tiny_llama_dir, directory)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return directory


def test_a_checkpoint_without_a_readable_embedding_gives_none(
    config: BuildConfig, pickled: Path, tmp_path: Path
) -> None:
    build_cache(replace(config, model=str(pickled), out=str(tmp_path / "c")))
    found = TeacherCache(tmp_path / "c")
    assert manifest_of(found)["codec"]["num_features"] == 0 and found.features is None


def test_features_asked_for_in_vain_are_one_line(config: BuildConfig, pickled: Path, tmp_path: Path) -> None:
    asked = replace(config, model=str(pickled), out=str(tmp_path / "c"), tail_features=16)
    for command in (build_cache, plan_build, estimate_cache):
        with pytest.raises(
            ConfigError, match=r"output embedding in safetensors.*--tail-features 0"
        ) as caught:
            command(asked)
        assert "\n" not in str(caught.value) and not (tmp_path / "c").exists()


def test_an_embedding_with_nan_is_one_line_and_leaves_nothing(
    config: BuildConfig, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(tiny_llama_dir, model)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][5, 5] = np.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    damaged = replace(config, model=str(model), out=str(tmp_path / "c"))
    with pytest.raises(ConfigError, match=r"NaN or infinity in lm_head\.weight") as caught:
        build_cache(damaged)
    assert "\n" not in str(caught.value) and not (tmp_path / "c").exists()
    with pytest.raises(TeacherError, match="got NaN in row 0"):
        build_cache(replace(damaged, tail_features=0))


def test_a_dry_run_counts_the_moments_and_computes_no_features(
    config: BuildConfig, tmp_path: Path, monkeypatch
) -> None:
    from cache_builder import source

    def never(*args):
        raise AssertionError("the features were computed")

    monkeypatch.setattr(source, "token_features", never)
    planned = [
        plan_build(replace(config, out=str(tmp_path / "c"), tail_features=number)) for number in (0, 16)
    ]
    assert not (tmp_path / "c").exists()
    assert planned[1].estimated_bytes == pytest.approx(
        planned[0].estimated_bytes + 8 * planned[0].num_positions, abs=1
    )


def test_an_estimate_of_a_real_model(config: BuildConfig, cache: TeacherCache, tmp_path: Path) -> None:
    """The table's line at the settings of the build weighs what the build's moments weigh."""
    before = sorted(os.listdir(config.out))
    reports = [
        estimate_cache(replace(config, tail_features=number), rows=100, min_probs=(config.min_prob,))
        for number in (0, None)
    ]
    (plain,), (line,) = (report.estimates for report in reports)
    per_position = (line.total_bytes - plain.total_bytes) / reports[0].num_positions
    assert 4 < per_position < 2 * 16, "between a few bits and two bytes for each of 16 moments"
    assert (line.missed_mean, line.entries_per_position) == (plain.missed_mean, plain.entries_per_position)
    built = sum(shard.num_bytes for shard in cache.manifest.shards)
    assert line.total_bytes < built, "one shard instead of three has one header"
    assert sorted(os.listdir(config.out)) == before


def test_a_configuration_that_leaves_out_its_vocabulary(config: BuildConfig, tmp_path: Path) -> None:
    """Gemma 3 is published so: what equals the default of its class is not in the file."""
    from safetensors.torch import save_file

    text_config = {"model_type": "gemma3_text", "hidden_size": 2, "num_attention_heads": 2}
    content = {"model_type": "gemma3", "text_config": text_config}
    (tmp_path / "config.json").write_text(json.dumps(content))
    weight = torch.zeros(262208, 2, dtype=torch.float16)
    save_file({"language_model.model.embed_tokens.weight": weight}, tmp_path / "model.safetensors")
    embedding, num_features, vocab_size = _tail_features(config, tmp_path)
    assert embedding is not None and (num_features, vocab_size) == (16, 262208)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "not a known one"}))
    assert _tail_features(config, tmp_path) == (None, 0, 0)
    with pytest.raises(ConfigError, match="--tail-features 0"):
        _tail_features(replace(config, tail_features=4), tmp_path)
