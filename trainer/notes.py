"""What a run tells its user before it starts, one line each: what it holds to, and what it does unasked."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from formats.progress import counted
from trainer.config import TrainConfig
from trainer.data.label_terms import share_learnt
from trainer.data.mixture import unit_weights
from trainer.inputs import Inputs, Rows, Student, has_no_kl, teacher_of
from trainer.loss.chunks import why_no_triton
from trainer.preflight.frozen import freeze_note
from trainer.recipe import on_gpu

LEAST_TOKENS = 150.0
"""Times T^2: tokens per step at which the noise of draws is as large as the gradient (SmolLM2-135M, 10 steps of drift,
2026-11-25: 400 at T = 2 and 2,300 at T = 4)."""

MUCH_LEARNT = 0.5
"""Below this share of the labels, `stm` is likely to leave out what is to be learnt: with 9 of 100 it did (a chat model
that learns short answers, docs/results.md)."""


def notes(
    config: TrainConfig,
    resolved: Mapping[str, Any],
    inputs: Inputs,
    rows: Rows,
    student: Student,
    rows_per_step: int,
) -> list[str]:
    """All lines that there are for this run.

    Args:
        resolved: from `resolve_training`.
        rows_per_step: rows of an optimizer step, over all processes.
    """
    found = (
        anchor_note(config, inputs),
        draws_note(config, rows, rows_per_step),
        mixture_note(config, rows, rows_per_step),
        stm_note(rows),
        student.encoders_note,
        freeze_note(student.model, config.freeze),
        lora_note(config, resolved, student.dtype),
        kernel_note(config, resolved),
    )
    return [line for line in found if line is not None]


def anchor_note(config: TrainConfig, inputs: Inputs) -> str | None:
    """One line where KL holds to another model than the one that the run starts from; None elsewhere."""
    held = {}
    if not has_no_kl(config, config.loss):
        held[""] = teacher_of(inputs.target, inputs.lineage)
    for entry, cache in zip(config.caches, inputs.mixed, strict=True):
        if not has_no_kl(config, entry.loss):
            held[entry.path] = teacher_of(cache, inputs.lineage)
    others = {path: teacher for path, teacher in held.items() if teacher.weights != inputs.start.weights}
    if not others:
        return None
    if len({teacher.weights for teacher in held.values()}) == 1:
        path, teacher = next(iter(others.items()))
        line = f"KL holds to {teacher.name}, the teacher of {path or config.cache}"
    else:
        line = "KL holds to the teacher of each cache: " + ", ".join(
            f"{teacher.name} on {path or config.cache}" for path, teacher in held.items()
        )
    tasks = [task for task in config.ewc_tasks if task.model is None]
    held_here = {"l2": config.l2, "ewc": tasks, "sfa": config.sfa}
    used = [name for name, settings in held_here.items() if settings]
    weights = f"; {' and '.join(used)} {'hold' if len(used) > 1 else 'holds'} to it" if used else ""
    return f"{line}; the run starts from {inputs.start.name} (--model){weights}"


def draws_note(config: TrainConfig, rows: Rows, rows_per_step: int) -> str | None:
    """One line where a step is so small that the noise of tail draws outweighs what they mend; None elsewhere, and
    where packing leaves the size of a step to the rows.
    """
    if config.packing or not rows.training.has_draws:
        return None
    tokens, least = rows_per_step * rows.training.kl_tokens_per_row(), LEAST_TOKENS * config.temperature**2
    if tokens >= least:
        return None
    return (
        f"about {tokens:.0f} tokens with KL in a step: below {least:.0f} at temperature {config.temperature:g} the "
        "noise of tail draws outweighs what they mend; take larger steps, or tail_draws=false"
    )


def mixture_note(config: TrainConfig, rows: Rows, rows_per_step: int) -> str | None:
    """One line where steps are so short that only some of them have a row of a mixed cache; None elsewhere. Texts that
    never meet in a step take turns, and clipping takes away the size of each gradient: with one sequence a step,
    `kl_coef` 3 and 10 gave models alike to three digits (docs/results.md, abstracts, 2026-11-27).
    """
    texts = [rows.training, *(dataset for dataset, _ in rows.mixed)]
    tokens = [dataset.cache.manifest.num_tokens for dataset in texts]
    # Packs are full, so each is as good as so many tokens.
    units = tokens if config.packing else [len(dataset) for dataset in texts]
    weights = unit_weights([1.0, *(amount for _, amount in rows.mixed)], units, tokens)
    used = [
        (weight / sum(weights), entry.path)
        for weight, entry in zip(weights[1:], config.caches, strict=True)
        if weight
    ]
    share, path = min(used, default=(1.0, ""))
    if rows_per_step * share >= 1 - 1e-9:
        return None
    unit = "pack" if config.packing else "row"
    return (
        f"{path} gives {100 * share:.0f} % of the {unit}s, and a step has {counted(rows_per_step, unit)}: some steps "
        f"are without it; take steps of {math.ceil(1 / share - 1e-9)} or more (training.gradient_accumulation_steps), "
        "so that each weighs it against the new text"
    )


def stm_note(rows: Rows) -> str | None:
    """One line on how much of the labels `ce_weight: stm` leaves; None for other weights."""
    weighting = rows.training.objective.weighting
    if weighting.name != "stm":
        return None
    share = share_learnt(weighting, rows.training.cache)
    what = f"of the tokens that carry loss are learnt, those of p0 >= {weighting.value:g}"
    line = f"ce_weight stm: {100 * share:.1f} % {what}"
    if share >= MUCH_LEARNT:
        return line
    return (
        f"{line}; what the initial model does not expect is not, and that may be the task: lower the number"
    )


def lora_note(config: TrainConfig, resolved: Mapping[str, Any], dtype: str) -> str | None:
    """One line on what adapters on a GPU spare without being asked; None where that is nothing."""
    found = []
    if config.lora is not None and config.dtype == "auto" and dtype != "float32":
        found.append(f"the frozen weights stay in {dtype}, as they are stored (dtype: float32 is otherwise)")
    again = resolved.get("gradient_checkpointing")
    if config.lora is not None and again and "gradient_checkpointing" not in config.training:
        found.append("activations are computed twice (training.gradient_checkpointing: false is otherwise)")
    return f"lora: {', and '.join(found)}" if found else None


def kernel_note(config: TrainConfig, resolved: Mapping[str, Any]) -> str | None:
    """One line where the loss on a GPU does without its Triton kernels because they do not run; None elsewhere."""
    if config.loss_kernel != "auto" or not on_gpu(resolved):
        return None
    compute = (
        torch.bfloat16 if resolved.get("bf16") else torch.float16 if resolved.get("fp16") else torch.float32
    )
    reason = why_no_triton(torch.device("cuda", torch.cuda.current_device()), compute)
    return None if reason is None else f"loss_kernel: torch, because Triton does not run here: {reason}"
