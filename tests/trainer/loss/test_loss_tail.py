"""The shape of the tail: the fused gradient against the dense reference, and against the full KL."""

from dataclasses import replace

import pytest
import torch
from dense_reference import dense_logits, online_two_model_kl, relative_error, teacher_from_logits
from loss_cases import Case, cast, dense_gradients, fused_gradients, make_case

from formats.errors import FormatError
from trainer.data.teacher_batch import TeacherBatch
from trainer.loss import loss_tail
from trainer.loss.label_annealing_loss import label_annealing_loss

TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
# The linear system amplifies rounding by the reciprocal of its ridge, 50 or more.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5, torch.bfloat16: 4e-2}
HEADS = {
    "plain": {},
    "all": dict(with_bias=True, softcap=4.0, scale=1.7, padding=3),
    "chunks": dict(num_rows=29, vocab_size=300, hidden_size=12),
    "a tail of one": dict(vocab_size=13, max_head=12),
    "far away": dict(drift=6.0, vocab_size=60, max_head=3),
    "the whole vocabulary": dict(vocab_size=6, max_head=6),
}


def compare(case: Case, tolerance: float, **arguments) -> None:
    output, gradients = fused_gradients(case, **arguments)
    expected, expected_gradients = dense_gradients(case, **arguments)
    assert output.kl.item() == pytest.approx(expected.kl.item(), rel=tolerance, abs=tolerance)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance)
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[name]) < tolerance, name


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("noise", (0.0, 1e-3))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_gradients_equal_the_dense_reference(head, dtype, noise, temperature):
    options = {"drift": 0.3, **HEADS[head]}
    case = make_case(temperature=temperature, num_features=5, noise=noise, **options)
    for chunk_size in (None, 4):
        compare(cast(case, dtype), TOLERANCE[dtype], kl_coef=0.7, chunk_size=chunk_size)


def test_slices_of_the_vocabulary_join(monkeypatch):
    monkeypatch.setattr(loss_tail, "SLICE", 7)
    compare(make_case(num_features=3, drift=0.3), 1e-10)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_nothing_is_added_at_the_initial_weights(temperature):
    case = make_case(temperature=temperature, num_features=5, drift=0.0)
    case = replace(case, labels=torch.full_like(case.labels, -100))
    output, gradients = fused_gradients(case)
    assert abs(output.kl.item()) < 1e-12
    assert all(gradient.norm() < 1e-12 for gradient in gradients.values())


def test_enough_features_give_the_full_gradient(monkeypatch):
    """Where features tell every token of the tail from every other, the mean determines the tail."""
    monkeypatch.setattr(loss_tail, "VARIANCE_SHARE", 0.0)
    monkeypatch.setattr(loss_tail, "LEAST_RIDGE", 0.0)
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8, dtype=torch.float64), torch.randn(24, 8, dtype=torch.float64)
    logits = hidden @ weight.T + 0.3 * torch.randn(6, 24, dtype=torch.float64)
    features = torch.randint(-99, 99, (24, 15), dtype=torch.int8)
    teacher = teacher_from_logits(logits, range(6), [8] * 6, 1.0, features=features)
    case = Case(hidden, weight, torch.full((6,), -100), teacher)
    _, gradients = fused_gradients(case)
    _, bucket = fused_gradients(replace(case, teacher=without_shape(teacher)))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    (online_two_model_kl(hidden @ weight.T, logits, 1.0) / 6).backward()
    for name, exact in (("hidden", hidden.grad), ("weight", weight.grad)):
        assert relative_error(gradients[name], exact) < 1e-9
        assert relative_error(bucket[name], exact) > 0.01


@pytest.mark.parametrize("temperature", (1.0, 2.0))
def test_drift_of_the_hidden_state_is_seen(temperature):
    """The case features are made for: logits W h, the student's h moved, features from W."""
    torch.manual_seed(1)
    weight = torch.randn(400, 6, dtype=torch.float64)
    before = torch.randn(40, 6, dtype=torch.float64)
    after = before + 0.2 * torch.randn(40, 6, dtype=torch.float64)
    features = (weight * 32).round().clamp(-127, 127).to(torch.int8)
    teacher = teacher_from_logits(before @ weight.T, range(40), [5] * 40, temperature, features=features)
    case = Case(after, weight, torch.full((40,), -100), teacher)
    _, with_shape = fused_gradients(case)
    _, bucket = fused_gradients(replace(case, teacher=without_shape(teacher)))
    hidden = after.clone().requires_grad_()
    (online_two_model_kl(hidden @ weight.T, before @ weight.T, temperature) / 40).backward()
    assert relative_error(with_shape["hidden"], hidden.grad) < 0.35 * relative_error(
        bucket["hidden"], hidden.grad
    )


def test_damping():
    """Variances of x by hand: 0.25, 16 and 100 at T = 1; a quarter of that at T = 2."""
    a = torch.tensor([[0.5, 0.0], [0.0, 4.0], [6.0, 8.0]], dtype=torch.float64)
    covariance = torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
    assert loss_tail.damping(a, covariance, 1.0).tolist() == pytest.approx([1.0, 1.0, 0.4])
    expected = [(1 + v / 4) ** -0.5 for v in (0.25, 16.0, 100.0)]
    assert loss_tail.damping(a, covariance, 0.5).tolist() == pytest.approx(expected)


def test_reverse_leaves_the_shape_alone():
    case = make_case(num_features=5, drift=0.3)
    _, shaped = fused_gradients(case, kl_direction="reverse")
    _, bucket = fused_gradients(replace(case, teacher=without_shape(case.teacher)), kl_direction="reverse")
    assert all(torch.equal(shaped[name], bucket[name]) for name in shaped)


def test_a_mean_of_which_nothing_is_known_adds_nothing():
    case = make_case(num_features=5, drift=0.3, noise=1e6)
    _, shaped = fused_gradients(case)
    _, bucket = fused_gradients(replace(case, teacher=without_shape(case.teacher)))
    assert all(relative_error(shaped[name], bucket[name]) < 1e-6 for name in shaped)


def test_features_of_another_vocabulary_are_refused():
    case = make_case(num_features=5, padding=3)
    with pytest.raises(FormatError, match="must be of the head's 40 tokens, got 37; pass vocab_size"):
        label_annealing_loss(case.hidden, case.weight, case.labels, case.teacher)


def test_the_three_parts_come_together():
    teacher = make_case(num_features=5).teacher
    with pytest.raises(FormatError, match="come together"):
        replace(teacher, features=None)
    with pytest.raises(FormatError, match="tail_mean must have shape"):
        replace(teacher, features=teacher.features[:, :3])


def without_shape(teacher: TeacherBatch) -> TeacherBatch:
    return replace(teacher, tail_mean=None, tail_noise=None, features=None)


def test_the_reference_has_the_bucket_below_it():
    """The reference itself: with features its KL lies between the bucket's and the full one."""
    case = make_case(num_features=5, drift=0.2, num_rows=30)
    case = replace(case, labels=torch.full_like(case.labels, -100))
    logits = dense_logits(case.hidden, case.weight)
    assert logits.shape == (30, 37)
    shaped, _ = dense_gradients(case)
    bucket, _ = dense_gradients(replace(case, teacher=without_shape(case.teacher)))
    assert bucket.kl.item() < shaped.kl.item()
