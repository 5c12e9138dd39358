"""The numbers that a retention matrix is summed up by, against matrices that another program computed."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from formats.errors import ConfigError
from trainer.chain.config import ChainConfig, Task
from trainer.chain.matrix import FORMULAS, Summary
from trainer.chain.releases import ReleaseReport
from trainer.chain.report import ChainReport, Row

GOLDEN = json.loads((Path(__file__).parents[2] / "golden_theory/sfa_ewc_linear.json").read_text())["chain"]
CHAINS = [name for name in GOLDEN if name != "multitask"]
WRITTEN = {"sequential": 1.5188, "SFA beta .5 p .25": 0.3771, "L2 .3": 1.2663, "LA 1": 0.3771}


@pytest.mark.parametrize("name", CHAINS)
def test_golden_chains(name: str) -> None:
    """Losses become goodness by their sign, so every difference turns round. The matrices are rounded to 5e-5."""
    golden = GOLDEN[name]
    values = Summary.of(-np.array(golden["matrix"])).values
    assert values["accuracy"] == pytest.approx(-golden["final_mean"], abs=5e-5)
    assert values["backward transfer"] == pytest.approx(-golden["backward_transfer"], abs=1e-4)
    assert values["forgetting"] == pytest.approx(golden["forgetting"], abs=1e-4)
    assert values["forward transfer"] == pytest.approx(-golden["forward_transfer"], abs=1e-4)
    assert values["forgetting"] == pytest.approx(WRITTEN[name], abs=1e-4)


def test_label_annealing_at_1_is_sfa_at_a_half() -> None:
    """In the linear model, over a chain of three tasks too."""
    np.testing.assert_array_equal(GOLDEN["LA 1"]["matrix"], GOLDEN["SFA beta .5 p .25"]["matrix"])


def test_by_hand() -> None:
    """Task 1 is best after stage 2, which forgetting sees and backward transfer does not."""
    R = np.array([[-9, -8, -7], [-3, -7, -8], [-2, -4, -6], [-5, -4.5, -1]], float)
    values = Summary.of(
        R, multitask=np.array([-2.0, -2.0, -2.0]), never_seen=np.array([-9.0, -8.0, -7.0])
    ).values
    assert values["accuracy"] == pytest.approx((-5 - 4.5 - 1) / 3)
    assert values["forgetting"] == pytest.approx(((-2 + 5) + (-4 + 4.5)) / 2)
    assert values["backward transfer"] == pytest.approx(((-5 + 3) + (-4.5 + 4)) / 2)
    assert values["forward transfer"] == pytest.approx(((-7 + 8) + (-6 + 7)) / 2)
    assert values["intransigence"] == pytest.approx(((-2 + 3) + (-2 + 4) + (-2 + 1)) / 3)
    assert values["above never seen"] == pytest.approx(((-5 + 9) + (-4.5 + 8)) / 2)
    assert list(values) == list(FORMULAS)


def test_forgetting_counts_stages_that_had_seen_the_task() -> None:
    """A task that the initial model was better at than after its own stage was not forgotten by a later one."""
    R = np.array([[-1, -9], [-4, -9], [-4, -2]], float)
    assert Summary.of(R).values["forgetting"] == 0


def test_one_task_has_nothing_to_forget() -> None:
    values = Summary.of(np.array([[-3.0], [-1.0]])).values
    assert values["accuracy"] == -1 and values["forgetting"] is None and values["intransigence"] is None


def test_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a row per stage .* got the shape \(3, 3\)"):
        Summary.of(np.zeros((3, 3)))


def rows(**models: tuple[float, ...]) -> list[Row]:
    """Label -> cross-entropy per column; the first is the initial model."""
    found = []
    for number, (label, losses) in enumerate(models.items()):
        results = {
            column: {"ce": ce, "perplexity": float(np.exp(ce)), "accuracy": 0.5}
            for column, ce in zip(("one", "two"), losses, strict=True)
        }
        kind = "stage" if number else "initial"
        found.append(Row(label=label, kind=kind, directory=label, results=results, stage=number))
    return found


@pytest.mark.filterwarnings("error")
def test_a_model_that_diverged_leaves_a_report() -> None:
    """It is the worst there is: the reports name another one as the best, and are valid JSON."""
    models = rows(base=(4.0, 5.0), broken=(math.nan, math.nan), good=(3.0, 2.0), last=(3.5, math.nan))
    releases = ReleaseReport(columns=("one", "two"), rows=models)
    assert (releases.lost()["one"]["best"], releases.lost()["one"]["lost"]) == ("good", 0.5)
    assert releases.lost()["one"]["worst_step"] == "broken"
    found = json.loads(json.dumps(releases.to_dict(), allow_nan=False))
    assert found["R"] == [[-4, -5], [None, None], [-3, -2], [-3.5, None]]
    assert found["lost"]["two"] == {"best": "good", "lost": None, "step": None, "worst_step": "broken"}
    assert "inf" in releases.text()
    tasks = {name: Task(train="t", heldout="h") for name in ("one", "two")}
    config = ChainConfig(tasks=tasks, out="o", model="m")
    chain = ChainReport(config=config, columns=("one", "two"), rows=models[:3], failed={})
    found = json.loads(json.dumps(chain.to_dict(), allow_nan=False))
    assert found["R"]["chain"] == [[-4, -5], [None, None], [-3, -2]]
    assert found["summary"]["chain"]["accuracy"] == -2.5
    assert found["summary"]["chain"]["forward transfer"] is None and "inf" in chain.text()
