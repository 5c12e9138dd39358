"""One variant of `benchmarks/training.py`, in a process of its own so that its peak memory is its own.

    anneal   LabelAnnealingTrainer from a cache          direct   the same harness, cross-entropy alone
    online   Trainer, frozen copy of the model, dense KL  hf      transformers.Trainer as it comes
    loss-fused / loss-dense   the loss and its gradients alone        loader   one worker decoding batches

Prints one JSON object on its last line. Memory is the high-water mark above what the process held before the
model (or, for the loss alone, before the loss) existed: resident bytes on a CPU, allocated bytes on a GPU.
"""

import argparse
import copy
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F

TRAINING = ("anneal", "direct", "online", "hf")
LOSSES = ("loss-fused", "loss-bucket", "loss-dense")
LOADER = "loader"


class PeakMemory:
    """Bytes above the level at construction, at their highest since."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark, see proc(5)
            self.start = self._status("VmRSS")

    @staticmethod
    def _status(key: str) -> int:
        found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) * 1024

    def read(self) -> int:
        peak = torch.cuda.max_memory_allocated() if self.on_gpu else self._status("VmHWM")
        return peak - self.start


def make_model(sizes: argparse.Namespace) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=sizes.seq,
        tie_word_embeddings=sizes.tied,
        use_cache=False,
    )
    dtype = torch.bfloat16 if sizes.dtype == "bf16" else torch.float32
    with torch.device(sizes.device):  # a billion random numbers take a CPU half a minute
        model: Any = LlamaForCausalLM(config)
        model = model.to(dtype)
    if not sizes.lora:
        return model
    from trainer.config import LoraSettings
    from trainer.result.lora import attach_adapters

    return attach_adapters(model, LoraSettings())


def run_training(sizes: argparse.Namespace, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Seconds of the timed steps, and the peak; `callbacks` join the Trainer's."""
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from trainer.data.dataset import CachedDataset
    from trainer.loop.label_annealing_trainer import LabelAnnealingTrainer
    from trainer.preflight.memory import step_memory

    marks: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if sizes.device == "cuda":
                torch.cuda.synchronize()
            marks.append((time.perf_counter(), time.process_time()))

    class Online(Trainer):
        """CE + KL of full distributions, both models' logits as tensors: the paper's own procedure."""

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            labels = inputs["labels"][:, 1:].reshape(-1)
            ids = inputs["input_ids"]
            student = model(input_ids=ids).logits[:, :-1].flatten(0, 1).float()
            with torch.no_grad():
                initial = frozen(input_ids=ids).logits[:, :-1].flatten(0, 1).float()
            log_q = F.log_softmax(student / sizes.temperature, -1)
            log_p = F.log_softmax(initial / sizes.temperature, -1)
            kl = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
            return F.cross_entropy(student, labels) + kl

    loss = "ce" if sizes.variant == "direct" else "both"
    cached = CachedDataset(sizes.cache, sizes.temperature, loss=loss)
    plain = [
        {name: torch.as_tensor(cached[i][name]).long() for name in ("input_ids", "labels")}
        for i in range(len(cached))
    ]
    peak = PeakMemory(sizes.device)
    model = make_model(sizes)
    frozen: Any = copy.deepcopy(model).eval().requires_grad_(False) if sizes.variant == "online" else None
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out,
            per_device_train_batch_size=sizes.batch,
            max_steps=sizes.warmup + sizes.steps,
            learning_rate=1e-5,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=sizes.device == "cpu",
            bf16=sizes.amp,
            gradient_checkpointing=sizes.checkpointing,
            dataloader_num_workers=0 if sizes.variant in ("hf", "online") else sizes.workers,
        )
        if sizes.variant in ("anneal", "direct"):
            trainer: Trainer = LabelAnnealingTrainer(
                model,
                arguments,
                train_dataset=cached,
                loss_kernel=sizes.loss_kernel,
                packing=sizes.packing,
                pack_length=sizes.seq if sizes.packing else None,
                callbacks=[Clock(), *callbacks],
            )
        else:
            kind = Online if sizes.variant == "online" else Trainer
            trainer = kind(model=model, args=arguments, train_dataset=plain, callbacks=[Clock(), *callbacks])  # type: ignore[arg-type]
        trainer.remove_callback(PrinterCallback)
        said = step_memory(trainer).peak if isinstance(trainer, LabelAnnealingTrainer) else 0
        trainer.train()
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(marks)][sizes.warmup - 1 :]
    return {
        "seconds": [wall for wall, _ in steps],
        "cpu_seconds": [cpu for _, cpu in steps],
        "peak_bytes": peak.read(),
        "said_bytes": said,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def dense_loss(hidden: Any, weight: Any, labels: Any, teacher: Any) -> torch.Tensor:
    """Cross-entropy and bucketed KL from [rows, V] logits, vectorised as trainers that build them do it."""
    log_q = F.log_softmax((hidden @ weight.t()).float(), -1)
    row = torch.repeat_interleave(teacher.rows, teacher.counts)
    log_q_kept = log_q[row, teacher.token_ids.long()]
    p = teacher.logprobs.exp()
    mass_q = torch.zeros(len(log_q), device=log_q.device).index_add(0, row, log_q_kept.exp())[teacher.rows]
    tail = teacher.log_tail.exp() * (teacher.log_tail - torch.log1p(-mass_q))
    kl = ((p * (teacher.logprobs - log_q_kept)).sum() + tail.sum()) / len(teacher)
    return F.nll_loss(log_q, labels) + kl


def run_loss(sizes: argparse.Namespace) -> dict[str, Any]:
    from training_cache import random_teacher

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
    from teacher_batches import batch_from_topk

    from trainer.loss.label_annealing_loss import label_annealing_loss

    torch.manual_seed(0)
    dtype = torch.bfloat16 if sizes.dtype == "bf16" else torch.float32
    device = sizes.device
    hidden = torch.randn(sizes.rows, sizes.hidden, device=device, dtype=dtype).requires_grad_()
    weight = (
        torch.empty(sizes.vocab, sizes.hidden, device=device, dtype=dtype).normal_(std=0.04).requires_grad_()
    )
    labels = torch.randint(0, sizes.vocab, (sizes.rows,), device=device)
    topk = random_teacher(sizes.rows, sizes.vocab, sizes.num_kept, seed=0)
    # The dense side knows no draws.
    teacher = batch_from_topk(range(sizes.rows), topk, draws=sizes.variant == "loss-fused").to(device)
    peak = PeakMemory(device)
    seconds, cpu = [], []
    for _ in range(sizes.steps):
        hidden.grad = weight.grad = None
        start = time.perf_counter(), time.process_time()
        if sizes.variant != "loss-dense":
            loss = label_annealing_loss(hidden, weight, labels, teacher, kernel=sizes.loss_kernel).loss
        else:
            loss = dense_loss(hidden, weight, labels, teacher)
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    gradients = hidden.grad.nbytes + weight.grad.nbytes  # type: ignore[union-attr]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_bytes": peak.read(),
        "gradient_bytes": gradients,
        "loss": loss.item(),
    }


