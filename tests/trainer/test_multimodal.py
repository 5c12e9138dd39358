"""Multimodal models, trained on text: what comes out is the same multimodal model with another text model in it, and
a teacher again."""

import contextlib
import io

import numpy as np
import pytest
import torch
from caches import write_cache
from runs import settings
from safetensors.torch import load_file
from tiny_wrappers import WRAPPERS, save_tiny_wrapper

from cache_builder import TeacherConfig
from cache_builder.teachers.transformers_teacher import TransformersTeacher
from formats.capture_settings import CaptureSettings
from formats.disk.token_row import TokenRow
from formats.errors import ConfigError, IdentityMismatchError
from trainer import evaluate, train
from trainer.loading import load_model
from trainer.multimodal import encoders

SLOW = pytest.mark.slow
NAMES = [name if name == "gemma3" else pytest.param(name, marks=SLOW) for name in WRAPPERS]


@pytest.fixture(scope="module", params=NAMES)
def wrapper(request, tmp_path_factory, tiny_tokenizer_dir):
    """(directory of a tiny random model, a cache that it built)."""
    made = save_tiny_wrapper(tmp_path_factory.mktemp(request.param), request.param, tiny_tokenizer_dir)
    cache = tmp_path_factory.mktemp("caches") / request.param
    return made, write_cache(cache, made, num_rows=24, min_prob=1e-3, max_k=128)


@pytest.fixture(scope="module")
def trained(wrapper, tmp_path_factory):
    model, cache = wrapper
    out = tmp_path_factory.mktemp("trained") / "run"
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        report = train(settings(cache, model, out))
    return model, report, said.getvalue(), out


def outside(name: str) -> bool:
    """Whether a stored tensor is of an encoder; some families store the text model as `model.layers`."""
    return any(part in name for part in ("vision", "visual", "multi_modal_projector"))


def test_every_tensor_is_there_and_the_encoders_are_as_they_were(trained):
    initial, report, _, out = trained
    assert report.step0["kl"] < 1e-5
    before, after = (load_file(path / "model.safetensors") for path in (initial, out))
    assert list(before) == list(after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    beside = {name for name in before if outside(name)}
    assert beside and not moved & beside
    still = [name for name in before.keys() - beside - moved if before[name].ndim > 1]
    assert not still, still
    assert (out / "config.json").read_bytes() == (initial / "config.json").read_bytes()


def test_the_user_is_told(trained):
    _, _, said, _ = trained
    (line,) = [line for line in said.splitlines() if "multimodal" in line]
    assert "trained as its text model" in line and "stay as they are" in line


def test_the_result_loads_as_the_whole_model_and_is_a_teacher(trained):
    from transformers import AutoModelForImageTextToText

    initial, _, _, out = trained
    whole = AutoModelForImageTextToText.from_pretrained(out).eval()
    assert type(whole) is type(AutoModelForImageTextToText.from_pretrained(initial))
    capture = CaptureSettings(positions="all", min_prob=2e-3)
    row = TokenRow(np.random.default_rng(0).integers(20, 990, 40), np.arange(40) > 0)
    (found,) = TransformersTeacher(
        TeacherConfig(model=str(out), dtype="float32", capture=capture, max_length=64)
    ).prefill([row])
    with torch.inference_mode():
        logits = whole(input_ids=torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits
    logprobs = torch.log_softmax(logits[0, :-1].double(), -1).numpy()
    at = np.repeat(np.arange(len(found)), found.counts)
    np.testing.assert_allclose(found.logprobs, logprobs[at, found.token_ids], atol=5e-5)


def test_it_is_evaluated_against_its_teacher(trained, wrapper):
    _, _, _, out = trained
    found = evaluate(out, {"own": wrapper[1]})["own"]
    assert 0 < found["kl"] < 1


def test_adapters_are_on_the_text_model_alone(wrapper, tmp_path, capsys):
    model, cache = wrapper
    out = tmp_path / "run"
    # A router of experts takes no adapter; the encoders have projections of these names too.
    named = ["lora.target_modules=['q_proj', 'v_proj']"] if "llama4" in model.name else []
    train(settings(cache, model, out, "lora.r=4", "lora.alpha=8", *named))
    before, after = (load_file(path / "model.safetensors") for path in (model, out))
    assert list(before) == list(after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not [name for name in moved if outside(name) or "embed_tokens" in name]
    assert "multimodal: " in capsys.readouterr().err


def test_nothing_left_to_train_is_refused(wrapper, tmp_path):
    model, cache = wrapper
    with pytest.raises(ConfigError, match="match all of the text model"):
        train(settings(cache, model, tmp_path / "run", "freeze=['language_model', 'lm_head']"))


def test_a_model_of_text_alone_has_no_encoders(tiny_llama_dir):
    assert encoders(load_model(tiny_llama_dir, dtype="float32")) == {}


def test_an_encoder_decoder_is_refused_by_name(tmp_path):
    from transformers import PaliGemmaConfig

    from trainer.multimodal import require_text_model

    class Other:
        config = PaliGemmaConfig()

        def named_parameters(self):
            return iter([("model.decoder.weight", torch.zeros(1))])

    with pytest.raises(ConfigError, match="language_model of a multimodal one, got Other"):
        require_text_model(Other())


def test_packed_rows_do_not_see_each_other(wrapper, tmp_path):
    """The check before the first step packs as training does: a row that saw its neighbour would have a KL there."""
    model, cache = wrapper
    config = settings(cache, model, tmp_path / "run", "packing=true", "training.max_steps=1")
    if "qwen3_5" in model.name:  # its layers with a state need kernels for that, which no CPU has
        with pytest.raises(IdentityMismatchError, match="cannot pack"):
            train(config)
        return
    assert train(config).step0["kl"] < 1e-5
