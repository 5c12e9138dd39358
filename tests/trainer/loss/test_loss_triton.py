"""The Triton passes: the same gradients in Triton's interpreter, machine code for real GPUs, and refusals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from code_for_a_gpu import compiled_for

from formats.errors import ConfigError
from trainer.loss.chunks import logits_type
from trainer.loss.label_annealing_loss import label_annealing_loss
from trainer.loss.logits import TorchLogits

ROOT = Path(__file__).resolve().parents[3]
CASES = Path(__file__).with_name("loss_triton_cases.py")
ON_CUDA = torch.cuda.is_available()


def run_cases(interpret: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.slow
def test_gradients_in_the_interpreter():
    pytest.importorskip("triton")
    run_cases("1")


@pytest.mark.slow
@pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")
def test_gradients_on_the_gpu():
    run_cases("0")


def compiled(kernel, capability: int, dtype: str, flags: dict) -> tuple[dict[str, int], str]:
    """(what ptxas says of the kernel's resources, its PTX), compiled ahead of time: no GPU is needed."""
    fixed = dict(flags)
    types = {"raw_ptr": f"*{dtype}"}
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            types.setdefault(name, "*fp32")
        elif name.startswith("num_") or name == "stride":
            types[name] = "i32"
        elif name in ("scale", "cap", "beta"):
            types[name] = "fp32"
    absent = {"bias_ptr": "BIAS", "one_ptr": "ONE"}
    for name, flag in absent.items():
        if name in kernel.arg_names and not flags.get(flag, True):
            fixed[name] = None
    signature = {name: "constexpr" if name in fixed else types[name] for name in kernel.arg_names}
    aligned = {  # as the launcher finds pointers, and vocabularies that 16 divides
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in ("num_tokens", "stride")
    }
    from trainer.loss.triton_passes import NUM_WARPS

    return compiled_for(kernel, capability, signature, fixed, aligned, NUM_WARPS)


@pytest.mark.parametrize("dtype", ("bf16", "fp16", "fp32"))
@pytest.mark.parametrize("capability", (80, 90))
def test_kernels_compile_for_hardware(capability, dtype, monkeypatch, tmp_path):
    """sm_80 (A100) and sm_90 (H100): no register is spilled, a thread moves 16 bytes at a time."""
    pytest.importorskip("triton")
    from trainer.loss import triton_passes

    if triton_passes.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set: there is nothing to compile")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for plain in (True, False):  # the least and the most a kernel does
        transform = {"BIAS": not plain, "CAP": not plain}
        variants = (
            (triton_passes.row_sums, {"TEMPERED": not plain, "J": triton_passes.SUM_BLOCK}),
            (triton_passes.row_gradient, {"ONE": not plain, "J": triton_passes.GRADIENT_BLOCK}),
        )
        for kernel, flags in variants:
            used, ptx = compiled(kernel, capability, dtype, {**transform, **flags})
            print(capability, dtype, kernel.__name__, flags, used)  # shown by pytest -s
            assert 0 < used["REG"] <= 128 and used["STACK"] == used["LOCAL"] == 0
            assert used["SHARED"] <= 48 << 10
            assert "ld.global.v4.b32" in ptx
            assert kernel is triton_passes.row_sums or "st.global.v4.b32" in ptx


def tiny_loss(kernel: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 2).to(dtype), torch.randn(5, 2).to(dtype)
    return label_annealing_loss(hidden, weight, torch.tensor([0, 1, 2]), kernel=kernel).loss  # type: ignore[arg-type]


def one_line(error: ConfigError) -> str:
    assert "must" in str(error) or "needs" in str(error)
    assert "got" in str(error) and "\n" not in str(error)
    return str(error)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ConfigError, match="must be one of auto, torch, triton, got 'cuda'") as error:
        tiny_loss("cuda")
    one_line(error.value)


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter accepts a CPU")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_cpu_is_refused(dtype):
    pytest.importorskip("triton")
    with pytest.raises(ConfigError, match="needs a CUDA device, got cpu; use the loss kernel torch") as error:
        tiny_loss("triton", dtype)
    one_line(error.value)


def test_a_machine_without_triton_is_refused(monkeypatch):
    import trainer.loss

    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "trainer.loss.triton_passes", raising=False)
    monkeypatch.delattr(trainer.loss, "triton_passes", raising=False)
    with pytest.raises(ConfigError, match="needs the package triton, got: import of triton halted") as error:
        logits_type("triton", torch.float32, "cuda")
    one_line(error.value)
    assert logits_type("torch", torch.float32, "cuda") is TorchLogits


@pytest.mark.skipif(ON_CUDA or "TRITON_INTERPRET" in os.environ, reason="needs a machine that is refused")
def test_a_run_is_refused_before_anything_is_read(tmp_path):
    from trainer import TrainConfig, train

    missing = str(tmp_path / "missing")
    with pytest.raises(ConfigError, match="the loss kernel triton needs"):
        train(TrainConfig(cache=missing, model=missing, out=missing, loss_kernel="triton"))


def test_nothing_imports_triton_unless_asked():
    names = "trainer.loss.label_annealing_loss, trainer.loop.output_head"
    probe = f"import sys, {names}; print('trainer.loss.triton_passes' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
    for path in (ROOT / "trainer" / "loss").glob("*.py"):
        if path.name != "triton_passes.py":
            source = path.read_text()
            assert "\nimport triton" not in source and "\nfrom trainer.loss.triton_passes" not in source


def test_auto_takes_the_kernels_where_they_run_and_the_objective_lets_them(monkeypatch):
    pytest.importorskip("triton")
    from trainer.loss import chunks
    from trainer.loss.token_weights import RowExtras
    from trainer.loss.triton_passes import TritonLogits

    assert logits_type("auto", torch.bfloat16, "cpu") is TorchLogits
    monkeypatch.setattr(chunks, "why_no_triton", lambda device, compute: None)
    assert logits_type("auto", torch.bfloat16, "cuda") is TritonLogits
    assert logits_type("auto", torch.float64, "cuda") is TorchLogits
    for extras in (RowExtras(top_entropy=True), RowExtras(mean=True)):
        assert logits_type("auto", torch.bfloat16, "cuda", extras) is TorchLogits
    monkeypatch.setattr(chunks, "why_no_triton", lambda device, compute: "no compiler")
    assert logits_type("auto", torch.bfloat16, "cuda") is TorchLogits


@pytest.mark.skipif(ON_CUDA, reason="needs a machine without a GPU")
def test_where_they_do_not_run_a_line_says_why(monkeypatch):
    pytest.importorskip("triton")
    from trainer.config_file import config_from_dict
    from trainer.loss.chunks import why_no_triton
    from trainer.notes import kernel_note

    device = torch.device("cuda", 0)
    reason = why_no_triton(device, torch.bfloat16)
    assert reason is not None and "\n" not in reason
    base = {"cache": "c", "model": "m", "out": "o"}
    assert kernel_note(config_from_dict(base), {"bf16": True}) is None  # a run on the CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    line = kernel_note(config_from_dict(base), {"bf16": True})
    assert line == f"loss_kernel: torch, because Triton does not run here: {reason}"
    assert kernel_note(config_from_dict({**base, "loss_kernel": "torch"}), {"bf16": True}) is None
