"""What a step of label annealing costs: time and peak memory, against everything it competes with.

    python benchmarks/training.py                      # 2 cores: 58M parameters, vocabulary 32,000
    python benchmarks/training.py --only loss          # loss and gradients alone, vocabulary 128,256
    python benchmarks/training.py --device cuda --dtype bf16 --preset 1b --loss-hidden 2048 --dense-rows 8192
    ... --loss-kernel triton                           # the same with Triton kernels, and beside PyTorch's

Every variant runs in a process of its own; rounds alternate between the variants, so that a busy machine
disturbs all of them alike. Ratios compare medians over all timed steps of one run of this script; a shared
machine is better judged by the CPU time, which is printed beside the time on the clock.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from training_cache import write_cache

HERE = Path(__file__).resolve().parent
PRESETS: dict[str, dict[str, Any]] = {
    "60m": dict(vocab=32_000, hidden=512, intermediate=1408, layers=8, heads=8, seq=512, batch=8),
    "1b": dict(vocab=128_256, hidden=2048, intermediate=8192, layers=16, heads=32, seq=2048, batch=4),
    "demo": dict(vocab=4096, hidden=256, intermediate=512, layers=4, heads=4, seq=256, batch=8, tied=True),
    "tiny": dict(vocab=1000, hidden=64, intermediate=128, layers=2, heads=2, seq=64, batch=2),
}
STEP_VARIANTS = ("anneal", "direct", "online", "hf")
STEP_RATIOS = (
    ("step time", "direct", 1.10, 1.03),
    ("step time", "online", 0.80, 0.75),
    ("step time", "hf", 1.0, 1.0),
    ("peak memory", "hf", 0.7, 0.7),
    ("peak memory", "online", 0.5, 0.6),
)
NAMES = {
    "anneal": "label annealing from the cache",
    "direct": "direct fine-tuning, same harness",
    "online": "online two-model label annealing",
    "hf": "transformers.Trainer, direct fine-tuning",
}


def run_variant(variant: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run one variant in a fresh process and return what it printed."""
    command = [sys.executable, str(HERE / "training_variants.py"), "--variant", variant]
    for name, value in options.items():
        if value is True:
            command.append(f"--{name}")
        elif value is not False:
            command += [f"--{name}", str(value)]
    print(f"running {variant} ...", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"variant {variant} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def merge(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the steps of all rounds; the peak is the highest of any round."""
    return {
        "seconds": statistics.median(s for run in runs for s in run["seconds"]),
        "cpu_seconds": statistics.median(s for run in runs for s in run["cpu_seconds"]),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "gradient_bytes": runs[0].get("gradient_bytes", 0),
    }


def step_options(args: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """What every variant of a training step is told; writes the cache that they train on."""
    sizes = PRESETS[args.preset]
    num_rows = sizes["batch"] * (args.warmup + args.steps)
    write_cache(
        cache, num_rows=num_rows, length=sizes["seq"], vocab_size=sizes["vocab"], num_kept=args.num_kept
    )
    names = ("steps", "warmup", "device", "dtype")
    return {**sizes, **{name: getattr(args, name) for name in names}, "cache": cache}


def alternate(
    rounds: int, variants: dict[str, tuple[str, dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """Name -> what each round of its (variant, options) found, rounds alternating between the names."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, (variant, options) in variants.items():
            runs[name].append(run_variant(variant, options))
    return runs


def steps_report(args: argparse.Namespace) -> dict[str, Any]:
    """Step time and peak memory of the four trainers."""
    sizes = PRESETS[args.preset]
    with tempfile.TemporaryDirectory() as folder:
        options = step_options(args, Path(folder) / "cache")
        options |= {"temperature": args.temperature, "checkpointing": args.checkpointing}
        options["loss-kernel"] = args.loss_kernel
        runs = alternate(args.rounds, {variant: (variant, options) for variant in STEP_VARIANTS})
        loader = run_variant("loader", {**options, "device": "cpu"})["seconds"][0]
    results = {variant: merge(found) for variant, found in runs.items()}
    print(
        f"\n## Steps: {runs['hf'][0]['parameters'] / 1e6:.1f}M parameters, "
        f"vocabulary {sizes['vocab']:,}, "
        f"{sizes['batch']} x {sizes['seq']} tokens, {args.num_kept} kept, T = {args.temperature:g}, "
        f"{args.device} {args.dtype}, {args.rounds} x {args.steps} steps\n"
    )
    print("| variant | s/step | CPU s/step | peak GiB |\n|---|---:|---:|---:|")
    for variant, result in results.items():
        print(
            f"| {NAMES[variant]} | {result['seconds']:.3f} | {result['cpu_seconds']:.3f} | "
            f"{result['peak_bytes'] / 2**30:.2f} |"
        )
    print(
        "\n| label annealing, measured | against | ratio | by CPU time | target |\n|---|---|---:|---:|---:|"
    )
    ours = results["anneal"]
    for measured, against, target_cpu, target_gpu in STEP_RATIOS:
        other = results[against]
        target = target_gpu if args.device == "cuda" else target_cpu
        if measured == "step time":
            ratio = ours["seconds"] / other["seconds"]
            by_cpu = f"{ours['cpu_seconds'] / other['cpu_seconds']:.3f}"
        else:
            ratio, by_cpu = ours["peak_bytes"] / other["peak_bytes"], ""
        print(f"| {measured} | {NAMES[against]} | {ratio:.3f} | {by_cpu} | <= {target:.2f} |")
    tokens = sizes["batch"] * sizes["seq"]
    print(
        f"\nOne loader worker: {tokens / loader:,.0f} tokens/s, {ours['seconds'] / loader:.1f} x what this "
        "model trains at (target for the demo model, --preset demo: >= 20)"
    )
    return {**results, "loader_seconds_per_batch": loader}


def loss_report(args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory and time of the loss with its gradients, fused and dense."""
    common = {
        "vocab": args.loss_vocab,
        "hidden": args.loss_hidden,
        "num-kept": args.num_kept,
        "device": args.device,
        "dtype": args.dtype,
        "loss-kernel": args.loss_kernel,
    }
    fused = run_variant("loss-fused", {**common, "rows": args.loss_rows, "steps": 1})
    fused_small = run_variant("loss-fused", {**common, "rows": args.dense_rows, "steps": args.rounds})
    bucket = run_variant("loss-bucket", {**common, "rows": args.dense_rows, "steps": args.rounds})
    dense = run_variant("loss-dense", {**common, "rows": args.dense_rows, "steps": args.rounds})
    found = {"fused": fused, "fused_small": fused_small, "bucket": bucket, "dense": dense}
    if args.loss_kernel != "torch" and args.device == "cuda":
        options = {**common, "loss-kernel": "torch", "rows": args.dense_rows, "steps": args.rounds}
        found["fused_torch"] = run_variant("loss-fused", options)
        if abs(found["fused_torch"]["loss"] - fused_small["loss"]) > 1e-2 * abs(fused_small["loss"]):
            sys.exit(f"the kernels differ: {fused_small['loss']} and {found['fused_torch']['loss']}")
    if abs(bucket["loss"] - dense["loss"]) > 1e-2 * abs(dense["loss"]):
        sys.exit(f"fused and dense loss differ: {bucket['loss']} and {dense['loss']}")
    # Everything dense but the gradients themselves grows with the rows.
    scale = args.loss_rows / args.dense_rows
    dense_peak = (dense["peak_bytes"] - dense["gradient_bytes"]) * scale + fused["gradient_bytes"]
    how = (
        "measured" if scale == 1 else f"scaled from {args.dense_rows:,} rows: more than this machine may hold"
    )
    rows = {
        f"fused, {args.loss_rows:,} rows": (fused, fused["peak_bytes"]),
        f"fused, {args.dense_rows:,} rows": (fused_small, fused_small["peak_bytes"]),
        f"fused without draws, {args.dense_rows:,} rows": (bucket, bucket["peak_bytes"]),
        f"dense, {args.dense_rows:,} rows": (dense, dense["peak_bytes"]),
    }
    if "fused_torch" in found:
        other = found["fused_torch"]
        rows[f"fused, {args.dense_rows:,} rows, kernel torch"] = (other, other["peak_bytes"])
    print(
        f"\n## Loss and gradients alone: vocabulary {args.loss_vocab:,}, hidden {args.loss_hidden}, "
        f"{args.device} {args.dtype}, kernel {args.loss_kernel}\n"
    )
    print("| variant | s | CPU s | peak GiB | of which gradients |\n|---|---:|---:|---:|---:|")
    for name, (result, peak) in rows.items():
        print(
            f"| {name} | {min(result['seconds']):.2f} | {min(result['cpu_seconds']):.2f} | "
            f"{peak / 2**30:.2f} | {result['gradient_bytes'] / 2**30:.2f} |"
        )
    print(f"| dense, {args.loss_rows:,} rows ({how}) | | | {dense_peak / 2**30:.2f} | |")
    target = 0.05 if args.device == "cuda" else 0.1
    ratio = fused["peak_bytes"] / dense_peak
    print(f"\nPeak memory at {args.loss_rows:,} rows, fused / dense: {ratio:.3f} (target <= {target})")
    time_ratio = min(fused_small["cpu_seconds"]) / min(dense["cpu_seconds"])
    alike = min(bucket["cpu_seconds"]) / min(dense["cpu_seconds"])
    print(
        f"CPU time at {args.dense_rows:,} rows, fused / dense: {time_ratio:.3f}; without draws, "
        f"which the dense side has not: {alike:.3f}"
    )
    if "fused_torch" in found:
        faster = min(fused_small["seconds"]) / min(found["fused_torch"]["seconds"])
        print(f"Time at {args.dense_rows:,} rows, kernel {args.loss_kernel} / torch: {faster:.3f}")
    return {**found, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("steps", "loss"), help="one part alone")
    parser.add_argument("--preset", choices=PRESETS, default="60m", help="model and batch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in all variants")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument(
        "--loss-kernel", choices=("auto", "torch", "triton"), default="auto", help="of our loss"
    )
    parser.add_argument("--num-kept", type=int, default=64, help="kept tokens per position")
    parser.add_argument("--rounds", type=int, default=2, help="processes per variant")
    parser.add_argument("--steps", type=int, default=2, help="timed steps per process")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps per process")
    parser.add_argument("--loss-vocab", type=int, default=128_256)
    parser.add_argument("--loss-hidden", type=int, default=256)
    parser.add_argument("--loss-rows", type=int, default=8192)
    parser.add_argument("--dense-rows", type=int, default=1024, help="rows of the dense reference")
    parser.add_argument("--json", type=Path, help="write all raw numbers here")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    if args.only in (None, "steps"):
        found["steps"] = steps_report(args)
    if args.only in (None, "loss"):
        found["loss"] = loss_report(args)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
