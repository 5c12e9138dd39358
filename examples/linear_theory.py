"""What theory says of the methods, as something that runs: linear models, numpy, a few seconds.

    python examples/linear_theory.py [--plot docs/theory.png]

1. Theorem 1 of Yang et al. 2024 (label annealing): where direct fine-tuning, L2 and label annealing end in a linear
   model with more weights than examples. Gradient descent is run and reaches the closed forms.
2. In that model label annealing, WiSE-FT and converged SFA are one and the same point; L2 is another one. Which of the
   two keeps more of the source depends on the source, and both cases are shown.
3. SFA that averages after every step of plain SGD is L2 (Kleiman et al. 2025, Eq. 3 and 7).
4. Overtraining in a two-layer linear model (Springer et al. 2025): noise, fine-tuning, and fine-tuning that is held
   to the old outputs.

docs/theory.md explains what comes out. D: weights, N: source examples, M: target examples, R: features of 4.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Array = np.ndarray
METHODS = ("direct", "L2", "label annealing")


# --- 1. one linear layer -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A source that was learnt and a target to learn: fewer examples than weights in both."""

    source_ND: Array
    source_N: Array
    target_MD: Array
    target_M: Array

    @property
    def theta0_D(self) -> Array:
        """The pretrained solution: of all that fit the source the one of smallest norm (their Proposition 4.1)."""
        return np.linalg.pinv(self.source_ND) @ self.source_N

    @property
    def residual_M(self) -> Array:
        """What the pretrained solution gets wrong on the target."""
        return self.target_M - self.target_MD @ self.theta0_D

    def source_loss(self, theta_D: Array) -> float:
        """1/2 ||X~ theta - y~||^2."""
        return float(0.5 * np.sum((self.source_ND @ theta_D - self.source_N) ** 2))

    def target_loss(self, theta_D: Array) -> float:
        """1/2 ||X theta - y||^2."""
        return float(0.5 * np.sum((self.target_MD @ theta_D - self.target_M) ** 2))


def by_hand() -> Problem:
    """Two numbers that everybody can check on paper."""
    return Problem(
        np.array([[1.0, 2.0, 2.0]]), np.array([9.0]), np.array([[0.0, 3.0, 4.0]]), np.array([25.0])
    )


def whole_numbers() -> Problem:
    """Six weights, three source examples, two target examples."""
    source = [[1, 0, 2, 0, 1, 0], [0, 1, 0, 2, 0, 1], [1, 1, 0, 0, 1, 1]]
    target = [[2, 1, 0, 1, 0, 0], [0, 0, 1, 1, 2, 1]]
    return Problem(*(np.array(part, float) for part in (source, [3, -2, 1], target, [4, -1])))


def seeded() -> Problem:
    """Twenty weights, eight and five examples."""
    draw = np.random.RandomState(0).randn
    return Problem(draw(8, 20), draw(8), draw(5, 20), draw(5))


def solution(problem: Problem, method: str, lam: float = 0.0) -> Array:
    """theta, [D], where a method ends by Theorem 1.

    direct           theta0 + X' (X X')^-1 r
    L2               theta0 + X' (X X' + lam I)^-1 r
    label annealing  theta0 + X' (X X')^-1 r / (1 + lam)
    """
    X, r = problem.target_MD, problem.residual_M
    gram = X @ X.T
    if method == "L2":
        return problem.theta0_D + X.T @ np.linalg.solve(gram + lam * np.eye(len(gram)), r)
    step = X.T @ np.linalg.solve(gram, r)
    return problem.theta0_D + (step if method == "direct" else step / (1 + lam))


def gradient(problem: Problem, method: str, lam: float, theta_D: Array) -> Array:
    """Gradient of the target loss plus lam / 2 times ||theta - theta0||^2 (L2), or ||X theta - X theta0||^2."""
    X = problem.target_MD
    found = X.T @ (X @ theta_D - problem.target_M)
    away = theta_D - problem.theta0_D
    if method == "L2":
        found = found + lam * away
    elif method == "label annealing":
        found = found + lam * (X.T @ (X @ away))
    return found


def learning_rate(problem: Problem, lam: float) -> float:
    """Just below the theorem's bound min(1 / s^2, 1 / (lam + s^2), 1 / (lam s^2 + s^2)), s the largest one."""
    squared = np.linalg.norm(problem.target_MD, 2) ** 2
    return 0.99 * float(min(1 / squared, 1 / (lam + squared), 1 / (lam * squared + squared)))


