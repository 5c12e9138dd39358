"""The linear theory: closed forms, gradient descent and identities against numbers computed elsewhere.

tests/golden_theory/ holds results of separate numpy programs that share no line with the example.
"""

import json
import sys
from pathlib import Path

import linear_theory as theory
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]

THEOREM = json.loads((ROOT / "tests/golden_theory/theorem1.json").read_text())
LAYERS = json.loads((ROOT / "tests/golden_theory/linear2.json").read_text())
SFA = json.loads((ROOT / "tests/golden_theory/sfa_ewc_linear.json").read_text())
NAMES = {"direct": "direct", "L2": "L2", "LA": "label annealing"}


def test_by_hand() -> None:
    """theta0 = (1, 2, 2), r = 11: numbers that fit on a sheet of paper."""
    problem = theory.by_hand()
    np.testing.assert_allclose(problem.theta0_D, [1, 2, 2], atol=1e-14)
    for key, method, lam in (
        ("direct", "direct", 0),
        ("L2_lam1", "L2", 1),
        ("LA_lam1", "label annealing", 1),
    ):
        theta = theory.solution(problem, method, lam)
        np.testing.assert_allclose(theta, THEOREM["by_hand"][key], atol=1e-12)
        losses = THEOREM["by_hand"]["losses"][key]
        assert problem.source_loss(theta) == pytest.approx(losses["source"], abs=1e-11)
        assert problem.target_loss(theta) == pytest.approx(losses["target"], abs=1e-11)
    # One target example of squared norm 25: label annealing at 1 is L2 at 25.
    np.testing.assert_allclose(
        theory.solution(problem, "L2", 25.0), theory.solution(problem, "label annealing", 1.0), atol=1e-13
    )


@pytest.mark.parametrize("key", NAMES)
def test_descent_reaches_the_theorem_on_whole_numbers(key: str) -> None:
    problem, golden = theory.whole_numbers(), THEOREM["integers"]
    np.testing.assert_allclose(problem.theta0_D, golden["theta0"], atol=1e-14)
    assert theory.learning_rate(problem, 0.5) == pytest.approx(golden["lr"], rel=1e-12)
    theta, _ = theory.descend(problem, NAMES[key], 0.5)
    np.testing.assert_allclose(theta, golden[key]["theta"], atol=1e-13)
    np.testing.assert_allclose(theory.solution(problem, NAMES[key], 0.5), golden[key]["theta"], atol=1e-13)
    assert problem.source_loss(theta) == pytest.approx(golden[key]["source"], abs=1e-12)
    assert problem.target_loss(theta) == pytest.approx(golden[key]["target"], abs=1e-12)


@pytest.mark.parametrize("row", THEOREM["seeded"]["rows"], ids=lambda row: f"{row['method']}-{row['lam']:g}")
def test_descent_reaches_the_theorem_on_drawn_numbers(row: dict) -> None:
    problem, method = theory.seeded(), NAMES[row["method"]]
    theta, _ = theory.descend(problem, method, row["lam"])
    np.testing.assert_allclose(theta, theory.solution(problem, method, row["lam"]), atol=1e-12)
    assert theta[0] == pytest.approx(row["first"], abs=1e-12)
    assert np.linalg.norm(theta) == pytest.approx(row["norm"], abs=1e-12)
    assert np.linalg.norm(theta - problem.theta0_D) == pytest.approx(row["distance"], abs=1e-12)
    assert problem.source_loss(theta) == pytest.approx(row["source"], abs=1e-11)
    assert problem.target_loss(theta) == pytest.approx(row["target"], abs=1e-11)
    # What the target examples do not span stays where it was, to rounding.
    away = theta - problem.theta0_D
    inside = np.linalg.pinv(problem.target_MD) @ (problem.target_MD @ away)
    assert np.max(np.abs(away - inside)) < 1e-13


@pytest.mark.parametrize("lam", [1 / 3, 1.0, 9.0])
def test_label_annealing_wise_ft_and_converged_sfa_are_one_point(lam: float) -> None:
    problem = theory.seeded()
    held = theory.solution(problem, "label annealing", lam)
    np.testing.assert_allclose(theory.wise_ft(problem, 1 / (1 + lam)), held, atol=1e-14)
    for averages in (1, 4):
        np.testing.assert_allclose(theory.sfa(problem, lam / (1 + lam), averages, 2000), held, atol=1e-13)
    early = theory.sfa(problem, lam / (1 + lam), 4, 5)
    assert np.max(np.abs(early - held)) > 1e-3, "SFA that has not converged is another point"
    assert np.max(np.abs(theory.solution(problem, "L2", lam) - held)) > 1e-3


def test_which_of_the_two_keeps_more_depends_on_the_source() -> None:
    """At equal target loss: label annealing where the source asks for what the target asks, L2 where it asks for all
    directions alike.
    """
    found = theory.frontier(theory.seeded())
    for losses in found["like the target"].values():
        assert losses["label annealing"] < losses["L2"]
    for losses in found["alike in every direction"].values():
        assert losses["L2"] < losses["label annealing"]
    # The same order in another program on other numbers.
    for losses in THEOREM["frontier"]["source covariance = target covariance"].values():
        assert losses["LA"]["source"] < losses["L2"]["source"]
    for losses in THEOREM["frontier"]["isotropic source"].values():
        assert losses["L2"]["source"] < losses["LA"]["source"]


