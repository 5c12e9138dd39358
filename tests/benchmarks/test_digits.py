"""The digits benchmark: both ends of SFA are known points, and a larger beta keeps more of the old task."""

import pytest
import torch

pytest.importorskip("sklearn")

import digits


@pytest.fixture(scope="module")
def found():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield digits.run_seed(0)
    torch.set_num_threads(before)


def test_beta_0_is_one_after_the_other(found) -> None:
    assert found["SFA over beta", 0.0] == found["one after the other", None]


def test_a_larger_beta_keeps_more_of_the_old_task(found) -> None:
    old = [found["SFA over beta", beta][0] for beta in digits.BETAS]
    assert old == sorted(old) and old[-1] > old[0] + 0.3
    new = [found["SFA over beta", beta][1] for beta in digits.BETAS]
    assert new[0] > new[-1]


def test_the_corners(found) -> None:
    assert found["even alone", None][0] > 0.9 and found["even alone", None][1] == 0
    assert found["one after the other", None][0] < 0.6 < 0.9 < found["one after the other", None][1]
    assert min(found["both at once", None]) > 0.9


def test_the_fisher_information_of_the_output_bias() -> None:
    """d log p_k / d b = e_k - p, so F of the bias is the mean of p (1 - p)."""
    data = digits.load_digits(0).train["even"]
    model = digits.network(0)
    p = model(data[0][:200]).softmax(-1)
    expected = (p * (1 - p)).mean(0)
    assert torch.allclose(digits.fisher(model, data)["2.bias"], expected, atol=1e-6)


def test_the_table(found) -> None:
    text = digits.table({key: [pair, pair] for key, pair in found.items()})
    assert text.count("\n") == len(found) + 1 and "| EWC | 100 |" in text
