"""What an objective costs: a forward and a backward pass of each in turn, on one model, in one process.

    python benchmarks/objectives.py                            # 2 cores: 58M parameters, vocabulary 32,000
    python benchmarks/objectives.py --preset tiny --rounds 3
    python benchmarks/objectives.py --device cuda --dtype bf16 --preset 1b

A round passes each objective once, beginning with plain label annealing and, as a measure of the noise, the same
again. Ratios are to the plain pass of the same round, and medians over the rounds; in brackets the quartiles. Reading
the batch from the cache counts; the optimiser, which is the same for all, does not.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from training import PRESETS
from training_cache import write_cache
from training_variants import PeakMemory, make_model, options_of

from trainer.data.dataset import CachedDataset
from trainer.loop.label_annealing_trainer import LabelAnnealingTrainer
from trainer.objective import Objective

PLAIN = "plain"
OBJECTIVES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "plain again": {},
    **{f"kl_target: {name}": {"kl_target": name} for name in ("masked", "masked-weighted")},
    **{f"kl_gate: {name}": {"kl_gate": name} for name in ("unsure", "entropy:2")},
    "kl_direction: reverse": {"kl_direction": "reverse"},
    **{
        f"ce_weight: {name}": {"ce_weight": name}
        for name in ("stm", "flow:5", "psft", "eaft", "eaft0", "dft", "talr:5")
    },
    "label_smoothing: 0.1": {"label_smoothing": 0.1},
    "kl_budget: 0.02": {"kl_budget": 0.02},
}
"""Name -> settings of `trainer.objective`, and what the trainer itself is told (`OF_THE_TRAINER`)."""
OF_THE_TRAINER = ("kl_direction", "kl_budget")


class Pass:
    """Forward and backward of one objective over the batches of the cache, one after another."""

    def __init__(self, model: Any, sizes: argparse.Namespace, out: Path, settings: dict[str, Any]) -> None:
        from transformers import TrainingArguments

        objective = Objective(**{name: settings[name] for name in settings if name not in OF_THE_TRAINER})
        self._device = sizes.device
        self._model = model
        self._trainer = LabelAnnealingTrainer(
            model,
            TrainingArguments(
                output_dir=str(out),
                per_device_train_batch_size=sizes.batch,
                report_to="none",
                use_cpu=sizes.device == "cpu",
                dataloader_num_workers=0,
            ),
            train_dataset=CachedDataset(sizes.cache, 1.0, objective=objective),
            objective=objective,
            **{name: settings[name] for name in settings if name in OF_THE_TRAINER},
        )
        self._batches = iter(self._trainer.get_train_dataloader())

    def run(self) -> tuple[float, float, int]:
        """Seconds, CPU seconds of the whole process, and bytes above what was held before."""
        peak = PeakMemory(self._device)
        start = time.perf_counter(), time.process_time()
        batches, num_labels = self._trainer.get_batch_samples(self._batches, 1, torch.device(self._device))
        self._trainer.training_step(self._model, batches[0], num_labels)
        if self._device == "cuda":
            torch.cuda.synchronize()
        spent = time.perf_counter() - start[0], time.process_time() - start[1]
        held = peak.read()
        self._model.zero_grad(set_to_none=True)
        return *spent, held


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="60m", help="model")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a batch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights")
    parser.add_argument("--num-kept", type=int, default=64, help="kept tokens per position")
    parser.add_argument("--rounds", type=int, default=20, help="passes of each objective")
    args = parser.parse_args()
    preset = PRESETS[args.preset] | {"batch": args.batch}
    sizes = options_of(["--variant", "anneal", "--device", args.device, "--dtype", args.dtype])
    vars(sizes).update(preset)
    with tempfile.TemporaryDirectory() as folder:
        sizes.cache = Path(folder) / "cache"
        num_rows = args.batch * (args.rounds + 1)
        write_cache(
            sizes.cache, num_rows=num_rows, length=sizes.seq, vocab_size=sizes.vocab, num_kept=args.num_kept
        )
        model = make_model(sizes)
        passes = {
            name: Pass(model, sizes, Path(folder) / "out", settings) for name, settings in OBJECTIVES.items()
        }
        for each in passes.values():  # nothing is timed that is made once
            each.run()
        rounds = [{name: each.run() for name, each in passes.items()} for _ in range(args.rounds)]
    print(
        f"{args.preset}: vocabulary {sizes.vocab:,}, {sizes.batch} x {sizes.seq} tokens, {args.device} {args.dtype}, "
        f"{args.rounds} rounds\n"
    )
    print("| objective | CPU time against plain | on the clock | memory of the pass |\n|---|---|---:|---:|")
    for name in OBJECTIVES:
        wall, cpu, held = ([one[name][k] / max(one[PLAIN][k], 1e-9) for one in rounds] for k in range(3))
        low, middle, high = statistics.quantiles(cpu, n=4)
        print(
            f"| {name} | {middle:.3f} ({low:.3f} to {high:.3f}) | {statistics.median(wall):.3f} | "
            f"{statistics.median(held):.3f} |"
        )


if __name__ == "__main__":
    main()
