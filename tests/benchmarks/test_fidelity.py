"""The fidelity benchmark's claims at a scale that a test can afford, on the same functions."""

import math

import numpy as np
import pytest
import torch
from fidelity import METHODS, measure
from fidelity_targets import capture, sampled_targets, topk_targets

from formats.capture_settings import CaptureSettings

VOCAB_SIZE = 400


@pytest.fixture(scope="module")
def results(teacher):
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, VOCAB_SIZE, (2, 24), generator=generator) for _ in range(3)]
    return measure(
        teacher,
        batches[:1],
        batches[1:],
        stops=[0, 4],
        temperatures=[0.5, 1.0, 2.0],
        learning_rate=1e-3,
        settings=CaptureSettings(min_prob=5e-3, draw_rate=8),
    )


@pytest.mark.parametrize("temperature", (0.5, 1.0, 2.0))
def test_at_the_initial_weights_only_the_cache_pulls_nowhere(results, temperature):
    """The other targets move a model off itself; the cache leaves what the codec rounds off."""
    norms = {m: min(one.relative_to_ce for one in results[0, temperature, m].batches) for m in METHODS}
    assert max(norms["bucket only"], norms["both sides"]) < 5e-3  # the tail left out is no push, yet
    ours = max(one.relative_to_ce for one in results[0, temperature, "cache"].batches)
    assert ours < 5e-3
    assert norms["sampled"] > 20 * ours
    if (
        temperature > 0.5
    ):  # at T = 0.5 the kept tokens hold nearly everything: cutting the tail off is harmless
        assert min(norms["renormalised"], norms["zero-filled"]) > 10 * ours


@pytest.mark.parametrize("temperature", (0.5, 1.0, 2.0))
def test_after_drift_the_cache_is_nearest_to_the_online_gradient(results, temperature):
    errors = {m: results[4, temperature, m].step.relative_error for m in METHODS}
    assert all(math.isfinite(error) for error in errors.values())
    # With 92 positions the noise of the draws is still of the size of the bias that they take away.
    for method in METHODS[2:]:
        assert errors["cache"] < errors[method], method
    for one in results[4, temperature, "cache"].batches:
        assert one.angle < (5 if temperature <= 1 else 15)
        assert abs(one.norm_ratio - 1) < (0.05 if temperature <= 1 else 0.5)


def test_capture_keeps_what_it_says_by_hand():
    """Probabilities 0.9, 0.0995, 0.0005: the last is below the threshold and becomes the tail."""
    probs = torch.tensor([[0.0005, 0.9, 0.0995]], dtype=torch.float64)
    topk = capture(probs.log())
    assert topk.token_ids.tolist() == [1, 2]
    assert np.exp(topk.logprobs) == pytest.approx([0.9, 0.0995], rel=1e-6)
    for temperature in (0.5, 1.0, 2.0):
        assert topk.log_tail(temperature)[0] == pytest.approx(math.log(0.0005) / temperature, rel=1e-5)
    targets, mass = topk_targets(topk, 2.0, 3)
    expected = probs.sqrt() / probs.sqrt().sum()
    assert targets[0].tolist() == pytest.approx([0.0, *expected[0, 1:].tolist()], rel=1e-5)
    assert mass.item() == pytest.approx(expected[0, 1:].sum().item(), rel=1e-5)


@pytest.mark.parametrize("temperature", (0.5, 1.0, 2.0))
def test_sampled_targets_converge_to_the_tempered_distribution(temperature):
    logprobs = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    found = sampled_targets(logprobs, temperature, 200_000, torch.Generator().manual_seed(0))
    assert torch.allclose(found, torch.softmax(logprobs / temperature, -1), atol=0.01)
