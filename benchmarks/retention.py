"""Every retention method on the same data: what is learnt of the target, what is lost of the source.

`examples/tiny-base` knows prose (the interpreter's documentation) and is fine-tuned on code (the standard
library's source). Each method runs at a few strengths on one recipe (retention_methods.py); all are measured
on held-out files of both kinds, from caches of the initial model. One table, the Pareto front, one picture;
about ten minutes on two cores. The model is small, and so is the corpus: the order of methods on another
model is for its owner to measure.

    python benchmarks/retention.py [--engine vllm|transformers] [--out runs/retention] [--plot FILE] [--quick]
    python benchmarks/retention.py --only EWC        # one family more, into the same results
"""

import argparse
import contextlib
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from retention_methods import DIRECT, MERGES, RECIPE, RUNS, SOURCE, Merged, Run, one_of_each

from trainer import MergeConfig, evaluate, merge, train
from trainer.config_file import config_from_dict
from trainer.evaluation.tradeoff_picture import pareto_front, plot_tradeoff
from trainer.loop.label_annealing_trainer import LabelAnnealingTrainer

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "examples" / "tiny-base"
MARKER = ".anneal-retention"
INITIAL = "initial"
CORPORA = {
    # name: (domain, split, bytes of text)
    "target-train": ("code", "target-train", 260_000),
    "source-train": ("prose", "source-train", 140_000),
    "target-heldout": ("code", "target-heldout", 70_000),
    "source-heldout": ("prose", "source-heldout", 70_000),
}
QUICK_BYTES, QUICK_LENGTH = 12_000, 128  # rows enough that a tenth of them is one
QUICK_STEPS = 3
SCHEMA = 1
ENTRIES: tuple[Run | Merged, ...] = (*RUNS, *MERGES)
"""In the order of the table."""
OFF_THE_CHART = 0.06
"""Rise of the source perplexity from which a model is in the table only."""


def build_caches(
    folder: Path,
    engine: str,
    *,
    quick: bool = False,
    corpora: Mapping[str, tuple[str, str, int]] = CORPORA,
    max_length: int | None = None,
) -> dict[str, Path]:
    """The caches, built once; those that an earlier call finished are used again."""
    from cache_builder import BuildConfig, build_cache

    sys.path.insert(0, str(ROOT / "examples"))
    from stdlib_text import documents

    caches = {}
    for name, (domain, split, num_bytes) in corpora.items():
        caches[name] = folder / "caches" / name
        if (caches[name] / "manifest.json").exists():
            continue
        corpus = folder / f"{name}.jsonl"
        found = documents(domain, split, max_bytes=QUICK_BYTES if quick else num_bytes)
        corpus.write_text("".join(json.dumps({"text": d.text}) + "\n" for d in found), encoding="utf-8")
        config = BuildConfig(
            corpus=str(corpus),
            model=str(BASE),
            out=str(caches[name]),
            engine=engine,
            dtype="float32",
            max_length=max_length,
        )
        print(build_cache(config).text(), flush=True)
    return caches


def filled(value: Any, source: Path) -> Any:
    """`value` with the cache of source text in place of SOURCE, at every depth."""
    if isinstance(value, Mapping):
        return {key: filled(entry, source) for key, entry in value.items()}
    if isinstance(value, list):
        return [filled(entry, source) for entry in value]
    return str(source) if value == SOURCE else value


def run_training(
    run: Run, out: Path, caches: Mapping[str, Path], *, quick: bool, seed: int
) -> dict[str, Any]:
    """Train; returns CPU seconds per step, the median, and what else it took."""
    training = {**RECIPE, "seed": seed, **run.training} | ({"max_steps": QUICK_STEPS} if quick else {})
    settings = {
        "cache": str(caches["target-train"]),
        "model": str(BASE),
        "out": str(out),
        "kl_coef": run.kl_coef,
        "training": training,
        **filled(dict(run.settings), caches["source-train"]),
    }
    with step_clock() as stamps:
        report = train(config_from_dict(settings))
    steps = [after - before for before, after in pairwise(stamps)]
    return {
        "step_cpu": statistics.median(steps),
        "steps": report.num_steps,
        "seconds": report.seconds,
        "tokens_per_second": report.last.get("tokens_per_second"),
    }


@contextlib.contextmanager
def step_clock() -> Iterator[list[float]]:
    """CPU seconds of this process after every step of the training inside: other programs do not count."""
    original, stamps = LabelAnnealingTrainer.log, []

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        stamps.append(time.process_time())
        original(self, logs, start_time)

    LabelAnnealingTrainer.log = log  # type: ignore[method-assign]
    try:
        yield stamps
    finally:
        LabelAnnealingTrainer.log = original  # type: ignore[method-assign]


def run_merge(entry: Merged, out: Path, models: Mapping[str, Path]) -> dict[str, Any]:
    """Merge finished runs; returns the seconds it took."""
    report = merge(
        MergeConfig(
            tuned=[str(models[label]) for label in entry.tuned],
            initial=str(BASE),
            out=str(out),
            method=entry.method,
            **entry.strengths,
        )
    )
    return {"seconds": report.seconds}


def measured(model: Path, caches: Mapping[str, Path]) -> dict[str, Any]:
    """Perplexities and KL on the held-out texts."""
    held_out = {name: caches[f"{name}-heldout"] for name in ("source", "target")}
    return {
        name: {"perplexity": found["perplexity"], "kl": found["kl"]}
        for name, found in evaluate(model, held_out).items()
    }


