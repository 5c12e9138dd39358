"""Tail draws: the fused gradient against the dense reference, and their mean against the full KL."""

from dataclasses import replace

import pytest
import torch
from dense_reference import dense_logits, online_two_model_kl, relative_error, teacher_from_logits
from loss_cases import Case, cast, dense_gradients, fused_gradients, make_case
from loss_on_device import label_annealing_loss

from formats.errors import FormatError

TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 6e-2}
HEADS = {
    "plain": {},
    "all": dict(with_bias=True, softcap=4.0, scale=1.7, padding=3),
    "chunks": dict(num_rows=29, vocab_size=300, hidden_size=12),
    "far away": dict(drift=6.0, vocab_size=60, max_kept=3),
    "drawn often": dict(draw_rate=60.0),
    "the whole vocabulary": dict(vocab_size=6, max_kept=6),
}


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_gradients_equal_the_dense_reference(head, dtype, temperature):
    options = {"drift": 0.3, "draw_rate": 4.0, **HEADS[head]}
    case = cast(make_case(temperature=temperature, **options), dtype)
    tolerance = TOLERANCE[dtype]
    for chunk_size in (None, 4):
        output, gradients = fused_gradients(case, kl_coef=0.7, chunk_size=chunk_size)
        expected, expected_gradients = dense_gradients(case, kl_coef=0.7)
        assert output.kl.item() == pytest.approx(expected.kl.item(), rel=tolerance, abs=tolerance)
        for name, gradient in gradients.items():
            assert relative_error(gradient, expected_gradients[name]) < tolerance, name


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_no_draw_pulls_anywhere_at_the_initial_weights(temperature):
    case = make_case(temperature=temperature, drift=0.0, draw_rate=8.0)
    case = replace(case, labels=torch.full_like(case.labels, -100))
    assert len(case.teacher.draw_ids) > 20
    output, gradients = fused_gradients(case)
    assert abs(output.kl.item()) < 1e-12
    assert all(gradient.norm() < 1e-12 for gradient in gradients.values())


