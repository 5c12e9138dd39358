"""Figure 1 of "Soup to Go" (Kleiman et al. 2025) on digits that come with scikit-learn: even digits, then odd ones.

A small network (64-32-10) learns the even digits, then the odd ones, by SFA over beta and over the batches between two
averages, by L2, EWC and label annealing over their strengths; single tasks, one after the other and both at once stand
beside them. L2, EWC and the steps of SFA's averages are those of `anneal train`. Eight by eight pixels instead of
MNIST's 28 x 28, so nothing is downloaded; a minute on one core.

    python benchmarks/digits.py [--seeds 5] [--plot FILE.png]      # needs scikit-learn
"""

import argparse
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from trainer.retention.anchor import Anchor
from trainer.retention.l2 import L2
from trainer.retention.method import add_quadratic
from trainer.retention.settings import L2Settings
from trainer.retention.sfa import averaging_steps

EPOCHS, BATCH, RATE = 20, 32, 1e-3
BETAS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
PERIODS = (1.0, 0.5, 0.25, 0.1, 0.05)
L2_COEFS = (0.001, 0.01, 0.1, 1.0)
EWC_COEFS = (1.0, 10.0, 100.0, 1000.0)
KL_COEFS = (0.3, 1.0, 3.0, 10.0)
Data = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Digits:
    """Images [N, 64] in [0, 1] and labels [N], by parity, for training and for testing."""

    train: dict[str, Data]
    test: dict[str, Data]


def load_digits(seed: int) -> Digits:
    """Scikit-learn's 1,797 digits; a fifth of each task is for testing."""
    from sklearn.datasets import load_digits as bundled

    pixels, labels = (torch.as_tensor(part) for part in bundled(return_X_y=True))
    pixels = pixels.float() / 16
    generator = torch.Generator().manual_seed(seed)
    train, test = {}, {}
    for name, parity in (("even", 0), ("odd", 1)):
        mine = (labels % 2 == parity).nonzero().squeeze(1)
        mine = mine[torch.randperm(len(mine), generator=generator)]
        cut = len(mine) // 5
        test[name] = (pixels[mine[:cut]], labels[mine[:cut]])
        train[name] = (pixels[mine[cut:]], labels[mine[cut:]])
    train["both"] = tuple(torch.cat([train[n][i] for n in ("even", "odd")]) for i in (0, 1))  # type: ignore[assignment]
    return Digits(train, test)