def compare(
    folder: Path, engine: str, *, quick: bool, only: str | None = None, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Run what is not in the results yet, and write them after every model; label -> measurements."""
    caches = build_caches(folder, engine, quick=quick, max_length=QUICK_LENGTH if quick else None)
    path = folder / "results.json"
    results = json.loads(path.read_text())["models"] if path.exists() else {}
    entries: list[Run | Merged] = [*RUNS, *MERGES]
    entries = one_of_each(entries) if quick else entries
    models = {
        entry.label: folder / "models" / entry.label.replace(", ", "-").replace(" ", "_") for entry in entries
    }
    if INITIAL not in results:
        results[INITIAL] = measured(BASE, caches) | {"family": INITIAL, "strength": ""}
    for entry in entries:
        if entry.label in results or (only is not None and entry.family != only):
            continue
        shutil.rmtree(models[entry.label], ignore_errors=True)
        models[entry.label].parent.mkdir(exist_ok=True)
        with open(folder / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
            print(f"=== {entry.label}", file=log, flush=True)
            if isinstance(entry, Run):
                cost = run_training(entry, models[entry.label], caches, quick=quick, seed=seed)
            else:
                cost = run_merge(entry, models[entry.label], models)
            found = measured(models[entry.label], caches)
        results[entry.label] = found | cost | {"family": entry.family, "strength": entry.strength}
        path.write_text(json.dumps({"schema": SCHEMA, "models": results}, indent=1), encoding="utf-8")
        print(line_of(entry.label, results), flush=True)
    return results


def change(results: Mapping[str, Any], label: str, text: str) -> float:
    """Perplexity against that of the initial model, minus one."""
    return results[label][text]["perplexity"] / results[INITIAL][text]["perplexity"] - 1


def line_of(label: str, results: Mapping[str, Any], mark: str = "") -> str:
    """One line of the table, as Markdown."""
    found = results[label]
    direct = results.get(DIRECT, {}).get("step_cpu")
    time_ratio = f"{found['step_cpu'] / direct:.2f}" if direct and "step_cpu" in found else "-"
    return (
        f"| {found['family']} | {found['strength']} | {change(results, label, 'source'):+.1%} | "
        f"{change(results, label, 'target'):+.1%} | {found['source']['kl']:.4f} | {time_ratio} | {mark} |"
    )


def table(results: Mapping[str, Any]) -> str:
    """All models in the order of retention_methods.py, those on the Pareto front marked."""
    order = [entry.label for entry in ENTRIES if entry.label in results]
    front = pareto_front({label: point for label, point in points(results).items() if label in order})
    lines = ["| method | strength | source ppl | target ppl | KL to initial (source) | step time | front |"]
    lines += ["|---|---|---|---|---|---|---|"]
    lines += [line_of(label, results, "*" if label in front else "") for label in order]
    initial = results[INITIAL]
    lines += [
        "",
        f"initial model: source perplexity {initial['source']['perplexity']:.2f}, target "
        f"{initial['target']['perplexity']:.2f}",
        f"Pareto front, from most learnt to most kept: {'; '.join(front)}",
        "These are figures of a 3.4M-parameter model; they need not carry over to a large one.",
    ]
    return "\n".join(lines)


def points(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Label -> perplexities, of every model but the initial one."""
    return {
        label: {text: found[text]["perplexity"] for text in ("source", "target")}
        for label, found in results.items()
        if label != INITIAL
    }


def draw(results: Mapping[str, Any], path: Path) -> None:
    """The picture of the table, without models that lost more than `OFF_THE_CHART`: others would be a dot."""
    families: dict[str, list[str]] = {}
    for entry in ENTRIES:
        if entry.label not in results or "seed 1" in entry.strength:
            continue
        if change(results, entry.label, "source") > OFF_THE_CHART:
            print(f"not in the picture: {entry.label}")
        else:
            families.setdefault(entry.family, []).append(entry.label)
    for labels in families.values():  # a line through a family, not a zigzag
        labels.sort(key=lambda label: change(results, label, "source"))
    shown = [label for labels in families.values() for label in labels]
    chosen = {label: points(results)[label] for label in shown}
    chosen[INITIAL] = {text: results[INITIAL][text]["perplexity"] for text in ("source", "target")}
    plot_tradeoff(chosen, path, initial=INITIAL, families=families, size=(9.6, 7.2))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "retention", help="folder for everything made"
    )
    parser.add_argument("--engine", default="vllm", choices=("vllm", "transformers"))
    parser.add_argument("--plot", type=Path, help="the picture; by default retention.png in --out")
    parser.add_argument("--seed", type=int, default=0, help="of the order of rows; with an --out of its own")
    parser.add_argument("--only", metavar="FAMILY", help="run one family only, beside earlier results")
    parser.add_argument(
        "--quick", action="store_true", help="three steps of one run per method: does it run?"
    )
    args = parser.parse_args()
    started = time.perf_counter()
    if args.out.exists() and any(args.out.iterdir()) and not (args.out / MARKER).exists():
        parser.error(f"--out must be new, empty, or made by this benchmark, got {args.out}; choose another")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / MARKER).touch()
    results = compare(args.out, args.engine, quick=args.quick, only=args.only, seed=args.seed)
    picture = args.plot or args.out / "retention.png"
    draw(results, picture)
    print(f"\n{table(results)}\n\ntrade-off plot: {picture}\n{time.perf_counter() - started:.0f} seconds")


if __name__ == "__main__":
    main()