def descend(problem: Problem, method: str, lam: float = 0.0, most: int = 20_000) -> tuple[Array, int]:
    """Gradient descent from theta0 until nothing moves; theta and the number of steps."""
    theta, rate = problem.theta0_D, learning_rate(problem, lam)
    for step in range(most):
        following = theta - rate * gradient(problem, method, lam, theta)
        if np.max(np.abs(following - theta)) < 1e-17 * (1 + np.max(np.abs(theta))):
            return following, step + 1
        theta = following
    return theta, most


# --- 2. which methods are one, and which keep more ---------------------------------------------------------


def wise_ft(problem: Problem, alpha: float) -> Array:
    """(1 - alpha) theta0 + alpha theta_direct."""
    return (1 - alpha) * problem.theta0_D + alpha * solution(problem, "direct")


def sfa(problem: Problem, beta: float, averages: int, steps: int) -> Array:
    """Gradient descent that goes back by beta to theta0 `averages` times, `steps` steps before each."""
    theta, rate = problem.theta0_D, learning_rate(problem, 0.0)
    for _ in range(averages):
        for _ in range(steps):
            theta = theta - rate * gradient(problem, "direct", 0.0, theta)
        theta = beta * problem.theta0_D + (1 - beta) * theta
    return theta


def ewc(problem: Problem, lam: float) -> Array:
    """EWC with the diagonal of the source's Fisher information, F = diag(X~' X~)."""
    X, spread = problem.target_MD, 1 / np.sum(problem.source_ND**2, axis=0)
    gram = (X * spread) @ X.T
    return problem.theta0_D + spread * (
        X.T @ np.linalg.solve(gram + lam * np.eye(len(gram)), problem.residual_M)
    )


def replay(problem: Problem) -> Array:
    """The point nearest to theta0 that fits the old examples and the new ones."""
    both = np.vstack([problem.source_ND, problem.target_MD])
    labels = np.concatenate([problem.source_N, problem.target_M])
    return problem.theta0_D + np.linalg.pinv(both) @ (labels - both @ problem.theta0_D)


def strength_for(share: float, loss_of: Callable[[float], float], initial: float) -> float:
    """The lam at which the target loss is this share of the initial one, by bisection; losses grow with lam."""
    low, high = 1e-12, 1e12
    for _ in range(200):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if loss_of(middle) < share * initial else (low, middle)
    return float(np.sqrt(low * high))


def moved(theta_D: Array, problem: Problem, covariance_DD: Array) -> float:
    """1/2 (theta - theta0)' C (theta - theta0): the source loss where the source has this covariance."""
    away = theta_D - problem.theta0_D
    return float(0.5 * away @ covariance_DD @ away)


def frontier(problem: Problem, shares: tuple[float, ...] = (0.5, 0.1, 0.01)) -> dict[str, dict[float, dict]]:
    """Source loss of L2 and label annealing at equal target loss, for two kinds of source.

    Returns:
        source -> share of the initial target loss -> {"L2": loss, "label annealing": loss}.
    """
    X, initial = problem.target_MD, problem.target_loss(problem.theta0_D)
    kinds = {"like the target": X.T @ X, "alike in every direction": np.eye(X.shape[1])}
    found: dict[str, dict[float, dict]] = {kind: {} for kind in kinds}
    for share in shares:
        ends = {}
        for method in ("L2", "label annealing"):

            def loss_of(lam: float, method: str = method) -> float:
                return problem.target_loss(solution(problem, method, lam))

            lam = strength_for(share, loss_of, initial)
            ends[method] = solution(problem, method, lam)
        for kind, covariance in kinds.items():
            found[kind][share] = {name: moved(theta, problem, covariance) for name, theta in ends.items()}
    return found


# --- 3. SFA in every step is L2 ----------------------------------------------------------------------------


def sfa_against_l2(problem: Problem, rate: float, lam: float, steps: int = 200) -> float:
    """The largest difference between the two paths: L2 with SGD at `rate`, and SGD at rate / (1 - rate lam) whose
    weights go back by beta = rate * lam after every step.
    """
    start = problem.theta0_D
    held, averaged, worst = start, start, 0.0
    alpha, beta = rate / (1 - rate * lam), rate * lam
    for _ in range(steps):
        held = held - rate * (gradient(problem, "direct", 0.0, held) + lam * (held - start))
        averaged = beta * start + (1 - beta) * (averaged - alpha * gradient(problem, "direct", 0.0, averaged))
        worst = max(worst, float(np.max(np.abs(held - averaged))))
    return worst


