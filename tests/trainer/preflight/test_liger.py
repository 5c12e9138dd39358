"""Liger's kernels for norms, rotary positions and MLPs, and none of its losses.

The package is run for real where it is installed: its Triton kernels on the GPU, or in Triton's interpreter
(TRITON_INTERPRET=1, set before triton is imported) on a CPU. The configuration is tested without.
"""

import os
import sys
import types

import pytest

from formats.errors import ConfigError
from trainer.preflight.liger import liger_config


def applier(
    rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None
):
    """The signature of Liger's function for Llama models, as of 0.8."""


@pytest.fixture
def liger(monkeypatch):
    """A package of Liger's names that holds one function's signature; nothing in it is called."""
    patch = types.ModuleType("liger_kernel.transformers.monkey_patch")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": applier}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patch)


def test_the_loss_kernels_are_off_and_the_others_are_what_was_asked_for(liger):
    off = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert liger_config(None, "llama", "cuda") == off
    assert liger_config({"rope": False, "rms_norm": True}, "llama", "cuda") == {
        **off,
        "rope": False,
        "rms_norm": True,
    }
    assert liger_config(off, "llama", "cuda") == off


@pytest.mark.parametrize(
    ("given", "model_type", "device", "message"),
    [
        (None, "llama", "cpu", "needs a GPU for its Triton kernels"),
        (None, "phoenix", "cuda", "Liger has no kernels for phoenix models"),
        ({"geglu": True}, "llama", "cuda", "Liger has rms_norm, rope, swiglu for llama models; got geglu"),
        ({"cross_entropy": True}, "llama", "cuda", "cross_entropy must be false, got true"),
        ({"fused_linear_cross_entropy": True}, "llama", "cuda", "the loss is fused already"),
    ],
)
def test_what_liger_would_ignore_or_break_is_refused(liger, monkeypatch, given, model_type, device, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=message):
        liger_config(given, model_type, device)


def test_without_the_package_it_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    with pytest.raises(ConfigError, match="needs liger-kernel"):
        liger_config(None, "llama", "cuda")


def _train(model: str, cache: str, out: str, sites: list[str]) -> None:
    """One run with Liger and one without, in Triton's interpreter; prints both losses per step."""
    import json

    sys.path[:0] = sites
    from trainer import load_config, train

    quick = [
        "training.per_device_train_batch_size=4",
        "training.gradient_accumulation_steps=1",
        "training.max_steps=2",
    ]
    quick += [
        "training.learning_rate=1e-3",
        "training.logging_steps=1",
        "training.save_strategy=no",
        "step0_rows=2",
    ]
    found = []
    for name in ("plain", "liger"):
        more = ["training.use_liger_kernel=true"] if name == "liger" else []
        flags = {"cache": cache, "model": model, "out": f"{out}/{name}"}
        report = train(load_config(flags=flags, overrides=[*quick, *more]))
        found.append([(e["loss"], e["ce"], e["kl"], e["grad_norm"]) for e in report.log_history if "ce" in e])
    import transformers.models.llama.modeling_llama as llama

    print(json.dumps({"losses": found, "patched": llama.apply_rotary_pos_emb.__module__}))


@pytest.mark.slow
def test_training_with_ligers_kernels_gives_the_same_losses_and_gradients(
    tiny_llama_dir, pruned_cache, tmp_path
):
    """Step 0 runs through the kernels as well, so KL(initial || model) vouches for them before the first update."""
    import json

    from processes import start

    pytest.importorskip("triton")
    pytest.importorskip("liger_kernel")
    started = start(
        tmp_path / "output", _train, str(tiny_llama_dir), str(pruned_cache), str(tmp_path), [],
        TRITON_INTERPRET="1",
    )  # fmt: skip
    assert started.wait(900) == 0, started.text("stderr")[-3000:]
    found = json.loads(started.text("stdout").splitlines()[-1])
    plain, liger = found["losses"]
    for ours, theirs in zip(plain, liger, strict=True):
        assert theirs == pytest.approx(ours, rel=2e-4, abs=2e-5)
    assert found["patched"].startswith("liger_kernel") and os.environ.get("TRITON_INTERPRET") is None
