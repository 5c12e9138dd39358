"""Weights of single positions' KL: the fused gradient against the dense reference."""

from dataclasses import replace

import pytest
import torch
from dense_reference import dense_logits, relative_error, teacher_from_logits
from loss_cases import Case, dense_gradients, fused_gradients, make_case

from formats.errors import FormatError

TEMPERATURES = (0.5, 1.0, 2.0)


def weighted(case: Case, seed: int = 5) -> Case:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(len(case.teacher), generator=generator, dtype=torch.float64)
    weights[::3] = 0.0
    return replace(case, teacher=replace(case.teacher, weights=weights))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("direction", ("forward", "reverse"))
@pytest.mark.parametrize("head", ({}, dict(with_bias=True, softcap=4.0, scale=1.7, padding=3)))
def test_gradients_equal_the_dense_reference(temperature, direction, head):
    drawn = {} if direction == "reverse" else {"draw_rate": 4.0}
    case = weighted(make_case(temperature=temperature, drift=0.3, **drawn, **head))
    for chunk_size in (None, 4):
        found, gradients = fused_gradients(case, kl_coef=0.7, kl_direction=direction, chunk_size=chunk_size)
        expected, expected_gradients = dense_gradients(case, kl_coef=0.7, kl_direction=direction)
        assert found.kl.item() == pytest.approx(expected.kl.item(), rel=1e-10)
        for name, gradient in gradients.items():
            assert relative_error(gradient, expected_gradients[name]) < 1e-10, name


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_whole_vocabulary_gives_the_weighted_full_kl(temperature):
    """Two models, every token: the definition without buckets or draws, and the mean over all positions."""
    case = make_case(temperature=temperature)
    teacher_logits = torch.randn(5, 37, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    teacher = teacher_from_logits(teacher_logits, [0, 2, 3, 7, 9], [37] * 5, temperature)
    weights = torch.tensor([0.0, 1.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    case = replace(case, labels=torch.full_like(case.labels, -100), teacher=replace(teacher, weights=weights))
    output, gradients = fused_gradients(case)
    hidden = case.hidden.clone().requires_grad_()
    log_q = torch.log_softmax(dense_logits(hidden, case.weight)[teacher.rows] / temperature, -1)
    log_p = torch.log_softmax(teacher_logits / temperature, -1)
    loss = (weights * (log_p.exp() * (log_p - log_q)).sum(-1)).mean()
    loss.backward()
    assert output.kl.item() == pytest.approx(loss.item(), rel=1e-10)
    assert relative_error(gradients["hidden"], hidden.grad) < 1e-10


def test_nothing_pulls_at_the_initial_weights():
    case = weighted(make_case(drift=0.0, draw_rate=8.0, temperature=2.0))
    output, gradients = fused_gradients(replace(case, labels=torch.full_like(case.labels, -100)))
    assert abs(output.kl.item()) < 1e-12
    assert all(gradient.norm() < 1e-12 for gradient in gradients.values())


def test_weights_that_do_not_fit_are_refused():
    case = make_case()
    with pytest.raises(FormatError, match="every position needs one weight"):
        replace(case.teacher, weights=torch.ones(2))
