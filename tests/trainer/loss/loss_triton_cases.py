"""The Triton passes held to the dense reference and to PyTorch's passes.

Not collected by name: test_loss_triton.py runs it in a process of its own, in Triton's interpreter, and on a
GPU where there is one.
"""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from dense_reference import relative_error
from loss_cases import Case, cast, dense_gradients, fused_gradients, make_case
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.loss import triton_passes
from trainer.loss.label_annealing_loss import label_annealing_loss
from trainer.objective import Objective

DEVICE = "cpu" if triton_passes.INTERPRETED else "cuda"
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
# As test_loss_draws.py has them; fp16 between its neighbours.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
# Against PyTorch's passes on the same projection: roundings to the compute dtype that fall the other way, and
# a bias gradient that is summed after them, not before.
NEAR = {torch.float32: 5e-6, torch.bfloat16: 5e-3, torch.float16: 5e-4}
HEADS = {
    "plain": {},
    "all": dict(with_bias=True, softcap=4.0, scale=1.7, padding=3, vocab_size=70),
    "many blocks": dict(num_rows=21, vocab_size=150, hidden_size=12),
    "far away": dict(drift=6.0, vocab_size=60, max_kept=3),
    "drawn often": dict(draw_rate=60.0),
    "the whole vocabulary": dict(vocab_size=6, max_kept=6),
}