def network(seed: int) -> nn.Sequential:
    """64-32-10."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def fisher(model: nn.Module, data: Data) -> dict[str, torch.Tensor]:
    """The diagonal of the Fisher information at these weights: the mean over images and over all ten labels, by their
    probability, of the squared gradient."""
    pixels, _ = data
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for image in pixels[:200]:
        logprobs = model(image).log_softmax(-1)
        for label in range(10):
            model.zero_grad()
            logprobs[label].backward(retain_graph=True)
            weight = float(logprobs[label].detach().exp()) / len(pixels[:200])
            for name, p in model.named_parameters():
                assert p.grad is not None  # every weight is in every output's graph
                found[name] += weight * p.grad.square()
    model.zero_grad()
    return found


def train(
    model: nn.Module,
    data: Data,
    seed: int,
    *,
    penalty: Callable[[Anchor], object] | None = None,
    beta: float | None = None,
    period: float = 0.25,
    kl_coef: float = 0.0,
) -> nn.Module:
    """Adam on batches in an order of the seed; `penalty` adds to the gradients, `beta` averages with the weights at the
    start, `kl_coef` holds the outputs to those of the network at the start."""
    anchor = Anchor(model)
    anchor.place(model)
    pixels, labels = data
    with torch.no_grad():
        before = model(pixels).log_softmax(-1)
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    steps = EPOCHS * (len(pixels) // BATCH)
    averages = set(averaging_steps(period, steps)) if beta is not None else set()
    step = 0
    for _ in range(EPOCHS):
        order = torch.randperm(len(pixels), generator=generator)
        for start in range(0, len(order) - BATCH + 1, BATCH):
            batch, step = order[start : start + BATCH], step + 1
            logprobs = model(pixels[batch]).log_softmax(-1)
            loss = functional.nll_loss(logprobs, labels[batch])
            if kl_coef:
                kl = functional.kl_div(logprobs, before[batch], log_target=True, reduction="batchmean")
                loss = loss + kl_coef * kl
            optimiser.zero_grad()
            loss.backward()
            if penalty is not None:
                penalty(anchor)
            optimiser.step()
            if step in averages and beta is not None:
                with torch.no_grad():
                    for held in anchor.held:
                        held.value.lerp_(held.initial, beta)
    return model


def accuracies(model: nn.Module, digits: Digits) -> tuple[float, float]:
    """(even, odd), shares of the test images."""
    found = []
    for name in ("even", "odd"):
        pixels, labels = digits.test[name]
        found.append(float((model(pixels).argmax(-1) == labels).float().mean()))
    return found[0], found[1]


def run_seed(seed: int) -> dict[tuple[str, float | None], tuple[float, float]]:
    """(method, strength) -> accuracies on (even, odd)."""
    digits = load_digits(seed)
    even = train(network(seed), digits.train["even"], seed)
    weights = {name: p.detach().clone() for name, p in even.named_parameters()}
    F = fisher(even, digits.train["even"])

    def second(**options: object) -> tuple[float, float]:
        model = network(seed)
        model.load_state_dict(weights)
        return accuracies(train(model, digits.train["odd"], seed + 1, **options), digits)  # type: ignore[arg-type]

    found: dict[tuple[str, float | None], tuple[float, float]] = {
        ("even alone", None): accuracies(even, digits),
        ("odd alone", None): accuracies(train(network(seed), digits.train["odd"], seed + 1), digits),
        ("both at once", None): accuracies(train(network(seed), digits.train["both"], seed), digits),
        ("one after the other", None): second(),
    }
    for beta in BETAS:
        found["SFA over beta", beta] = second(beta=beta)
    for period in PERIODS:
        found["SFA over period", period] = second(beta=0.5, period=period)
    for coef in L2_COEFS:
        l2 = L2(L2Settings(coef=coef))
        found["L2", coef] = second(penalty=lambda anchor, l2=l2: l2.add_gradients(anchor, 1.0))
    for coef in EWC_COEFS:
        found["EWC", coef] = second(penalty=lambda anchor, c=coef: add_quadratic(anchor, c, F, 1.0))
    for coef in KL_COEFS:
        found["label annealing", coef] = second(kl_coef=coef)
    return found


def table(found: dict[tuple[str, float | None], list[tuple[float, float]]]) -> str:
    """Means and standard deviations over seeds."""
    lines = ["| method | strength | even (old) | odd (new) | mean |", "|---|---|---|---|---|"]
    for (method, strength), pairs in found.items():
        cells = [spread([pair[side] for pair in pairs]) for side in (0, 1)]
        mean = statistics.fmean(sum(pair) / 2 for pair in pairs)
        shown = "" if strength is None else f"{strength:g}"
        lines.append(f"| {method} | {shown} | {cells[0]} | {cells[1]} | {100 * mean:.1f} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """`93.1 +- 0.8`, in percent."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.fmean(values):.1f} +- {100 * deviation:.1f}"


def means(
    found: dict[tuple[str, float | None], list[tuple[float, float]]], method: str
) -> list[tuple[float, float]]:
    """Means over seeds of one method, in the order of its strengths."""
    return [
        (statistics.fmean(p[0] for p in pairs), statistics.fmean(p[1] for p in pairs))
        for (name, _), pairs in found.items()
        if name == method
    ]


def plot(found: dict[tuple[str, float | None], list[tuple[float, float]]], path: Path) -> None:
    """Accuracy on the old task against that on the new one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4.4), layout="constrained")
    for method in dict.fromkeys(name for name, _ in found):
        points = [(100 * new, 100 * old) for old, new in means(found, method)]
        axes.plot(*zip(*points, strict=True), "o-" if len(points) > 1 else "D", label=method, markersize=5)
    axes.set(xlabel="accuracy on odd digits (new), %", ylabel="accuracy on even digits (old), %")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=100)


def collect(seeds: Iterable[int]) -> dict[tuple[str, float | None], list[tuple[float, float]]]:
    """(method, strength) -> a pair per seed."""
    found: dict[tuple[str, float | None], list[tuple[float, float]]] = {}
    for seed in seeds:
        for key, pair in run_seed(seed).items():
            found.setdefault(key, []).append(pair)
    return found


def main() -> None:
    """Run, print, draw on request."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    found = collect(range(arguments.seeds))
    print(table(found))
    old = [pair[0] for pair in means(found, "SFA over beta")]
    if old != sorted(old):
        print("\nnot so here: a larger beta keeps more of the old task")
    if arguments.plot is not None:
        plot(found, arguments.plot)


if __name__ == "__main__":
    main()
