"""Multimodal models as teachers of text: the text model they hold, on either engine."""

import numpy as np
import pytest
import torch
from tiny_wrappers import WRAPPERS, save_tiny_wrapper

from cache_builder import TeacherConfig, VLLMTeacher
from cache_builder.teachers.transformers_teacher import TransformersTeacher
from formats.capture_settings import CaptureSettings
from formats.disk.token_row import TokenRow

CAPTURE = CaptureSettings(positions="all", min_prob=2e-3)


def some_rows() -> list[TokenRow]:
    rng = np.random.default_rng(0)
    return [TokenRow(rng.integers(20, 990, length), np.arange(length) > 0) for length in (5, 40, 100)]


def config_of(model, **settings) -> TeacherConfig:
    return TeacherConfig(model=str(model), dtype="float32", capture=CAPTURE, max_length=128, **settings)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = save_tiny_wrapper(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get


@pytest.mark.parametrize("name", WRAPPERS)
def test_transformers_predicts_what_the_whole_model_predicts(models, name):
    from transformers import AutoModelForImageTextToText

    whole = AutoModelForImageTextToText.from_pretrained(models(name), dtype=torch.float32).eval()
    teacher = TransformersTeacher(config_of(models(name)))
    for row, found in zip(some_rows(), teacher.prefill(some_rows()), strict=True):
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        with torch.inference_mode():
            logprobs = torch.log_softmax(whole(input_ids=ids).logits[0, :-1].double(), -1).numpy()
        assert len(found) == len(row) - 1
        at = np.repeat(np.arange(len(found)), found.counts)
        np.testing.assert_allclose(found.logprobs, logprobs[at, found.token_ids], atol=5e-5)
        assert (np.exp(found.logprobs) >= 1.9e-3).mean() > 0.9
        labels = logprobs[np.arange(len(found)), row.input_ids[1:]]
        np.testing.assert_allclose(found.label_logprobs, labels, atol=5e-5)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize(
    "name", ["gemma3", "mistral3", "qwen2_5_vl", "llama4"]
)  # a CPU has no fp32 kernel for qwen3_5
def test_vllm_agrees(models, name):
    pytest.importorskip(
        "torchvision", reason="vLLM's code for multimodal models imports it", exc_type=Exception
    )
    wanted = list(TransformersTeacher(config_of(models(name))).prefill(some_rows()))
    with VLLMTeacher(config_of(models(name))) as teacher:
        found = list(teacher.prefill(some_rows()))
    for one, other in zip(wanted, found, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
        np.testing.assert_allclose(one.log_tail_nodes, other.log_tail_nodes, atol=2e-4)
