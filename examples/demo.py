"""The whole path on an embedded example: forgetting, and its cure, in a few minutes on two CPU cores.

The base model `examples/tiny-base` knows prose (Python's documentation). It is fine-tuned on code it has not
seen, once directly and with label annealing at two strengths from one cache, and measured on held-out files
of both kinds. Everything here is a command that you can type yourself; each is printed before it runs.

    python examples/demo.py [--out demo-out] [--engine vllm|transformers]
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BASE = HERE / "tiny-base"
MARKER = ".anneal-demo"
CORPORA = {
    # name: (domain, split, bytes of text)
    "target-train": ("code", "target-train", 450_000),
    "target-heldout": ("code", "target-heldout", 120_000),
    "source-heldout": ("prose", "source-heldout", 100_000),
}
TRAINING = {
    "learning_rate": "1e-3",
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1,
    "save_strategy": "no",
}
RUNS = {"direct": 0.0, "annealed-1": 1.0, "annealed-4": 4.0}
LABELS = {
    "initial": "initial model",
    "direct": "direct fine-tuning",
    "annealed-1": "label annealing, kl_coef 1",
    "annealed-4": "label annealing, kl_coef 4",
}


def readable(path: Path) -> Path:
    """`path` as seen from the repository, where the commands run."""
    path = path.resolve()
    return path.relative_to(HERE.parent) if path.is_relative_to(HERE.parent) else path


def anneal(*arguments: str | Path, capture: bool = False) -> str:
    """Run one `anneal` command, shown as a person would type it."""
    words = [str(readable(word)) if isinstance(word, Path) else word for word in arguments]
    print(f"\n$ anneal {shlex.join(words)}", flush=True)
    result = subprocess.run(
        [sys.executable, "-m", "cli", *words],
        cwd=HERE.parent,
        text=True,
        stdout=subprocess.PIPE if capture else None,
        check=False,
    )
    if result.returncode:
        raise SystemExit(result.returncode)
    return result.stdout or ""


def write_corpora(folder: Path) -> dict[str, Path]:
    """Read the interpreter's own documentation and source; one .jsonl per split."""
    sys.path.insert(0, str(HERE))
    from stdlib_text import documents

    paths = {}
    for name, (domain, split, num_bytes) in CORPORA.items():
        paths[name] = folder / f"{name}.jsonl"
        found = documents(domain, split, max_bytes=num_bytes)
        lines = [json.dumps({"name": document.name, "text": document.text}) for document in found]
        paths[name].write_text("\n".join(lines) + "\n", encoding="utf-8")
        size = paths[name].stat().st_size
        print(f"{paths[name].name}: {len(found)} documents of {domain}, {size / 1e3:,.0f} kB", flush=True)
    return paths


def fresh_folder(folder: Path) -> None:
    """Make `folder` anew; only a folder that an earlier demo made is cleared."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise SystemExit(
            f"--out must be new, empty, or made by an earlier demo, got {folder}; choose another"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()


def table(results: dict[str, dict]) -> str:
    """Perplexities and KL, one line per model."""
    head = f"{'':28s}{'source ppl':>12s}{'target ppl':>12s}{'KL to initial (source)':>24s}{'(target)':>10s}"
    lines = [head, "-" * len(head)]
    for name, result in results.items():
        source, target = result["source-heldout"], result["target-heldout"]
        lines.append(
            f"{LABELS[name]:28s}{source['perplexity']:12.2f}{target['perplexity']:12.2f}"
            f"{source['kl']:24.4f}{target['kl']:10.4f}"
        )
    return "\n".join(lines)


def verdict(results: dict[str, dict]) -> str:
    """One sentence from the measured numbers, whatever they say."""
    initial = results["initial"]["source-heldout"]["perplexity"]
    lost = {name: result["source-heldout"]["perplexity"] / initial - 1 for name, result in results.items()}
    learned = {
        name: 1 - result["target-heldout"]["perplexity"] / results["initial"]["target-heldout"]["perplexity"]
        for name, result in results.items()
    }
    return "\n".join(
        f"{LABELS[name]}: source perplexity {lost[name]:+.1%}, target perplexity {-learned[name]:+.1%}"
        for name in results
        if name != "initial"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, default=HERE.parent / "demo-out", help="folder for everything made"
    )
    parser.add_argument("--engine", default="vllm", choices=("vllm", "transformers"))
    args = parser.parse_args()
    started = time.perf_counter()
    fresh_folder(args.out)
    paths = write_corpora(args.out)

    caches = {name: args.out / "caches" / name for name in paths}
    for name, path in paths.items():
        # The checkpoint is bf16, which processors without instructions for it take twice as long over.
        options = ("--engine", args.engine, "--dtype", "float32")
        anneal("cache", "build", path, "--model", BASE, "--out", caches[name], *options)
    anneal("cache", "inspect", caches["target-train"], "--plot", args.out / "cache.png")

    settings = [word for key, value in TRAINING.items() for word in ("--set", f"training.{key}={value}")]
    models = {"initial": BASE}
    for name, kl_coef in RUNS.items():
        models[name] = args.out / "runs" / name
        anneal(
            "train",
            caches["target-train"],
            "--model",
            BASE,
            "--out",
            models[name],
            "--kl-coef",
            str(kl_coef),
            *settings,
        )
    results = {}
    for name, model in models.items():
        printed = anneal(
            "eval",
            caches["source-heldout"],
            caches["target-heldout"],
            "--model",
            model,
            "--json",
            capture=True,
        )
        results[name] = json.loads(printed)["caches"]
    (args.out / "results.json").write_text(json.dumps(results, indent=2))

    from trainer.evaluation.tradeoff_picture import plot_tradeoff

    picture = args.out / "tradeoff.png"
    plot_tradeoff(
        {
            LABELS[name]: {
                "source": r["source-heldout"]["perplexity"],
                "target": r["target-heldout"]["perplexity"],
            }
            for name, r in results.items()
        },
        picture,
        initial=LABELS["initial"],
        families={"label annealing": [LABELS["annealed-1"], LABELS["annealed-4"]]},
    )
    print(f"\n{table(results)}\n\n{verdict(results)}\n")
    print(f"trade-off plot: {readable(picture)}\n{time.perf_counter() - started:.0f} seconds")


if __name__ == "__main__":
    main()
