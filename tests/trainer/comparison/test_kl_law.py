"""The fit through the origin, against curves whose coefficients are known."""

import numpy as np
import pytest

from trainer.comparison.kl_law import kl_law


def test_a_parabola_is_found():
    x = np.array([0.05, 0.1, 0.4, 0.7, 0.9])
    found = kl_law(x, 0.3 * x + 0.2 * x**2)
    assert found.quadratic.coefficients == pytest.approx((0.3, 0.2), rel=1e-9)
    assert found.quadratic.r_squared == pytest.approx(1)
    slope = (x * (0.3 * x + 0.2 * x**2)).sum() / (x**2).sum()
    assert found.linear.coefficients == pytest.approx((slope,)) and 0.9 < found.linear.r_squared < 1
    assert found.num_models == 5 and "R^2 1.000" in found.text()
    assert found.to_dict()["quadratic"]["coefficients"] == pytest.approx([0.3, 0.2])


def test_r_squared_is_against_the_mean_and_may_be_negative():
    x, y = np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])
    found = kl_law(x, y)
    slope = 10 / 14
    rest = ((y - slope * x) ** 2).sum()
    assert found.linear.r_squared == pytest.approx(1 - rest / 2) and found.linear.r_squared < 0
    assert found.quadratic is None and found.to_dict()["quadratic"] is None


def test_too_few_models_have_no_law():
    assert kl_law([0.1, 0.2], [1.0, 2.0]) is None
    assert kl_law([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]) is None
    assert kl_law([0.1, 0.2, 0.3], [1.0, 1.0, 1.0]).linear.r_squared is None