# --- 4. two linear layers, trained for longer and longer ---------------------------------------------------

SOURCE_R = np.array([3.0, 2.0, 1.2, 0.7, 0.4, 0.2])
"""Singular values of what pretraining learns, one after the other (their Theorem 4.1)."""
TARGET_R = np.array([3.2, 2.1, 1.0, 2.2, 1.5, 0.9])
"""And of what fine-tuning asks for: from the fourth on something else."""


def pretrained_layers(source_R: Array, num_learnt: int) -> tuple[Array, Array]:
    """W1 and W2, [R, R], after `num_learnt` features: W1 W2 = diag(s_1 ... s_n, 0 ...)."""
    roots = np.diag(np.sqrt(np.where(np.arange(len(source_R)) < num_learnt, source_R, 0.0)))
    return roots, roots.copy()


def loss_of_product(product_RR: Array, values_R: Array) -> float:
    """||W1 W2 - A||^2, which is E ||W1 W2 x - A x||^2 for x ~ N(0, I)."""
    return float(np.sum((product_RR - np.diag(values_R)) ** 2))


def noise_loss(source_R: Array, num_learnt: int, gamma: float) -> float:
    """E of the source loss when N(0, gamma^2) is added to every weight of both layers, in closed form."""
    dim, learnt = len(source_R), source_R[:num_learnt]
    base = float(np.sum(source_R[num_learnt:] ** 2))
    return base + 2 * dim * gamma**2 * float(np.sum(learnt)) + dim**3 * gamma**4


def noise_step(source_R: Array, num_learnt: int, gamma: float) -> float:
    """What the n-th feature adds to it: (2 d gamma^2 - s_n) s_n (their Proposition 4.3)."""
    value = source_R[num_learnt - 1]
    return float((2 * len(source_R) * gamma**2 - value) * value)


def fine_tune_layers(num_learnt: int, lam: float, rate: float = 0.01, steps: int = 60_000) -> Array:
    """Gradient descent on ||W1 W2 - A_ft||^2 + lam ||W1 W2 - (W1 W2 at the start)||^2; the product, [R, R].

    The penalty is on what the model computes: it is label annealing with squares.
    """
    W1, W2 = pretrained_layers(SOURCE_R, num_learnt)
    start, wanted = W1 @ W2, np.diag(TARGET_R)
    rate = rate / (1 + lam)
    for _ in range(steps):
        product = W1 @ W2
        pull = (product - wanted) + lam * (product - start)
        before = W1
        W1, W2 = W1 - 2 * rate * pull @ W2.T, W2 - 2 * rate * before.T @ pull
        if np.max(np.abs(W1 @ W2 - product)) == 0:
            break
    return W1 @ W2


def fine_tuned(num_learnt: int, lam: float) -> Array:
    """The limit: (s_ft + lam s_pre) / (1 + lam) for every feature that was learnt, 0 for the others."""
    held = (TARGET_R + lam * SOURCE_R) / (1 + lam)
    return np.diag(np.where(np.arange(len(SOURCE_R)) < num_learnt, held, 0.0))


def overtraining(lam: float, *, descend_too: bool = False) -> list[dict[str, float]]:
    """Source and target loss after fine-tuning a model that has learnt n = 0, 1, ... features."""
    rows = []
    for learnt in range(len(SOURCE_R) + 1):
        product = fine_tune_layers(learnt, lam) if descend_too else fine_tuned(learnt, lam)
        rows.append(
            {
                "n": learnt,
                "base": float(np.sum(SOURCE_R[learnt:] ** 2)),
                "after": loss_of_product(product, SOURCE_R),
                "target": loss_of_product(product, TARGET_R),
            }
        )
    return rows


def best_n(rows: list[dict[str, float]], key: str = "after") -> int:
    """The number of features after which more pretraining harms."""
    return int(min(rows, key=lambda row: row[key])["n"])


# --- what is printed and drawn -----------------------------------------------------------------------------