def every_token_drawn(teacher_logits, counts, temperature):
    """Each tail token once, at a weight of one: the mean over all draws of any rate."""
    ones = torch.ones_like(teacher_logits)
    return teacher_from_logits(
        teacher_logits, range(len(counts)), counts, temperature, draws=(ones.long(), ones)
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_mean_over_all_draws_is_the_full_kl(temperature):
    """The estimate is linear in the draws, so its mean is what every token at its expected number gives.

    Not a limited one: each token of this tail stands for itself alone, and so has its share of one at most.
    """
    torch.manual_seed(0)
    weight = torch.randn(40, 6, dtype=torch.float64)
    before = torch.randn(8, 6, dtype=torch.float64)
    after = before + 0.3 * torch.randn(8, 6, dtype=torch.float64)
    teacher = every_token_drawn(before @ weight.T, [5] * 8, temperature)
    case = Case(after, weight, torch.full((8,), -100), teacher)
    output, found = fused_gradients(case)
    hidden, head = after.clone().requires_grad_(), weight.clone().requires_grad_()
    kl = online_two_model_kl(dense_logits(hidden, head), before @ weight.T, temperature) / 8
    kl.backward()
    assert output.kl.item() == pytest.approx(kl.item(), rel=1e-10)
    assert relative_error(found["hidden"], hidden.grad) < 1e-10
    assert relative_error(found["weight"], head.grad) < 1e-10


def test_systematic_draws_of_the_builder_average_to_the_full_gradient():
    """Through `draw` of formats: over an even grid of starts the mean gradient is the two-model gradient."""
    from formats.logprobs.tail_draws import draw

    torch.manual_seed(1)
    weight, before = torch.randn(50, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    after = before + 0.3 * torch.randn(4, 6, dtype=torch.float64)
    logits = before @ weight.T
    logprobs = torch.log_softmax(logits, -1)
    grid, total = 400, 0.0
    order = torch.argsort(logprobs, descending=True)
    tail = order[:, 5:]
    for step in range(grid):
        drawn = draw(
            torch.arange(5).numpy() * tail.shape[1],
            tail.flatten().numpy(),
            logprobs.gather(1, tail).flatten().numpy(),
            4,
            torch.full((4,), (step + 0.5) / grid).numpy(),
        )
        counts = torch.zeros_like(logits).long()
        row = torch.as_tensor(drawn.counts).cumsum(0)
        which = torch.searchsorted(row, torch.arange(len(drawn.token_ids)), right=True)
        counts.index_put_(
            (which, torch.as_tensor(drawn.token_ids).long()), torch.ones(len(which)).long(), accumulate=True
        )
        expected = 4 * logprobs.exp() ** 0.75
        teacher = teacher_from_logits(logits, range(4), [5] * 4, 1.0, draws=(counts, expected))
        _, found = fused_gradients(Case(after, weight, torch.full((4,), -100), teacher))
        total = total + found["hidden"] / grid
    hidden = after.clone().requires_grad_()
    (online_two_model_kl(hidden @ weight.T, logits, 1.0) / 4).backward()
    assert relative_error(total, hidden.grad) < 2e-3


LIMITED = {
    "expected once: in full": (9.0, 1.0, None),
    "expected rarely: a share of one": (9.0, 0.01, "share"),
    "expected hardly ever, hardly likelier: in full": (2.0, 1e-4, None),
    "expected hardly ever: ten times its p": (4.0, 1e-4, "ratio"),
}


@pytest.mark.parametrize("temperature", (1.0, 2.0))
@pytest.mark.parametrize("name", LIMITED)
def test_one_draw_cannot_outweigh_all_others(name, temperature):
    """A token that the student made e^distance times likelier, drawn once where `expected` were."""
    distance, expected, limited = LIMITED[name]
    logits = torch.zeros(1, 8, dtype=torch.float64)
    logits[0, 7] = -distance * temperature
    counts = torch.zeros(1, 8).long()
    counts[0, 7] = 1
    draws = (counts, torch.full((1, 8), expected, dtype=torch.float64))
    teacher = teacher_from_logits(logits, [0], [2], temperature, draws=draws)
    weight, hidden = torch.eye(8, dtype=torch.float64), torch.zeros(1, 8, dtype=torch.float64)
    case = Case(hidden, weight, torch.full((1,), -100), teacher)
    _, found = fused_gradients(case)
    _, without = fused_gradients(replace(case, teacher=teacher.without_draws()))
    p = torch.softmax(logits[0] / temperature, 0)
    pull = (found["hidden"] - without["hidden"])[0]
    assert pull.sum().item() == pytest.approx(0.0, abs=1e-13)
    share = 1 / 6  # of each tail token under the student, which pays for what the drawn one gets
    r = {None: p[2:].sum() * share / p[7], "share": expected / p[7], "ratio": 10.0}[limited]
    assert r <= p[2:].sum() * share / p[7] * (1 + 1e-9)
    by_hand = (r - 1) * p[7] / expected / temperature * (1 - share)
    assert pull[7].item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_a_hand_computed_draw():
    """Kept {0}, tail {1, 2}, p = (0.5, 0.3, 0.2); the student is even; token 2 was drawn, expected 0.4."""
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    counts = torch.tensor([[0, 0, 1]])
    teacher = teacher_from_logits(p.log(), [0], [1], 1.0, draws=(counts, torch.full((1, 3), 0.4)))
    case = Case(
        torch.zeros(1, 3, dtype=torch.float64),
        torch.eye(3, dtype=torch.float64),
        torch.tensor([-100]),
        teacher,
    )
    output, found = fused_gradients(case)
    r = 0.5 * 0.5 / 0.2  # the tail's mass times the student's share of it, over p
    bucket = 0.5 * torch.tensor(0.5 / (1 / 3)).log() + 0.5 * torch.tensor(0.5 / (2 / 3)).log()
    estimate = 0.2 / 0.4 * (r - 1 - torch.tensor(r).log())
    assert output.kl.item() == pytest.approx((bucket + estimate).item(), rel=1e-6)
    at_draw = 0.2 / 0.4 * (r - 1)
    expected = [1 / 3 - 0.5, (2 / 3 - 0.5) / 2 - at_draw / 2, (2 / 3 - 0.5) / 2 + at_draw / 2]
    assert found["hidden"][0].tolist() == pytest.approx(expected)


def test_reverse_does_without():
    case = make_case(drift=0.3, draw_rate=8.0)
    _, with_draws = fused_gradients(case, kl_direction="reverse")
    _, without = fused_gradients(replace(case, teacher=case.teacher.without_draws()), kl_direction="reverse")
    assert all(torch.equal(with_draws[name], without[name]) for name in without)


def test_no_draws_at_all_change_nothing_but_the_reported_value():
    case = make_case(drift=0.3, draw_rate=8.0)
    none = torch.empty(0, dtype=torch.float64)
    offsets = torch.zeros(len(case.teacher) + 1, dtype=torch.int64)
    empty = replace(
        case.teacher, draw_offsets=offsets, draw_ids=none.int(), draw_logprobs=none, draw_weights=none
    )
    one, found = fused_gradients(replace(case, teacher=empty))
    other, expected = fused_gradients(replace(case, teacher=case.teacher.without_draws()))
    assert torch.equal(one.kl, other.kl)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_draws_that_do_not_fit_are_refused():
    teacher = make_case(draw_rate=8.0).teacher
    with pytest.raises(FormatError, match="draws need"):
        replace(teacher, draw_weights=None)
    with pytest.raises(FormatError, match="draws need"):
        replace(teacher, draw_offsets=teacher.draw_offsets[1:])
    case = make_case(draw_rate=8.0)
    wrong = case.teacher.draw_ids.clone()
    wrong[0] = 37
    with pytest.raises(FormatError, match=r"drawn token ids must lie in \[0, 37\), got 37"):
        label_annealing_loss(case.hidden, case.weight, case.labels, replace(case.teacher, draw_ids=wrong))
    offsets = case.teacher.draw_offsets.clone()
    offsets[1], offsets[2] = offsets[-1], 0
    with pytest.raises(FormatError, match="drawn offsets must ascend"):
        label_annealing_loss(
            case.hidden, case.weight, case.labels, replace(case.teacher, draw_offsets=offsets)
        )
    kept = case.teacher.token_ids[:1].repeat(len(wrong))
    with pytest.raises(FormatError, match="must not be a kept token"):
        replace(case.teacher, draw_ids=kept).validate(num_rows=13, vocab_size=37)
