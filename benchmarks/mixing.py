"""What it is worth that every step has the mixed text in its proportion, instead of by chance.

    python benchmarks/mixing.py [--seeds 5] [--out runs/mixing]

`examples/tiny-base` learns code and keeps KL to its initial self on prose alone (`loss: ce`, `kl_coef` 3, a quarter of
a row per row of code), 40 steps of five rows. Spread evenly, each step has one row of prose; by chance, as before
2026-11-27, a third of them has none and a quarter several, whose KL weighs no more than that of one. Both draw the same
rows of either text as often; measured on held-out files of both. Ten minutes on a core.
"""

import argparse
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
from retention import BASE, build_caches

from trainer import evaluate, train
from trainer.config_file import config_from_dict
from trainer.data import sampler

CORPORA = {
    # name: (domain, split, bytes of text)
    "source-train": ("prose", "source-train", 60_000),
    "target-train": ("code", "target-train", 100_000),
    "source-heldout": ("prose", "source-heldout", 30_000),
    "target-heldout": ("code", "target-heldout", 30_000),
}
TRAINING = {
    "max_steps": 40,
    "per_device_train_batch_size": 5,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 40,
}
ORDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "even": sampler.interleaved,
    "by chance": lambda which_U: np.arange(len(which_U)),
}


def measure(order: str, seed: int, caches: dict[str, Path], folder: Path) -> tuple[float, float]:
    """(KL on held-out prose, CE on held-out code) of a run, nats per token."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    settings = {
        "cache": str(caches["target-train"]),
        "model": str(BASE),
        "out": str(out),
        "kl_coef": 3,
        "loss": "ce",
        "save_dtype": "float32",
        "verify_saved": False,
        "step0_rows": 4,
        "caches": [{"path": str(caches["source-train"]), "loss": "kl", "weight": 0.25}],
        "training": {"seed": seed, **TRAINING},
    }
    with patch.object(sampler, "interleaved", ORDERS[order]):
        train(config_from_dict(settings))
    found = evaluate(out, {name: caches[f"{name}-heldout"] for name in ("source", "target")})
    return float(found["source"]["kl"]), float(found["target"]["ce"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/mixing"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    caches = build_caches(args.out, "transformers", corpora=CORPORA, max_length=256)
    rows: dict[str, list[tuple[float, float]]] = {order: [] for order in ORDERS}
    print("order      seed  KL prose  CE code")
    for seed in range(args.seeds):
        for order, found in rows.items():
            found.append(measure(order, seed, caches, args.out))
            print(f"{order:9s}  {seed:4d}  {found[-1][0]:8.4f}  {found[-1][1]:7.4f}", flush=True)
    ratios = [even[0] / chance[0] for even, chance in zip(*rows.values(), strict=True)]
    gains = [chance[1] - even[1] for even, chance in zip(*rows.values(), strict=True)]
    print(
        f"even / by chance, KL on prose: {statistics.mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    print(f"nats of code learnt more: {statistics.mean(gains):.4f} ({min(gains):.4f} to {max(gains):.4f})")


if __name__ == "__main__":
    main()