def report() -> str:
    """All of it as text."""
    problem, lam = seeded(), 1.0
    lines = ["1. where gradient descent ends (20 weights, 8 source and 5 target examples, lam 1)", ""]
    lines.append(f"   {'':<18}{'source loss':>12}{'target loss':>12}{'from the formula':>18}{'steps':>7}")
    theta0 = problem.theta0_D
    lines.append(
        f"   {'pretrained':<18}{problem.source_loss(theta0):>12.4f}{problem.target_loss(theta0):>12.4f}"
    )
    for method in METHODS:
        theta, steps = descend(problem, method, lam)
        error = np.max(np.abs(theta - solution(problem, method, lam)))
        losses = f"{problem.source_loss(theta):>12.4f}{problem.target_loss(theta):>12.4f}"
        lines.append(f"   {method:<18}{losses}{error:>18.0e}{steps:>7}")
    held = solution(problem, "label annealing", lam)
    same = {
        "WiSE-FT, alpha 1 / (1 + lam)": wise_ft(problem, 1 / (1 + lam)),
        "SFA, beta lam / (1 + lam), converged": sfa(problem, lam / (1 + lam), 4, 3000),
        "SFA, the same, 5 steps between averages": sfa(problem, lam / (1 + lam), 4, 5),
    }
    lines += ["", "2. label annealing against"]
    lines += [f"   {name:<42}{np.max(np.abs(theta - held)):>10.0e} apart" for name, theta in same.items()]
    lines += ["", "   source loss at equal target loss        share of it   L2  label annealing"]
    for kind, shares in frontier(problem).items():
        for share, found in shares.items():
            first = f"source {kind}" if share == 0.5 else ""
            lines.append(f"   {first:<40}{share:>8g}{found['L2']:>9.3f}{found['label annealing']:>12.3f}")
    gap = sfa_against_l2(problem, 0.01, 2.0)
    lines += ["", f"3. SFA in every step of SGD against L2: {gap:.0e} apart in 200 steps"]
    lines += ["", "4. source loss after n features of pretraining"]
    lines.append("   n                     " + "".join(f"{n:>8}" for n in range(len(SOURCE_R) + 1)))
    curves = overtraining_curves()
    for name, values in curves.items():
        lines.append(f"   {name:<22}" + "".join(f"{value:>8.2f}" for value in values))
    return "\n".join(lines)


def overtraining_curves() -> Mapping[str, list[float]]:
    """Name -> source loss for every n."""
    found = {"as pretrained": [row["base"] for row in overtraining(0.0)]}
    found["with noise"] = [noise_loss(SOURCE_R, n, 0.25) for n in range(len(SOURCE_R) + 1)]
    for lam in (0.0, 0.5, 2.0):
        name = f"fine-tuned, lam {lam:g}"
        found[name] = [row["after"] for row in overtraining(lam)]
    return found


def plot(path: Path) -> None:
    """Source against target loss, and loss against pretraining."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    problem, strengths = seeded(), np.logspace(-3, 4, 120)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.9), layout="constrained")
    curves = {
        "label annealing = WiSE-FT = SFA": ("#0072B2", lambda lam: solution(problem, "label annealing", lam)),
        "L2": ("#D55E00", lambda lam: solution(problem, "L2", lam)),
        "EWC": ("#009E73", lambda lam: ewc(problem, lam)),
    }
    for name, (colour, theta_of) in curves.items():
        points = [theta_of(lam) for lam in strengths]
        left.plot(
            [problem.target_loss(theta) for theta in points],
            [problem.source_loss(theta) for theta in points],
            color=colour,
            label=name,
        )
    single = {
        "pretrained": (problem.theta0_D, "o", (-52, 8)),
        "direct": (solution(problem, "direct"), "s", (8, -4)),
        "replay": (replay(problem), "D", (8, 5)),
    }
    for name, (theta, marker, place) in single.items():
        at = (problem.target_loss(theta), problem.source_loss(theta))
        left.plot(*at, marker, color="black", markersize=5)
        left.annotate(name, at, textcoords="offset points", xytext=place)
    left.set(xlabel="target loss", ylabel="source loss", title="one layer: what the strength buys")
    left.legend(frameon=False)
    colours = ("#5f6368", "#CC79A7", "#D55E00", "#56B4E9", "#0072B2")
    for (name, values), colour in zip(overtraining_curves().items(), colours, strict=True):
        shown = [value if value > 0 else np.nan for value in values]  # all learnt: nothing is lost
        right.plot(range(len(values)), shown, "o-", color=colour, label=name, markersize=4)
    right.set(xlabel="features learnt in pretraining", ylabel="source loss", yscale="log")
    right.set_title("two layers: more pretraining can harm")
    right.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=80)


def main() -> None:
    """Print, and draw on request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, help="also draw the picture (needs matplotlib)")
    arguments = parser.parse_args()
    print(report())
    if arguments.plot is not None:
        plot(arguments.plot)


if __name__ == "__main__":
    main()
