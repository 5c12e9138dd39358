"""A student reads the token ids of the cache as the teacher wrote them, and padding of either head does not matter."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from caches import random_rows, topk_of, write_cache
from transformers import AutoModelForCausalLM, AutoTokenizer

from formats.cache import TeacherCache
from formats.errors import FormatError, IdentityMismatchError
from formats.identity.fingerprint import ModelFingerprint, TokenizerFingerprint
from formats.writer import CacheWriter
from trainer import evaluate, load_config, train
from trainer.data.padded_teacher import without_padding
from trainer.preflight.vocabulary import first_difference, shared_vocabulary

V, PADDED = 1003, 1024
QUICK = [
    "training.per_device_train_batch_size=8",
    "training.gradient_accumulation_steps=1",
    "training.max_steps=1",
]
QUICK += ["training.learning_rate=1e-3", "training.save_strategy=no", "step0_rows=4"]


def settings(cache, model, out, *overrides: str):
    flags = {"cache": str(cache), "model": str(model), "out": str(out), "allow_different_student": True}
    return load_config(flags=flags, overrides=[*QUICK, *overrides])


@pytest.fixture(scope="module")
def padded_dir(tiny_llama_dir, tmp_path_factory):
    """The tiny Llama with 21 rows of padding on its head, whose logits are far below the others."""
    directory = shutil.copytree(tiny_llama_dir, tmp_path_factory.mktemp("padded") / "model")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    model.resize_token_embeddings(PADDED, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[V:] *= 0.01
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def padded_cache(padded_dir, tmp_path_factory):
    """Lossless: the padding is among the kept tokens, with the little probability that it has."""
    return write_cache(tmp_path_factory.mktemp("cache") / "padded", padded_dir, rows=random_rows(8, V))


def swapped(model_dir, out):
    """A student whose tokenizer gives two ids each other's token."""
    directory = shutil.copytree(model_dir, out)
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    by_id = {number: token for token, number in vocabulary.items()}
    vocabulary[by_id[500]], vocabulary[by_id[501]] = 501, 500
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return directory, by_id[500], by_id[501]


def cache_with_file(path, model_dir, num_rows=4):
    """A cache with the teacher's `tokenizer.json` among its files."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = ModelFingerprint.of(model_dir)
    identity = {
        "teacher": {"weights": model.weights, "config": model.config},
        "tokenizer": vars(TokenizerFingerprint.of(tokenizer)),
    }
    text = (model_dir / "tokenizer.json").read_bytes()
    with CacheWriter(path, identity=identity, vocab_size=V) as writer:
        writer.add_file("tokenizer.json", text)
        for row in random_rows(num_rows, V):
            writer.append(
                row,
                topk_of(
                    np.full((len(row.positions()), V), np.log(1 / V)), max_k=4, label_ids=row.label_ids()
                ),
            )
    return path


def test_another_mapping_is_refused_by_the_first_token_that_differs(tiny_llama_dir, tmp_path):
    cache = cache_with_file(tmp_path / "cache", tiny_llama_dir)
    student, first, second = swapped(tiny_llama_dir, tmp_path / "student")
    with pytest.raises(IdentityMismatchError) as error:
        train(settings(cache, student, tmp_path / "run"))
    message = str(error.value)
    assert (
        f"id 500 is {first!r} in " in message
        and f"and {second!r} in --model" in message
        and "\n" not in message
    )
    assert not (tmp_path / "run").exists()


def test_another_mapping_is_refused_without_the_file_too(tiny_llama_dir, pruned_cache, tmp_path):
    student, *_ = swapped(tiny_llama_dir, tmp_path / "student")
    with pytest.raises(IdentityMismatchError, match="not the one recorded in"):
        train(settings(pruned_cache, student, tmp_path / "run"))


def test_the_first_difference():
    a = {"x": 0, "y": 1, "z": 2}
    assert first_difference(a, dict(a)) == (None, "", "")
    assert first_difference(a, {"x": 0, "y": 1}) == (2, "'z'", "no token")
    assert first_difference(a, {"x": 0, "q": 1, "z": 2, "n": 3}) == (1, "'y'", "'q'")


def test_a_student_of_the_same_vocabulary_is_distilled(tiny_qwen3_dir, pruned_cache, tmp_path):
    report = train(settings(pruned_cache, tiny_qwen3_dir, tmp_path / "run"))
    assert report.step0["different_student"] and report.step0["kl"] > 0.1


def test_a_padded_teacher_is_that_teacher_without_its_padding(
    tiny_llama_dir, padded_dir, padded_cache, tmp_path
):
    """The student is the teacher without padding: KL is 0, in float32's noise, and evaluation agrees."""
    out = tmp_path / "run"
    report = train(settings(padded_cache, tiny_llama_dir, out, f"eval_caches.held={padded_cache}"))
    assert abs(report.step0["kl"]) < 1e-6
    found = evaluate(out, {"held": padded_cache})["held"]
    assert found["kl"] == pytest.approx(report.evaluation["held"]["kl"], rel=1e-4)