# Every combination in fp32; in half precision, where a case takes as long and tells less, half of them.
COMBINATIONS = [
    (head, dtype, draw_rate, temperature)
    for head, dtype, draw_rate, temperature in product(HEADS, TOLERANCE, (0.0, 4.0), TEMPERATURES)
    if dtype == torch.float32 or temperature in (1.0, 2.0)
    if draw_rate or head != "drawn often"
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that a vocabulary of 70 has several, and an unfinished one."""
    monkeypatch.setattr(triton_passes, "SUM_BLOCK", 64)
    monkeypatch.setattr(triton_passes, "GRADIENT_BLOCK", 64)


@pytest.fixture(autouse=True)
def nearest(monkeypatch):
    """Triton's interpreter cuts fp32 to bf16 where the hardware rounds to the nearest (even)."""
    if not triton_passes.INTERPRETED:
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(values, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", rounding)


def fused(case: Case, kernel: str = "triton", **arguments):
    """(output, gradients) on the device, brought back to the CPU."""
    moved = {name: getattr(case, name).to(DEVICE) for name in ("hidden", "weight", "labels")}
    moved["bias"] = None if case.bias is None else case.bias.to(DEVICE)
    moved["teacher"] = None if case.teacher is None else case.teacher.to(DEVICE)
    output, gradients = fused_gradients(replace(case, **moved), kernel=kernel, **arguments)
    return output, {name: gradient.cpu() for name, gradient in gradients.items()}


def compare(case: Case, dtype: torch.dtype, chunk_size: int | None = None, **arguments) -> None:
    case = cast(case, dtype)
    output, gradients = fused(case, chunk_size=chunk_size, **arguments)
    expected, expected_gradients = dense_gradients(case, **arguments)
    torch_output, torch_gradients = fused(case, "torch", chunk_size=chunk_size, **arguments)
    tolerance, near = TOLERANCE[dtype], NEAR[dtype]
    for name in ("ce", "kl", "loss"):
        value = getattr(output, name).item()
        assert value == pytest.approx(getattr(expected, name).item(), rel=tolerance, abs=tolerance)
        assert value == pytest.approx(getattr(torch_output, name).item(), rel=near, abs=near)
    assert output.student_kept_mass.item() == pytest.approx(torch_output.student_kept_mass.item(), abs=1e-5)
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert relative_error(gradient, expected_gradients[name]) < tolerance, name
        assert relative_error(gradient, torch_gradients[name]) < near, name


@pytest.mark.parametrize(("head", "dtype", "draw_rate", "temperature"), COMBINATIONS, ids=str)
def test_gradients_equal_the_dense_reference(head, dtype, draw_rate, temperature):
    options = {"drift": 0.3, "draw_rate": draw_rate, **HEADS[head]}
    case = make_case(temperature=temperature, **options)
    compare(case, dtype, chunk_size=8 if head == "many blocks" else None, kl_coef=0.7)


@pytest.mark.parametrize("head", HEADS)
def test_what_is_measured_of_each_token_is_what_the_torch_passes_measure(head):
    case = cast(make_case(**{"drift": 0.3, **HEADS[head]}), torch.float32)
    sums = [
        fused(case, kernel, chunk_size=8, measure_tokens=True)[0].tokens for kernel in ("triton", "torch")
    ]
    assert torch.allclose(sums[0], sums[1], rtol=0, atol=1e-4) and sums[0].abs().sum() > 1


@pytest.mark.parametrize("temperature", (1.0, 2.0))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_reverse(head, dtype, temperature):
    compare(make_case(temperature=temperature, **HEADS[head]), dtype, kl_direction="reverse", kl_coef=0.7)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head", ("plain", "all"))
def test_without_a_teacher(head, dtype):
    compare(replace(make_case(**HEADS[head]), teacher=None), dtype, chunk_size=5)


@pytest.mark.parametrize("temperature", (1.0, 2.0))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_weights_and_masked_labels_are_those_of_torch(dtype, temperature):
    """What acts on single tokens and rows, beside kernels that know nothing of it."""
    case = cast(make_case(drift=0.3, draw_rate=4.0, temperature=temperature), dtype)
    flags = torch.zeros(len(case.teacher.token_ids), dtype=torch.bool)
    flags[case.teacher.offsets[:-1]] = True
    weights = torch.linspace(0, 1, len(case.teacher))
    case = replace(case, teacher=replace(case.teacher, masked=flags, weights=weights))
    objective = Objective(kl_target="masked-weighted", ce_weight="dft")
    output, gradients = fused(case, objective=objective)
    torch_output, torch_gradients = fused(case, "torch", objective=objective)
    assert output.loss.item() == pytest.approx(torch_output.loss.item(), rel=NEAR[dtype])
    for name, gradient in gradients.items():
        assert relative_error(gradient, torch_gradients[name]) < NEAR[dtype], name


def test_blocks_as_they_are(monkeypatch):
    """The sizes that a GPU gets, and a vocabulary of two blocks, the second unfinished."""
    monkeypatch.undo()
    options = dict(num_rows=18, vocab_size=4100, max_kept=300)
    compare(make_case(drift=0.3, temperature=2.0, draw_rate=4.0, **options), torch.bfloat16)


@pytest.mark.parametrize("temperature", (1.0, 2.0))
def test_logits_far_apart(temperature):
    """The running maximum moves by far more than an exponent holds; some tails are below e^-87."""
    case = make_case(num_rows=30, vocab_size=97, sharpness=60.0, temperature=temperature)
    case = cast(case, torch.float32)
    output, gradients = fused(case)
    torch_output, torch_gradients = fused(case, "torch")
    assert output.loss.item() == pytest.approx(torch_output.loss.item(), rel=1e-5)
    assert all(relative_error(gradients[name], torch_gradients[name]) < 1e-5 for name in gradients)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("draw_rate", (0.0, 8.0))
def test_nothing_pulls_at_the_initial_weights(draw_rate, temperature):
    case = make_case(drift=0.0, draw_rate=draw_rate, temperature=temperature)
    case = cast(replace(case, labels=torch.full_like(case.labels, -100)), torch.float32)
    output, gradients = fused(case)
    _, away = fused(cast(replace(case, hidden=case.hidden * 1.1), torch.float32))
    assert abs(output.kl.item()) < 1e-5
    for name, gradient in gradients.items():
        assert gradient.norm() < 1e-5
        assert away[name].norm() > 100 * gradient.norm()


@pytest.mark.parametrize("kept", (False, True))
def test_a_sure_student_is_rounded_once(kept):
    """q = 0.999 of the label: 0.999 - 1 from a bf16 0.999 would be nothing."""
    logits = torch.zeros(1, 40)
    logits[0, 7] = 10.5  # exact in bf16, as are all others
    case = make_case(num_rows=1, vocab_size=40, max_kept=1)
    teacher = case.teacher
    assert teacher is not None
    ids = torch.tensor([7 if kept else 8])
    case = Case(torch.ones(1, 1), logits.t().clone(), torch.tensor([7]), replace(teacher, token_ids=ids))
    _, gradients = fused(cast(case, torch.bfloat16), kl_coef=0.0)
    q = torch.softmax(logits[0].double(), 0)
    q[7] -= 1
    assert relative_error(gradients["weight"][:, 0], q) < 2**-8
    assert gradients["weight"][7, 0].item() == pytest.approx(q[7].item(), rel=2**-8)


def test_the_same_bits_every_time():
    case = cast(make_case(draw_rate=60.0, drift=0.3, temperature=2.0), torch.bfloat16)
    one, first = fused(case)
    two, second = fused(case)
    assert torch.equal(one.loss, two.loss)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_they_are_tried_on_two_rows():
    assert triton_passes.try_kernels(torch.device(DEVICE), torch.bfloat16) is None
    assert triton_passes.try_kernels(torch.device(DEVICE), torch.float32) is None


def test_draws_of_one_token_are_added_up():
    flat = torch.tensor([5, 9, 5, 2, 9, 5, 11])
    values = torch.tensor([1.0, 10.0, 2.0, 100.0, 20.0, 4.0, 7.0])
    expected = [7.0, 30.0, 7.0, 100.0, 30.0, 7.0, 7.0]
    assert triton_passes.summed_by_token(flat.to(DEVICE), values.to(DEVICE)).tolist() == expected
    empty = torch.empty(0, device=DEVICE)
    assert triton_passes.summed_by_token(empty.long(), empty).tolist() == []


def test_offsets_beyond_32_bits():
    """Three rows 2^30 elements apart: the third begins where a 32-bit offset is negative."""
    stride, num_tokens = 1 << 30, 50
    logits = torch.randn(3, num_tokens).to(DEVICE)
    raw = torch.empty(2 * stride + num_tokens, dtype=torch.bfloat16, device=DEVICE)  # pages nobody touches
    raw = raw.as_strided((3, num_tokens), (stride, 1))
    raw.copy_(logits)
    maxima, sums = torch.full((3,), -torch.inf, device=DEVICE), torch.empty(3, device=DEVICE)
    flags = dict(BIAS=False, CAP=False, scale=1.0, cap=0.0, beta=1.0)
    triton_passes.row_sums[(3,)](
        raw, None, maxima, sums, sums, num_tokens, stride, TEMPERED=False, J=16, **flags
    )
    z = raw.float()
    torch.testing.assert_close(maxima, z.amax(1))
    torch.testing.assert_close(sums, (z - z.amax(1, keepdim=True)).exp().sum(1))
    triton_passes.row_gradient[(3, triton.cdiv(num_tokens, 32))](
        raw, None, maxima, None, 1.0 / sums, num_tokens, stride, ONE=False, J=32, **flags
    )
    torch.testing.assert_close(raw.float(), torch.softmax(z, 1), rtol=2**-8, atol=0)


def test_fp64_is_pytorchs():
    case = make_case(draw_rate=4.0)
    _, found = fused(case)
    _, expected = fused(case, "torch")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_gradients():
    case = cast(make_case(), torch.float32)
    with_gradient, _ = fused(case)
    teacher = case.teacher.to(DEVICE)
    tensors = [tensor.to(DEVICE) for tensor in (case.hidden, case.weight, case.labels)]
    with torch.no_grad():
        output = label_annealing_loss(*tensors, teacher, kernel="triton")
    assert torch.equal(output.loss, with_gradient.loss.detach())


class LargestFloat(TorchDispatchMode):
    """Elements of the largest fp32 tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
                self.largest = max(self.largest, value.numel())
        return out


@pytest.mark.parametrize("temperature", (1.0, 2.0))
def test_no_fp32_chunk_exists(temperature):
    case = cast(make_case(24, 4, 200, temperature=temperature, max_kept=5), torch.bfloat16)
    found = {}
    for kernel in ("torch", "triton"):
        with LargestFloat() as recorder:
            fused(case, kernel, chunk_size=16)
        found[kernel] = recorder.largest
    assert found["torch"] >= 8 * 200
    assert found["triton"] <= 4 * 200  # the gradient of the head


def test_chunks_have_more_rows():
    """What smaller buffers are worth: the output head's gradient is read and written once per chunk."""
    from trainer.loss.chunks import rows_per_chunk
    from trainer.loss.logits import Projection, TorchLogits

    projection = Projection(torch.empty(128_256, 1, dtype=torch.bfloat16), None, 1.0, None)
    num_buffers = [kind.num_buffers(projection, 1.0) for kind in (TorchLogits, triton_passes.TritonLogits)]
    assert num_buffers == [2, 0.5]
    assert [rows_per_chunk(128_256, n, "cuda", 12 << 30) for n in num_buffers] == [1536, 2048]


def test_through_the_head_of_a_model():
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainer.loop.output_head import HeadRequest, OutputHead

    case = make_case(num_rows=16, vocab_size=37)
    sizes = dict(vocab_size=37, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=2, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config).float().to(DEVICE)
    head = OutputHead.of(model).install()
    losses = []
    for kernel in ("torch", "triton"):
        head.kernel = kernel
        with head.requested(
            HeadRequest(case.labels.to(DEVICE), cast(case, torch.float32).teacher.to(DEVICE))
        ):
            loss = model(input_ids=torch.arange(16, device=DEVICE)[None])["loss"]
        loss.backward()
        losses.append((loss.item(), model.lm_head.weight.grad.clone()))
        model.zero_grad()
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-6)
    torch.testing.assert_close(losses[1][1], losses[0][1], rtol=1e-4, atol=1e-7)