def run_loader(sizes: argparse.Namespace) -> dict[str, Any]:
    """Batches per second of one worker process, decoding from the cache, after the first batch came."""
    from torch.utils.data import DataLoader

    from trainer.data.collator import LabelAnnealingCollator
    from trainer.data.dataset import CachedDataset

    cached = CachedDataset(sizes.cache, sizes.temperature)
    order = [i % len(cached) for i in range(sizes.batch * 200)]
    loader = DataLoader(
        cached,
        sizes.batch,
        sampler=order,
        num_workers=1,
        collate_fn=LabelAnnealingCollator(),
        prefetch_factor=8,
    )
    batches = iter(loader)
    next(batches)
    start = time.perf_counter()
    count = sum(1 for _ in batches)
    return {"seconds": [(time.perf_counter() - start) / count], "cpu_seconds": [0.0], "peak_bytes": 0}


def options_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a variant, from the command line or from `words`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=(*TRAINING, *LOSSES, LOADER), required=True)
    for name in ("vocab", "hidden", "intermediate", "layers", "heads", "seq", "batch", "rows", "num_kept"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--loss-kernel", choices=("auto", "torch", "triton"), default="auto")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--amp", action="store_true", help="compute in bf16, whatever the weights are")
    parser.add_argument(
        "--lora", action="store_true", help="adapters on all linear modules instead of all weights"
    )
    parser.add_argument("--packing", action="store_true", help="several rows to a sequence of --seq tokens")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of our trainer")
    return parser.parse_args(words)


def main() -> None:
    sizes = options_of()
    run = run_training if sizes.variant in TRAINING else run_loader if sizes.variant == LOADER else run_loss
    print(json.dumps(run(sizes)))


if __name__ == "__main__":
    main()
