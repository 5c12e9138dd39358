"""Liger's kernels for norms, rotary positions and MLPs, and none of its losses.

The package is run for real where it is installed: its Triton kernels on the GPU, or in Triton's interpreter
(TRITON_INTERPRET=1, set before triton is imported) on a CPU. The configuration is tested without.
"""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

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


def scalars_as_compiled() -> None:
    """A compiled kernel gets a float as a float32 scalar; Triton's interpreter hands it the bare Python number, which
    has none of a scalar's methods. This makes the interpreter do as the compiler does; Liger itself is untouched.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._implicit_cvt

    def converted(argument):
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return original(argument)

    interpreter._implicit_cvt = converted


def main(model: str, cache: str, out: str) -> None:
    """One run with Liger and one without, in Triton's interpreter; prints what both logged."""
    from trainer import load_config, train

    scalars_as_compiled()
    quick = [
        "training.per_device_train_batch_size=2",
        "training.gradient_accumulation_steps=1",
        "training.max_steps=2",
    ]
    quick += [
        "training.learning_rate=1e-3",
        "training.logging_steps=1",
        "training.save_strategy=no",
        "step0_rows=1",
    ]
    # The interpreter has no rsqrt of libdevice, so Liger's norm runs on a GPU only.
    more = ["training.use_liger_kernel=true", "training.liger_kernel_config={rms_norm: false}"]
    found = []
    for name, overrides in (("plain", []), ("liger", more)):
        flags = {"cache": cache, "model": model, "out": f"{out}/{name}"}
        report = train(load_config(flags=flags, overrides=[*quick, *overrides]))
        found.append([[e["loss"], e["ce"], e["kl"], e["grad_norm"]] for e in report.log_history if "ce" in e])
    from transformers.models.llama import modeling_llama

    print(json.dumps({"losses": found, "rotary": modeling_llama.apply_rotary_pos_emb.__module__}))


@pytest.mark.slow
def test_training_with_ligers_kernels_gives_the_same_losses_and_gradients(
    tiny_llama_dir, pruned_cache, tmp_path
):
    """Step 0 runs through the kernels as well, so KL(initial || model) vouches for them before the first update."""
    pytest.importorskip("triton")
    pytest.importorskip("liger_kernel")
    paths = [*map(str, Path(__file__).parents[3:4]), *sys.path]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, __file__, str(tiny_llama_dir), str(pruned_cache), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    plain, liger = found["losses"]
    assert len(plain) == 2
    for ours, theirs in zip(plain, liger, strict=True):
        assert theirs == pytest.approx(ours, rel=2e-4, abs=2e-5)
    assert found["rotary"].startswith("liger_kernel")


if __name__ == "__main__":
    main(*sys.argv[1:])
