"""The kernels of the reduction: its own tests in Triton's interpreter, and machine code for real GPUs."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from code_for_a_gpu import compiled_for

from cache_builder.reduction import kernels
from cache_builder.reduction.reduce import reduce_logits
from formats.capture_settings import CaptureSettings

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).parent
ON_CUDA = torch.cuda.is_available()

AGAINST_OPERATIONS = """
import os
import torch
from cache_builder.reduction import kernels, triton_rows
from cache_builder.reduction.reduce import reduce_logits
from formats.capture_settings import CaptureSettings

assert triton_rows.INTERPRETED and kernels.run_on("cpu", 4099)
generator = torch.Generator().manual_seed(0)
logits = torch.randn(6, 4099, generator=generator) * torch.tensor([[0.1], [1.0], [3.0], [6.0], [10.0], [3.0]])
logits[1] = 0.0  # more blocks to look into than there is room for, so all six rows go another way
logits[2, 7] = torch.nan
logits[3, ::3] = -torch.inf
logits[5] = logits[5].bfloat16().float()
arguments = {"labels_N": torch.arange(6) * 389, "starts_N": torch.rand(6, dtype=torch.float64, generator=generator)}
CASES = (
    (slice(0, 6), {}), (slice(2, 6), {}), (slice(2, 5), {"max_k": 3, "draw_rate": 0}), (slice(0, 1), {"min_prob": 0.3})
)
for rows, settings in CASES:
    capture = CaptureSettings(**settings)
    part = {name: value[rows] for name, value in arguments.items()}
    os.environ["ANNEAL_TRITON"] = "1"
    found = reduce_logits(logits[rows], capture, **part)
    os.environ["ANNEAL_TRITON"] = "0"
    wanted = reduce_logits(logits[rows], capture, **part)
    for name, one, other in zip(found._fields, found, wanted):
        assert one.dtype == other.dtype, name
        if name not in ("draw_ids", "draw_logprobs"):  # a point on the edge of a token may fall on either side
            torch.testing.assert_close(one, other, atol=2e-5, rtol=3e-6, equal_nan=True, msg=name)
    assert (found.draw_ids != wanted.draw_ids).sum() <= 0.01 * len(wanted.draw_ids) + 1
print("equal")
"""


def run(code: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *code], cwd=ROOT, env=settings, capture_output=True, text=True, check=False
    )


def test_the_kernels_find_what_the_operations_find():
    """In the interpreter; the operations are tested against float64 in test_reduce.py."""
    pytest.importorskip("triton")
    done = run(["-c", AGAINST_OPERATIONS], TRITON_INTERPRET="1")
    assert done.stdout == "equal\n", done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(5400)  # ten minutes of one quiet core
@pytest.mark.parametrize(
    ("name", "chosen"), [("test_reduce.py", ""), ("test_draw_from_tails.py", "hand or ends")]
)
def test_the_reduction_s_own_tests_in_the_interpreter(name, chosen):
    """Their cases against the references in float64, with the kernels in the place of the operations; of the draws
    those that need no thousands of rows."""
    pytest.importorskip("triton")
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, str(HERE / name)]
    done = run(command, TRITON_INTERPRET="1")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:]


@pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")
def test_a_gpu_runs_the_kernels():
    assert kernels.run_on("cuda", 4099)


def compiled(kernel, capability: int, flags: dict[str, object], num_warps: int) -> tuple[dict[str, int], str]:
    """(what the assembler says of the kernel's resources, its PTX), compiled ahead of time: no GPU is needed."""
    types = {"log_min_prob": "fp32", "chosen_ptr": "*i32", "ids_ptr": "*i32", "draw_ids_ptr": "*i32"}
    types |= dict.fromkeys(("labels_ptr", "keys_ptr", "numbers_ptr", "ends_ptr"), "*i64")
    types |= dict.fromkeys(("starts_ptr", "line_ptr"), "*fp64")
    signature = {
        name: "constexpr" if name in flags else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    return compiled_for(kernel, capability, signature, flags, aligned, num_warps)


@pytest.mark.slow
@pytest.mark.parametrize("capability", (80, 90))
def test_kernels_compile_for_hardware(capability, monkeypatch, tmp_path):
    """sm_80 (A100) and sm_90 (H100), vocabularies of 128,256 and 262,144 tokens: no register is spilled, and the pass
    over the logits reads each once and waits for no other thread."""
    pytest.importorskip("triton")
    from cache_builder.reduction import triton_rows

    if triton_rows.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set: there is nothing to compile")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    columns = {"COLUMNS": triton_rows.COLUMNS, "J": 32}
    used, ptx = compiled(triton_rows.block_kernel, capability, columns, triton_rows.COLUMN_WARPS)
    assert 0 < used["REG"] <= 64 and used["STACK"] == used["LOCAL"] == used["SHARED"] == 0
    assert (ptx.count("bar.sync"), ptx.count("ld.global"), ptx.count("ex2.approx")) == (0, 32, 32)
    for row in (4096, 8192):
        flags = {"ROW": row, "C": 128, "T": triton_rows.TILE, "J": 32, "DRAW": True}
        used, _ = compiled(triton_rows.pick_kernel, capability, flags, triton_rows.ROW_WARPS)
        print(capability, row, used)  # shown by pytest -s
        assert used["STACK"] <= 32 and used["LOCAL"] == 0 and used["SHARED"] <= 48 << 10
    flags = {"C": 128, "W": triton_rows.DRAWS, "J": 32, "DRAW": True}
    used, _ = compiled(triton_rows.hand_over_kernel, capability, flags, 4)
    assert used["STACK"] == used["LOCAL"] == 0


def test_where_triton_does_not_run_operations_do(monkeypatch):
    """On a device kind that Triton cannot compile for: slower, not wrong, and said."""
    from cache_builder.reduction import triton_rows

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_rows, "pick", broken)
    kernels._failure.cache_clear()
    logits = torch.randn(3, 1003, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(3, dtype=torch.int64)
    with pytest.warns(UserWarning, match="Triton failed, reducing without it: no C compiler"):
        found = reduce_logits(logits, CaptureSettings(draw_rate=0), labels_N=labels)
    kernels._failure.cache_clear()
    assert math.isclose(
        float(found.label_logprobs[0]), float(torch.log_softmax(logits, -1)[0, 0]), abs_tol=1e-5
    )
