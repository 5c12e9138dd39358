"""A training run whose gradients are recorded, in this process or on several ranks (see processes.py).

Weights are float64 unless a spec says otherwise: what remains between two ways to compute a sum is then
1e-13, and a missing row or a wrong denominator cannot hide in rounding.
"""

import math
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from formats.cache import TeacherCache
from trainer.config import LoraSettings
from trainer.data.dataset import CachedDataset
from trainer.data.label_terms import resolved
from trainer.loop.label_annealing_trainer import LabelAnnealingTrainer
from trainer.objective import Objective
from trainer.result.lora import attach_adapters
from trainer.retention.ewc import Ewc
from trainer.retention.ewc_tasks import ewc_of
from trainer.retention.fisher_file import load_fisher, remove_fisher
from trainer.retention.l2 import L2
from trainer.retention.settings import EwcSettings, L2Settings, SfaSettings
from trainer.retention.sfa import Sfa


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, gathered when it is sharded."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().clone()


def plain_name(name: str) -> str:
    return name.removeprefix("module.").replace("_fsdp_wrapped_module.", "")


class Record(TrainerCallback):
    """Keeps the gradient of every optimizer step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        grads = {plain_name(n): whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        self.gradients.append(grads)


def retention_of(spec: dict, model: torch.nn.Module) -> list:
    """The methods that a spec names; `ewc` with its cache, `ewc_tasks` a list of such with models of their own."""
    methods: list = [L2(L2Settings(**spec["l2"]))] if "l2" in spec else []
    if "ewc" in spec:
        settings = EwcSettings(**spec["ewc"])
        methods.append(Ewc(settings, CachedDataset(settings.cache, loss="ce"), seed=3))
    if "ewc_tasks" in spec:
        tasks = [EwcSettings(**task) for task in spec["ewc_tasks"]]
        datasets = [CachedDataset(task.cache, loss="ce") for task in tasks]
        anchors = [Path(task.model) if task.model else None for task in tasks]
        methods += ewc_of(tasks, datasets, anchors, model, seed=3)
    return methods + ([Sfa(SfaSettings(**spec["sfa"]))] if "sfa" in spec else [])


def run(spec: dict) -> dict:
    """Train as `spec` says; returns the gradients of every step, the final weights and the log."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate sets it, and would shard what comes after
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        spec["model"],
        dtype=getattr(torch, spec.get("dtype", "float64")),
        attn_implementation=spec.get("attention", "sdpa"),
    )
    if spec.get("lora"):
        model = attach_adapters(model, LoraSettings(**spec["lora"]))
    arguments = {
        "output_dir": spec["out"],
        "use_cpu": True,
        "max_steps": spec.get("steps", 1),
        "per_device_train_batch_size": spec["batch"],
        "gradient_accumulation_steps": spec["accumulation"],
        "per_device_eval_batch_size": spec.get("eval_batch", 3),
        "learning_rate": spec.get("learning_rate", 1e-3),
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
    }
    args = TrainingArguments(**(arguments | spec.get("arguments", {})))
    record = Record()
    objective = Objective(**spec.get("objective", {}))
    objective = resolved(objective, TeacherCache(spec["cache"]))
    trainer = LabelAnnealingTrainer(
        model,
        args,
        train_dataset=CachedDataset(
            spec["cache"], spec.get("temperature", 1.0), spec.get("loss", "both"), objective=objective
        ),
        eval_dataset=CachedDataset(spec["eval_cache"]) if spec.get("eval_cache") else None,
        mixed=[
            (CachedDataset(path, spec.get("temperature", 1.0), loss, objective=objective), weight)
            for path, loss, weight in spec.get("mixed", ())
        ],
        kl_coef=spec.get("kl_coef", 0.7),
        kl_budget=spec.get("kl_budget"),
        objective=objective,
        packing=spec.get("packing", False),
        group_by_length=spec.get("group_by_length", False),
        retention=retention_of(spec, model),
        callbacks=[record],
    )
    if "loss_scale" in spec:  # what fp16 does on a GPU, which a CPU can do as well
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=spec["loss_scale"])
    trainer.train()
    metrics = trainer.evaluate() if spec.get("eval_cache") else {}
    weights = {plain_name(n): whole(p) for n, p in trainer.model.named_parameters()}
    kept = None
    if int(os.environ.get("RANK", 0)) == 0:
        kept = load_fisher(Path(spec["out"]), {}, len(spec.get("ewc_tasks", [0])) - 1)
        remove_fisher(Path(spec["out"]))
    return {
        "fisher": kept,
        "gradients": record.gradients,
        "weights": weights,
        "log": trainer.state.log_history,
        "metrics": metrics,
        "sharded": any(hasattr(p, "full_tensor") for p in trainer.model.parameters()),
    }


def relative_difference(mine: dict, other: dict) -> float:
    """The largest over steps of |g - g'| / |g|, over all parameters together."""
    worst = 0.0
    for left, right in zip(mine["gradients"], other["gradients"], strict=True):
        assert left.keys() == right.keys()
        difference = math.sqrt(sum(float(((left[k] - right[k]) ** 2).sum()) for k in left))
        worst = max(worst, difference / math.sqrt(sum(float((left[k] ** 2).sum()) for k in left)))
    return worst


def run_all(specs: list[dict]) -> None:
    """Run every spec on this rank; rank 0 saves the results."""
    for spec in specs:
        result = run(spec)
        if int(os.environ.get("RANK", 0)) == 0:
            torch.save(result, spec["result"])
