"""What Theorem 1 says of the complement holds for our own loss: one softmax layer on fixed hidden states.

Every gradient with respect to the output head is a sum of (q - p) h' over rows. So a component of W that is orthogonal
to all hidden states of the fine-tuning text never moves: not by cross-entropy, not by KL, and L2 has nothing to pull
there. Plain SGD keeps it to rounding; Adam, which scales every number by its own history, does not.
"""

import pytest
import torch
from dense_reference import teacher_from_logits

from trainer.loss.label_annealing_loss import label_annealing_loss
from trainer.retention.anchor import Anchor
from trainer.retention.l2 import L2
from trainer.retention.settings import L2Settings

N, D, V, STEPS, RATE = 6, 16, 23, 40, 0.5
METHODS = {"direct": (0.0, None), "label annealing": (1.5, None), "L2": (0.0, 0.3), "both": (1.5, 0.3)}


def trained(kl_coef: float, l2: float | None, direction: str, optimiser: type) -> tuple[torch.Tensor, ...]:
    """W before and after, and an orthonormal basis [D - N, D] of what the hidden states do not span."""
    generator = torch.Generator().manual_seed(7)
    hidden_ND = torch.randn(N, D, generator=generator, dtype=torch.float64)
    labels_N = torch.randint(0, V, (N,), generator=generator)
    head = torch.nn.Linear(D, V, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, D, generator=generator, dtype=torch.float64) / D**0.5)
    before_VD = head.weight.detach().clone()
    # A cache that keeps 9 tokens of every position; the others are one bucket.
    teacher = teacher_from_logits(hidden_ND @ before_VD.T, torch.arange(N), [9] * N, 1.0)
    anchor = Anchor(head)
    anchor.place(head)
    steps = optimiser(head.parameters(), lr=RATE if optimiser is torch.optim.SGD else 1e-2)
    for _ in range(STEPS):
        steps.zero_grad()
        found = label_annealing_loss(
            hidden_ND,
            head.weight,
            labels_N,
            teacher if kl_coef else None,
            kl_coef=kl_coef,
            kl_direction=direction,
        )
        found.loss.backward()
        if l2 is not None:
            L2(L2Settings(coef=l2)).add_gradients(anchor, 1.0)
        steps.step()
    complement = torch.linalg.svd(hidden_ND, full_matrices=True).Vh[N:]
    return before_VD, head.weight.detach(), complement


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("method", METHODS)
def test_weights_orthogonal_to_the_hidden_states_do_not_move(method: str, direction: str) -> None:
    before, after, complement = trained(*METHODS[method], direction, torch.optim.SGD)
    moved = after - before
    assert moved.abs().max() > 0.1, "nothing was trained"
    assert (moved @ complement.T).abs().max() < 1e-12


def test_a_step_that_scales_every_number_moves_them() -> None:
    """The check can fail: Adam leaves the span."""
    before, after, complement = trained(*METHODS["label annealing"], "forward", torch.optim.Adam)
    assert ((after - before) @ complement.T).abs().max() > 1e-3


def test_label_annealing_moves_less_within_the_span() -> None:
    """As in the theorem, where its part within the span is 1 / (1 + lam) of direct fine-tuning's."""
    sizes = {}
    for method in ("direct", "label annealing"):
        before, after, _ = trained(*METHODS[method], "forward", torch.optim.SGD)
        sizes[method] = float((after - before).norm())
    assert sizes["label annealing"] < 0.8 * sizes["direct"]
