"""The bisection on log kl_coef, against functions whose border is known."""

import math

import pytest

from trainer.sweep.search import CLOSE, search


def share_with_border(border: float, asked: list[float]):
    """A share that falls with kl_coef and is 0.9 at the border."""

    def share(kl_coef: float) -> float:
        asked.append(kl_coef)
        return 0.9 * (border / kl_coef) ** 0.1

    return share


@pytest.mark.parametrize("border", [0.02, 0.3, 0.99, 1.0, 1.5, 3.0, 4.0, 40.0])
def test_the_border_is_inside_a_close_bracket(border):
    asked: list[float] = []
    found = search(share_with_border(border, asked), 0.9, 12)
    assert found.close and found.keeps <= border < found.loses and found.loses / found.keeps <= CLOSE
    assert [value for value, _ in found.tried] == asked and len(set(asked)) == len(asked)
    walk = abs(math.log(border) / math.log(4))
    assert len(asked) <= 1 + math.ceil(walk + 1e-9) + 2 + (border == 1.0)


def test_between_one_and_four_it_takes_four_runs():
    asked: list[float] = []
    found = search(share_with_border(1.8, asked), 0.9, 8)
    assert asked == [1, 4, 2, 1.41] and (found.keeps, found.loses) == (1.41, 2)


def test_it_stops_after_the_most_and_says_what_it_knows():
    found = search(lambda kl_coef: 1.0, 0.9, 3)
    assert (found.keeps, found.loses) == (16, None) and "every kl_coef up to 16 keeps 90 %" in found.line(0.9)
    found = search(lambda kl_coef: 0.1, 0.9, 3)
    assert (found.keeps, found.loses) == (None, 0.0625) and "no kl_coef down to 0.0625" in found.line(0.9)


def test_a_run_without_a_result_does_not_keep_the_gain():
    found = search(lambda kl_coef: None if kl_coef > 1 else 1.0, 0.9, 8)
    assert found.close and found.keeps < found.loses and found.keeps >= 1
