"""What was lost, what is gone: the arithmetic, and which rows restore."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from formats.errors import ConfigError
from trainer.restore.config import RestoreConfig
from trainer.restore.shares import LITTLE, Shares
from trainer.restore.text import drawn, easiest

GOLDEN = json.loads((Path(__file__).parents[2] / "golden_theory/probe_tiny.json").read_text())


def nats(entry: dict) -> float:
    return -math.log(entry["ppl"])


def test_a_model_that_diverged_is_not_called_unharmed() -> None:
    for tuned, restored in ((math.nan, -3.0), (-3.5, math.nan)):
        shares = Shares.of(initial=-3.0, tuned=tuned, control=-3.1, restored=restored)
        assert "diverged" in shares.verdict()


def test_measured_runs() -> None:
    """Three runs of another program on the tiny base: what is gone is its number, and less comes back every time."""
    back = []
    for run in GOLDEN["restore"]:
        shares = Shares.of(
            initial=nats(GOLDEN["base"]["source"]),
            tuned=nats(run["after"]),
            control=nats(GOLDEN["control"]),
            restored=nats(run["restored"]),
        )
        assert shares.gone == pytest.approx(run["actual_nats"], abs=1e-9)
        # That program measures what was lost from the control; here it is the initial model's own number.
        drift = nats(GOLDEN["base"]["source"]) - nats(GOLDEN["control"])
        assert shares.lost == pytest.approx(run["lost_nats"] + drift, abs=1e-9)
        back.append(shares.back)
    assert back == sorted(back, reverse=True)
    assert back == pytest.approx([0.7475, 0.4142, 0.3410], abs=1e-3)


def test_a_model_that_was_not_tuned_has_lost_nothing() -> None:
    shares = Shares.of(initial=-3.3, tuned=-3.3, control=-3.4, restored=-3.4)
    assert (shares.lost, shares.gone, shares.hidden, shares.back) == (0, 0, 0, None)
    assert "nothing" in shares.verdict()


def test_what_is_less_than_a_seed_moves_has_no_share() -> None:
    """Else a loss of a thousandth of a nat, of which the text brings back more than there is, says 1805 %."""
    shares = Shares.of(initial=-5.2964, tuned=-5.2973, control=-4.1479, restored=-4.1333)
    assert 0 < shares.lost < LITTLE and shares.hidden > shares.lost
    assert shares.back is None and shares.verdict() == "nothing to speak of was lost"


def test_a_restoring_that_does_nothing_brings_nothing_back() -> None:
    shares = Shares.of(initial=-3.0, tuned=-3.5, control=-3.0, restored=-3.5)
    assert shares.back == 0 and shares.gone == 0.5 and shares.verdict().startswith("gone")
    assert Shares.of(initial=-3.0, tuned=-3.5, control=-3.0, restored=-3.0).back == 1


def test_the_easiest_rows_come_first() -> None:
    ce, tokens, lengths = (
        np.array([9.0, 2.0, 4.0, 0.0, 8.0]),
        np.array([3, 2, 4, 0, 4]),
        np.array([4, 3, 5, 9, 5]),
    )
    assert easiest(ce, tokens, lengths, 1) == [1]
    assert easiest(ce, tokens, lengths, 3) == [1]
    assert easiest(ce, tokens, lengths, 4) == [1, 2]
    assert easiest(ce, tokens, lengths, 10**6) == [1, 2, 4, 0], "a row without loss is never taken"
    assert sorted(drawn(tokens, lengths, 10**6, 0)) == [0, 1, 2, 4]
    assert drawn(tokens, lengths, 10**6, 0) != drawn(tokens, lengths, 10**6, 1) or len(tokens) < 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuned": {}}, "needs a tuned model"),
        ({"tuned": {"control": "x"}}, "not control or initial"),
        ({"source": {}}, "needs held-out text"),
        ({"rank": "best"}, "--rank must be one of low-ppl, random"),
        ({"tokens": 0}, "--tokens must be at least 1"),
        ({"learning_rate": 0.0}, "--lr must be above 0, got 0"),
        ({"training": {"learning_rate": 1.0}}, "--lr says it"),
        ({"training": {"seed": 1}}, "--seed says it"),
    ],
)
def test_bad_settings(changes: dict, message: str) -> None:
    given = {"tuned": {"a": "b"}, "initial": "i", "text": "t", "source": {"s": "c"}, "out": "o"}
    with pytest.raises(ConfigError, match=message):
        RestoreConfig(**{**given, **changes})