def test_no_other_point_keeps_more() -> None:
    """Where each of them wins it is the best there is: of 300 other points with its target loss none is as good."""
    problem, X = theory.seeded(), theory.seeded().target_MD
    draws = np.random.default_rng(3).normal(size=(300, 5))
    kinds = {"label annealing": X.T @ X, "L2": np.eye(20)}
    for method, covariance in kinds.items():
        best = theory.solution(problem, method, 0.8)
        left = X @ best - problem.target_M
        for draw in draws:
            other = left + 0.3 * np.linalg.norm(left) * draw
            other *= np.linalg.norm(left) / np.linalg.norm(other)
            theta = problem.theta0_D + np.linalg.pinv(X) @ (problem.residual_M + other)
            assert problem.target_loss(theta) == pytest.approx(problem.target_loss(best), rel=1e-9)
            assert theory.moved(theta, problem, covariance) > theory.moved(best, problem, covariance)


def test_replay_keeps_both_and_ewc_lies_between() -> None:
    """With fewer examples than weights a model that sees the old examples again has no conflict at all."""
    problem = theory.seeded()
    theta = theory.replay(problem)
    assert problem.source_loss(theta) < 1e-24 and problem.target_loss(theta) < 1e-24
    weights = np.sum(problem.source_ND**2, axis=0)
    held = theory.ewc(problem, 0.7)
    slope = problem.target_MD.T @ (problem.target_MD @ held - problem.target_M)
    np.testing.assert_allclose(slope + 0.7 * weights * (held - problem.theta0_D), 0, atol=1e-12)


def test_sfa_in_every_step_is_l2() -> None:
    alpha, beta = SFA["eq7_alpha_beta"]
    rate = alpha * (1 - beta)
    assert beta / rate == pytest.approx(2.0)
    assert theory.sfa_against_l2(theory.seeded(), rate, beta / rate) < 1e-12
    assert SFA["eq3_equals_eq7_max_error"] < 1e-14


def test_noise_in_two_layers() -> None:
    """Proposition 4.3 step by step, and a Monte Carlo estimate of another program."""
    golden = LAYERS["gaussian"]
    gamma = golden["gamma"]
    np.testing.assert_array_equal(theory.SOURCE_R, golden["sigma_pre"])
    losses = [theory.noise_loss(theory.SOURCE_R, n, gamma) for n in range(7)]
    for n, row in enumerate(golden["rows"]):
        assert losses[n] == pytest.approx(row["perturbed"], abs=1e-12)
        assert losses[n] == pytest.approx(row["monte_carlo"], rel=5e-3)
        if n:
            step = theory.noise_step(theory.SOURCE_R, n, gamma)
            assert step == pytest.approx(row["formula"], abs=1e-14)
            assert losses[n] - losses[n - 1] == pytest.approx(step, abs=1e-13)
    assert int(np.argmin(losses)) == golden["inflection_n"] == 3


def test_noise_formula_against_draws() -> None:
    draws = np.random.default_rng(5).normal(0, 0.25, (4000, 2, 6, 6))
    W1, W2 = theory.pretrained_layers(theory.SOURCE_R, 4)
    losses = [theory.loss_of_product((W1 + a) @ (W2 + b), theory.SOURCE_R) for a, b in draws]
    error = np.std(losses) / np.sqrt(len(losses))
    assert abs(np.mean(losses) - theory.noise_loss(theory.SOURCE_R, 4, 0.25)) < 3 * error


@pytest.mark.parametrize("lam", [0.0, 0.5, 2.0])
def test_fine_tuning_two_layers(lam: float) -> None:
    golden = LAYERS["fine_tuning"][f"lam={lam:g}"]
    np.testing.assert_array_equal(theory.TARGET_R, LAYERS["fine_tuning"]["sigma_ft"])
    rows = theory.overtraining(lam)
    for n, (row, wanted) in enumerate(zip(rows, golden["rows"], strict=True)):
        for ours, theirs in (("base", "base"), ("after", "after"), ("target", "target")):
            assert row[ours] == pytest.approx(wanted[theirs], abs=1e-12)
        if n:  # Theorem A.24: what forgetting grows by
            grown = (row["after"] - row["base"]) - (rows[n - 1]["after"] - rows[n - 1]["base"])
            assert grown == pytest.approx(wanted["formula"], abs=1e-12)
    assert theory.best_n(rows) == golden["best_n"]


def test_fine_tuning_by_descent_reaches_the_limit() -> None:
    for learnt in (1, 4, 6):
        for lam in (0.0, 2.0):
            found = theory.fine_tune_layers(learnt, lam)
            np.testing.assert_allclose(found, theory.fine_tuned(learnt, lam), atol=1e-8)


def test_the_program_prints_the_page(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/theory.md shows what comes out, line by line but for rounding errors, which differ between machines."""
    monkeypatch.setattr(sys, "argv", ["linear_theory.py"])
    theory.main()
    shown = [line for line in capsys.readouterr().out.splitlines() if line and "e-" not in line]
    page = (ROOT / "docs/theory.md").read_text(encoding="utf-8").splitlines()
    assert len(shown) >= 15
    assert [line for line in shown if line.rstrip() not in page] == []
