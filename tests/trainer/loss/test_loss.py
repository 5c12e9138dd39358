"""The fused loss against the dense reference: values and, above all, gradients."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from dense_reference import (
    dense_logits,
    online_two_model_kl,
    relative_error,
    teacher_from_logits,
)
from loss_cases import Case, cast, dense_gradients, fused_gradients, make_case
from loss_on_device import label_annealing_loss

from formats.errors import AnnealError, ConfigError, FormatError
from trainer.data.teacher_batch import TeacherBatch

TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
DIRECTIONS = ("forward", "reverse")
# Relative error of a gradient against float64 on the same inputs: a few units in the last place of the dtype
# the projection runs in (bf16: 2^-8, fp16: 2^-11); rounding the logits to that dtype is the largest part.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
SHAPES = {
    "one row": dict(num_rows=1, vocab_size=17),
    "small": dict(num_rows=13, vocab_size=37),
    "chunks of unequal size": dict(num_rows=29, vocab_size=17, hidden_size=5),
    "large vocabulary": dict(num_rows=11, vocab_size=1000, hidden_size=24, max_kept=300),
    "one token kept": dict(num_rows=9, vocab_size=101, max_kept=1),
}
HEADS = {
    "plain": {},
    "bias": dict(with_bias=True),
    "softcap": dict(softcap=3.0),
    "scale": dict(scale=0.25),
    "padding": dict(padding=11),
    "all": dict(with_bias=True, softcap=4.0, scale=1.7, padding=3),
}


def compare(case: Case, tolerance: float, **arguments) -> None:
    output, gradients = fused_gradients(case, **arguments)
    expected, expected_gradients = dense_gradients(case, **arguments)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance)
    assert output.ce.item() == pytest.approx(expected.ce.item(), rel=tolerance, abs=tolerance)
    assert output.kl.item() == pytest.approx(expected.kl.item(), rel=tolerance, abs=tolerance)
    for name, gradient in gradients.items():
        assert gradient.dtype == case.weight.dtype
        assert relative_error(gradient, expected_gradients[name]) < tolerance, name


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_the_dense_reference(shape, dtype, direction, temperature):
    case = cast(make_case(**SHAPES[shape], temperature=temperature), dtype)
    for chunk_size in (None, 4):
        compare(case, TOLERANCE[dtype], kl_direction=direction, kl_coef=0.7, chunk_size=chunk_size)


@pytest.mark.parametrize("temperature", (1.0, 2.0))
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_every_kind_of_head(head, dtype, direction, temperature):
    case = cast(make_case(temperature=temperature, **HEADS[head]), dtype)
    compare(case, TOLERANCE[dtype], kl_direction=direction, kl_coef=2.0, chunk_size=5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradient_is_the_derivative_of_the_reported_loss(direction, temperature):
    """Central differences of the product's own value: a T^2 on one side only would show here."""
    options = dict(temperature=temperature, with_bias=True, softcap=3.0, scale=0.8, padding=2)
    case = make_case(5, 4, 11, **options)
    arguments = dict(kl_direction=direction, kl_coef=1.3, chunk_size=2)
    _, gradients = fused_gradients(case, **arguments)
    step = 1e-5
    for name, gradient in gradients.items():
        tensor = getattr(case, name)
        for index in range(tensor.numel()):
            values = []
            for sign in (1, -1):
                moved = tensor.clone()
                moved.view(-1)[index] += sign * step
                values.append(fused_gradients(replace(case, **{name: moved}), **arguments)[0].loss.item())
            difference = (values[0] - values[1]) / (2 * step)
            assert gradient.view(-1)[index].item() == pytest.approx(difference, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_lossless_teacher_equals_the_online_two_model_computation(direction, temperature):
    """The whole vocabulary kept: fp32 against the full KL of the paper, with nothing of ours in between."""
    case = make_case(num_rows=12, hidden_size=16, vocab_size=97, seed=3)
    teacher_logits = torch.randn(12, 97, dtype=torch.float64) * 2
    rows = torch.arange(12)
    teacher = teacher_from_logits(teacher_logits, rows, [97] * 12, temperature, dtype=torch.float32)
    labels = torch.full((12,), -100)
    fused = Case(case.hidden.float(), case.weight.float(), labels, teacher)
    output, gradients = fused_gradients(fused, kl_direction=direction)

    hidden, weight = fused.hidden.double().requires_grad_(), fused.weight.double().requires_grad_()
    online = online_two_model_kl(hidden @ weight.T, teacher_logits, temperature, direction == "reverse") / 12
    online.backward()
    assert output.loss.item() == pytest.approx(online.item(), rel=1e-5)
    assert relative_error(gradients["hidden"], hidden.grad) < 1e-5
    assert relative_error(gradients["weight"], weight.grad) < 1e-5


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("max_kept", (1, 3, 20))
def test_gradient_vanishes_at_the_initial_weights(max_kept, direction, temperature):
    """Student = teacher and an exact tail: nothing pushes, however little was kept."""
    case = make_case(num_rows=10, hidden_size=16, vocab_size=200, seed=4)
    logits = dense_logits(case.hidden, case.weight)
    teacher = teacher_from_logits(logits, torch.arange(10), [max_kept] * 10, temperature)
    labels = torch.full((10,), -100)
    away = Case(case.hidden * 1.01, case.weight, labels, teacher)
    for dtype, zero in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        output, gradients = fused_gradients(
            cast(Case(case.hidden, case.weight, labels, teacher), dtype), kl_direction=direction
        )
        _, scale = fused_gradients(cast(away, dtype), kl_direction=direction)
        assert abs(output.kl.item()) < zero
        for name, gradient in gradients.items():
            assert gradient.norm() < zero, name
            assert scale[name].norm() > 100 * gradient.norm(), name


def test_three_tokens_by_hand():
    """Logits log(5, 3, 2) against a teacher that keeps token 0 at 0.6 and leaves 0.4."""
    hidden = torch.eye(1, dtype=torch.float64).requires_grad_()
    weight = torch.tensor([[5.0], [3.0], [2.0]], dtype=torch.float64).log().requires_grad_()
    teacher = TeacherBatch(
        rows=torch.tensor([0]),
        offsets=torch.tensor([0, 1]),
        token_ids=torch.tensor([0]),
        logprobs=torch.tensor([0.6], dtype=torch.float64).log(),
        log_tail=torch.tensor([0.4], dtype=torch.float64).log(),
    )
    out = label_annealing_loss(hidden, weight, torch.tensor([1]), teacher, kl_coef=2.0)
    out.loss.backward()
    assert out.ce.item() == pytest.approx(-math.log(0.3))
    assert out.kl.item() == pytest.approx(0.6 * math.log(0.6 / 0.5) + 0.4 * math.log(0.4 / 0.5))
    assert out.kept_mass.item() == pytest.approx(0.6)
    assert out.student_kept_mass.item() == pytest.approx(0.5)
    # CE: q - [label]. KL: head 0.5 - 0.6; tail q_j (P - Q) / (1 - Q) = q_j * 0.2. Twice the KL.
    by_hand = [0.5 + 2 * -0.1, 0.3 - 1 + 2 * 0.06, 0.2 + 2 * 0.04]
    assert weight.grad.squeeze(1).tolist() == pytest.approx(by_hand)

    reverse = label_annealing_loss(
        hidden, weight.detach().requires_grad_(), torch.tensor([-100]), teacher, kl_direction="reverse"
    )
    assert reverse.kl.item() == pytest.approx(0.5 * math.log(0.5 / 0.6) + 0.5 * math.log(0.5 / 0.4))


def test_temperature_enters_by_hand_and_without_its_square():
    """Two tokens, T = 2: q = softmax(z / 2), d KL / d z = (q - p) / 2."""
    weight = torch.tensor([[2.0], [0.0]], dtype=torch.float64, requires_grad=True)
    hidden = torch.ones(1, 1, dtype=torch.float64)
    teacher = teacher_from_logits(torch.tensor([[0.0, 4.0]]), [0], [2], temperature=2.0)
    out = label_annealing_loss(hidden, weight, torch.tensor([-100]), teacher)
    out.loss.backward()
    q, p = 1 / (1 + math.exp(-1.0)), 1 / (1 + math.exp(2.0))
    assert out.kl.item() == pytest.approx(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    assert weight.grad.squeeze(1).tolist() == pytest.approx([(q - p) / 2, (p - q) / 2])


def test_kl_row_and_label_of_the_same_token_meet_in_the_same_hidden_row():
    """Only hidden row 1 has a target, so only hidden row 1 gets a gradient, from CE and from KL."""
    case = make_case(num_rows=4, vocab_size=9)
    labels = torch.tensor([-100, 5, -100, -100])
    teacher = teacher_from_logits(torch.randn(1, 9), [1], [3], 1.0)
    for kl_coef, given in itertools.product((0.0, 3.0), (None, teacher)):
        _, gradients = fused_gradients(Case(case.hidden, case.weight, labels, given), kl_coef=kl_coef)
        assert gradients["hidden"].norm(dim=1).gt(0).tolist() == [False, True, False, False]


def bound_slack(case: Case, temperature: float, kept: int) -> list[tuple[float, float]]:
    """(gradient error, bound) per row, of the bucketed KL against the full KL, with respect to the logits."""
    beta = 1.0 / temperature
    logits = dense_logits(case.hidden, case.weight)
    generator = torch.Generator().manual_seed(9)
    teacher_logits = logits + torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    found = []
    for row in range(len(logits)):
        z = logits[row : row + 1].clone()
        teacher = teacher_from_logits(teacher_logits[row : row + 1], [0], [kept], temperature)
        weight = z.T.clone().requires_grad_()
        label_annealing_loss(torch.ones(1, 1).double(), weight, torch.tensor([-100]), teacher).loss.backward()
        z.requires_grad_()
        online_two_model_kl(z, teacher_logits[row : row + 1], temperature).backward()
        p = torch.softmax(beta * teacher_logits[row], 0)
        q = torch.softmax(beta * z[0].detach(), 0)
        tail = torch.ones(len(p), dtype=torch.bool)
        tail[teacher.token_ids.long()] = False
        shapes = (p[tail] / p[tail].sum() - q[tail] / q[tail].sum()).norm()
        error = (weight.grad.squeeze(1) - z.grad[0]).norm()
        found.append((float(error), float(beta * p[tail].sum() * shapes)))
    return found


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kept", (1, 5, 30))
def test_error_of_the_bucket_is_exactly_what_the_page_says(kept, temperature):
    """beta (1 - P) |p~ - q~| is not only a bound on the forward gradient's error: it is the error."""
    for error, stated in bound_slack(make_case(num_rows=8, vocab_size=60, seed=6), temperature, kept):
        assert error == pytest.approx(stated, rel=1e-9)
        assert error <= math.sqrt(2) / temperature


def test_default_denominators_are_the_local_counts():
    case = make_case(num_rows=20)
    output, _ = fused_gradients(case)
    assert output.num_ce.item() == int((case.labels != -100).sum())
    assert output.num_kl.item() == len(case.teacher)
    assert output.num_ce.item() != output.num_kl.item()


def split(case: Case, bounds: list[int]) -> list[Case]:
    """The case's rows as several micro-batches."""
    parts = []
    for a, b in itertools.pairwise(bounds):
        inside = ((case.teacher.rows >= a) & (case.teacher.rows < b)).nonzero().squeeze(1)
        entries = [torch.arange(*case.teacher.offsets[k : k + 2].tolist()) for k in inside.tolist()]
        counts = torch.tensor([0] + [len(entry) for entry in entries])
        chosen = torch.cat([torch.empty(0, dtype=torch.int64), *entries])
        teacher = TeacherBatch(
            case.teacher.rows[inside] - a,
            counts.cumsum(0),
            case.teacher.token_ids[chosen],
            case.teacher.logprobs[chosen],
            case.teacher.log_tail[inside],
            case.teacher.temperature,
        )
        parts.append(Case(case.hidden[a:b], case.weight, case.labels[a:b], teacher))
    return parts


@pytest.mark.parametrize("bounds", ([0, 24], [0, 12, 24], [0, 1, 7, 24], list(range(0, 25, 3))), ids=len)
def test_accumulated_micro_batches_equal_one_batch(bounds):
    """Global counts as denominators: however unevenly labels and teacher rows fall, the sum is the same."""
    case = make_case(num_rows=24, temperature=2.0, seed=8)
    whole, expected = fused_gradients(case, kl_coef=1.5)
    total_loss, weight_gradient, hidden_gradient = 0.0, 0.0, []
    for part in split(case, bounds):
        output, gradients = fused_gradients(
            part, kl_coef=1.5, num_ce=whole.num_ce, num_kl=whole.num_kl.item()
        )
        total_loss += output.loss.item()
        weight_gradient = weight_gradient + gradients["weight"]
        hidden_gradient.append(gradients["hidden"])
    assert total_loss == pytest.approx(whole.loss.item(), rel=1e-12)
    assert relative_error(weight_gradient, expected["weight"]) < 1e-12
    assert relative_error(torch.cat(hidden_gradient), expected["hidden"]) < 1e-12


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", (0.5, 1.0, 2.0))
def test_masses_that_underflow_give_finite_gradients(temperature, direction):
    """Logits 300 apart in fp32: 1 - Q, 1 - P or both are zero; the head still gets the exact gradient."""
    spread = torch.zeros(6)
    spread[0], spread[1] = 300.0, 299.0
    for teacher_logits, student_logits in itertools.product((spread, torch.zeros(6)), repeat=2):
        teacher = teacher_from_logits(teacher_logits[None], [0], [2], temperature, dtype=torch.float32)
        weight = student_logits[:, None].clone().requires_grad_()
        out = label_annealing_loss(
            torch.ones(1, 1), weight, torch.tensor([0]), teacher, kl_direction=direction
        )
        out.loss.backward()
        assert math.isfinite(out.loss.item())
        assert torch.isfinite(weight.grad).all()
        same = bool(torch.equal(teacher_logits, student_logits))
        assert same == (abs(out.kl.item()) < 1e-6)
        if direction == "forward":
            q = torch.softmax(student_logits / temperature, 0)[:2]
            p = torch.softmax(teacher_logits / temperature, 0)[:2]
            kl_part = (
                weight.grad.squeeze(1)[:2] - torch.softmax(student_logits, 0)[:2] + torch.tensor([1.0, 0.0])
            )
            assert torch.allclose(kl_part, (q - p) / temperature, atol=1e-6)


@pytest.mark.parametrize("temperature", (1.0, 2.0))
def test_a_token_that_the_model_rules_out_spoils_no_row_without_a_label(temperature):
    """A bias of -inf on token 0, which stands in where a row has no label: the others are a vocabulary of their own."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (2, 9))
    bias = torch.zeros(9, dtype=torch.float64)
    bias[0] = -torch.inf
    teacher_logits = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    found = {}
    for first in (0, 1):
        teacher = teacher_from_logits(teacher_logits, torch.arange(2), [3, 2], temperature)
        moved = replace(teacher, token_ids=teacher.token_ids + 1 - first)
        labels = torch.tensor([4 - first, -100])
        case = Case(hidden, weight[first:], labels, moved, bias[first:])
        output, gradients = fused_gradients(case)
        found[first] = torch.cat([output.loss.detach()[None], gradients["hidden"].flatten()])
    assert torch.isfinite(found[0]).all()
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_tiny_student_tail_keeps_its_relative_precision():
    """The tail mass e^-60 is summed, not computed as 1 - Q: its logarithm is right to fp32."""
    logits = torch.tensor([0.0, -60.0, -61.0])
    teacher = teacher_from_logits(torch.zeros(1, 3), [0], [1], 1.0, dtype=torch.float32)
    out = label_annealing_loss(torch.ones(1, 1), logits[:, None], torch.tensor([-100]), teacher)
    tail = -60 + math.log(1 + math.exp(-1))
    expected = math.log(1 / 3) / 3 + 2 / 3 * (math.log(2 / 3) - tail)
    assert out.kl.item() == pytest.approx(expected, rel=1e-6)


def test_teacher_is_renormalised_against_quantisation():
    """Stored logprobs that sum to 0.97 with their tail still define a distribution: no gradient leaks."""
    case = make_case(num_rows=6, seed=11)
    t = case.teacher
    shifted = TeacherBatch(
        t.rows, t.offsets, t.token_ids, t.logprobs - 0.03, t.log_tail - 0.03, t.temperature
    )
    _, expected = fused_gradients(case)
    _, got = fused_gradients(Case(case.hidden, case.weight, case.labels, shifted))
    assert relative_error(got["weight"], expected["weight"]) < 1e-12


BAD_INPUT = {
    "hidden of another width": (ConfigError, dict(hidden_ND=torch.randn(5, 3))),
    "three-dimensional hidden": (ConfigError, dict(hidden_ND=torch.randn(1, 5, 4))),
    "too few labels": (ConfigError, dict(labels_N=torch.zeros(4, dtype=torch.int64))),
    "label outside the vocabulary": (ConfigError, dict(labels_N=torch.tensor([0, 1, 2, 3, 9]))),
    "negative label": (ConfigError, dict(labels_N=torch.tensor([0, 1, 2, 3, -1]))),
    "other dtype": (ConfigError, dict(weight_VD=torch.randn(9, 4).double())),
    "unknown direction": (ConfigError, dict(kl_direction="sideways")),
    "negative kl_coef": (ConfigError, dict(kl_coef=-1.0)),
    "softcap of zero": (ConfigError, dict(logit_softcap=0.0)),
    "vocabulary beyond the head": (ConfigError, dict(vocab_size=10)),
    "chunk of nothing": (ConfigError, dict(chunk_size=0)),
    "bias of another size": (ConfigError, dict(bias_V=torch.zeros(8))),
    "token outside the vocabulary": (FormatError, dict(teacher=([0, 2], [0, 1, 2], [8, 9]))),
    "teacher row outside the batch": (FormatError, dict(teacher=([0, 5], [0, 1, 2], [1, 2]))),
    "teacher rows out of order": (FormatError, dict(teacher=([2, 0], [0, 1, 2], [1, 2]))),
    "teacher row twice": (FormatError, dict(teacher=([2, 2], [0, 1, 2], [1, 2]))),
    "offsets that end early": (FormatError, dict(teacher=([0, 2], [0, 1, 1], [1, 2]))),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_in_one_line(name):
    error, change = BAD_INPUT[name]
    change = dict(change)
    if "teacher" in change:
        rows, offsets, ids = change["teacher"]
        change["teacher"] = TeacherBatch(
            torch.tensor(rows),
            torch.tensor(offsets),
            torch.tensor(ids),
            torch.full((2,), -1.0),
            torch.full((2,), -0.5),
        )
    good = dict(
        hidden_ND=torch.randn(5, 4), weight_VD=torch.randn(9, 4), labels_N=torch.tensor([0, 1, -100, 3, 4])
    )
    label_annealing_loss(**good)
    with pytest.raises(error) as caught:
        label_annealing_loss(**{**good, **change})
    assert isinstance(caught.value, AnnealError)
    message = str(caught.value)
    assert "must" in message and "got" in message and "\n" not in message