def test_a_padded_student_learns_from_a_teacher_without_padding(padded_dir, llama_cache, tmp_path):
    report = train(settings(llama_cache, padded_dir, tmp_path / "run"))
    assert abs(report.step0["kl"]) < 1e-6


def test_the_padding_of_the_teacher_itself_changes_nothing(padded_dir, padded_cache, tmp_path):
    config = replace(settings(padded_cache, padded_dir, tmp_path / "run"), allow_different_student=False)
    assert abs(train(config).step0["kl"]) < 1e-6


def test_a_head_that_does_not_cover_its_tokenizer_is_refused(tiny_llama_dir, padded_cache, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    caches = [TeacherCache(padded_cache)]
    assert shared_vocabulary(caches, V, tokenizer, different_student=True) == V
    assert shared_vocabulary(caches, PADDED, tokenizer, different_student=False) == PADDED
    assert shared_vocabulary(caches, 2048, tokenizer, different_student=True) == PADDED
    with pytest.raises(IdentityMismatchError, match="got 900 outputs for 1003 tokens"):
        shared_vocabulary(caches, 900, tokenizer, different_student=True)
    with pytest.raises(IdentityMismatchError, match="got 1024 tokens and a model of 1003"):
        shared_vocabulary(caches, V, tokenizer, different_student=False)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_without_padding_is_the_conditional_distribution(temperature):
    """Against numpy in float64: drop the last tokens, divide by what is left; kept, tail and draws."""
    rng = np.random.default_rng(3)
    size, padding, count = 40, 6, 5
    logits = rng.normal(size=(count, size)) * 2
    logits[:, -padding:] -= 12
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    topk = topk_of(logprobs, 0.0, 38, 4)  # 38 of 40: the tail is the two least likely
    found = without_padding(topk, size - padding)
    real = logprobs[:, :-padding] - np.log(np.exp(logprobs[:, :-padding]).sum(1, keepdims=True))
    assert found.vocab_size == size - padding and found.draws.token_ids.max(initial=0) < size - padding
    for p in range(count):
        a, b = found.offsets[p : p + 2]
        ids = found.token_ids[a:b]
        assert set(ids) == set(range(size - padding)) & set(
            topk.token_ids[topk.offsets[p] : topk.offsets[p + 1]]
        )
        np.testing.assert_allclose(found.logprobs[a:b], real[p, ids], atol=1e-5)
    lost = np.exp(logprobs[:, -padding:]).sum(1)
    shift = -np.log1p(-lost)[:, None] * (1 / temperature)
    kept = [
        np.isin(np.arange(size), topk.token_ids[topk.offsets[p] : topk.offsets[p + 1]]) for p in range(count)
    ]
    for p in range(count):
        tail = np.log(np.exp(logprobs[p, ~kept[p]] / temperature).sum())
        assert found.log_tail(temperature)[p] == pytest.approx(tail + shift[p, 0], abs=2e-2)


def test_padding_with_a_probability_is_no_padding():
    logprobs = np.log(np.full((1, 10), 0.1))
    with pytest.raises(FormatError, match=r"must be padding, got probability 0.2"):
        without_padding(topk_of(logprobs, 0.0, 10, 0), 8)


def test_nothing_changes_for_a_vocabulary_of_one_size():
    topk = topk_of(np.log(np.full((2, 10), 0.1)), 0.0, 10, 0)
    assert without_padding(topk, None) is topk and without_padding(topk, 10) is topk


def test_a_row_beyond_the_student_is_named(tiny_llama_dir, padded_dir, tmp_path):
    """Token ids that no tokenizer wrote, such as those of a corpus that brought its own."""
    from trainer.data.dataset import CachedDataset

    rows = random_rows(2, V)
    rows[1].input_ids[3] = V + 2
    dataset = CachedDataset(write_cache(tmp_path / "c", padded_dir, rows=rows))
    dataset.vocab_size = V
    assert len(dataset[0]["input_ids"])
    with pytest.raises(FormatError, match=r"row 1 of .* has token id 1005, beyond the student's 1003"):
        dataset[1]
