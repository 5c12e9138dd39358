"""Label annealing as one function: cross-entropy on the labels plus KL to the cached teacher.

    loss = sum_ce / num_ce + kl_coef * sum_kl / num_kl

Loss and gradients come out of a single walk over the rows that count (trainer/loss/chunks.py); the tensor
[rows, vocabulary] is never built. There is no T^2 factor, as there is none in the paper (Yang et al., "Memory
Retaining Finetuning via Distillation", 2024). docs/method.md has the mathematics.

N: rows (batch * sequence), D: hidden size, V: rows of the head, padding included, M: rows that count.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from formats.errors import ConfigError
from trainer.data.teacher_batch import TeacherBatch
from trainer.loss.chunks import default_chunk_size
from trainer.loss.kl import RowWeights
from trainer.loss.logits import Head, Work, arithmetic_dtype, passes_of
from trainer.loss.loss_autograd import FusedLabelAnnealing
from trainer.loss.loss_tail import FeatureTables
from trainer.loss.targets import IGNORE_INDEX, plan_rows

KL_DIRECTIONS = ("forward", "reverse")


@dataclass(frozen=True, eq=False)
class LabelAnnealingOutput:
    """The loss and what to log beside it; 0-d tensors on the device, all but `loss` detached."""

    loss: torch.Tensor
    """ce + kl_coef * kl, differentiable."""
    ce: torch.Tensor
    """Sum of the cross-entropies over `num_ce` as passed, or over the local count."""
    kl: torch.Tensor
    """Sum of the KLs over `num_kl` as passed, or over the local count."""
    head_mass: torch.Tensor
    """Mean teacher mass P of the head at the loss temperature, over the local teacher rows; 0 without any."""
    student_head_mass: torch.Tensor
    """Mean student mass Q on the same tokens."""
    num_ce: torch.Tensor
    """Rows with a label in this call, whatever denominator was passed."""
    num_kl: torch.Tensor
    """Rows with teacher targets in this call."""


def shift_labels(labels_BS: torch.Tensor) -> torch.Tensor:
    """[B, S] labels aligned with the tokens -> [B * S] labels aligned with the rows that predict them.

    Row i predicts token i + 1, so the result at i is the label at i + 1; the last row of a sequence has none.
    """
    shifted_BS = torch.full_like(labels_BS, IGNORE_INDEX)
    shifted_BS[:, :-1] = labels_BS[:, 1:]
    return shifted_BS.reshape(-1)


@torch.compiler.disable
def label_annealing_loss(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    teacher: TeacherBatch | None = None,
    *,
    kl_coef: float = 1.0,
    kl_direction: Literal["forward", "reverse"] = "forward",
    num_ce: torch.Tensor | float | None = None,
    num_kl: torch.Tensor | float | None = None,
    bias_V: torch.Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    kernel: Literal["torch", "triton"] = "torch",
) -> LabelAnnealingOutput:
    """Cross-entropy plus KL to the cached teacher. For a teacher that keeps the whole vocabulary this equals

        z = logit_scale * (hidden @ weight.T + bias)[:, :vocab_size]
        z = logit_softcap * tanh(z / logit_softcap)                                   # if there is a softcap
        ce = F.cross_entropy(z, labels, reduction="sum") / num_ce
        p, q = teacher_logits / T, z[teacher.rows] / T
        kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum") / num_kl
        loss = ce + kl_coef * kl

    and for a truncated head, all other tokens form one bucket in `kl`. In `forward`, tail moments in
    `teacher` match the bucket's shape to the teacher's as far as they tell (loss_tail.py), and tail draws add
    what both leave out, in expectation (loss_draws.py): `kl` and every gradient are then unbiased estimates
    of the above. `reverse` leaves the shape to the student. Gradients reach `hidden_ND`,
    `weight_VD` and `bias_V`, each only if it requires one; they are computed here, in the forward pass, and
    `backward` multiplies them with the upstream gradient and hands them over, so it works once. Under
    `torch.no_grad()` only values are computed. Under `torch.compile` the call is a graph break, run eagerly.

    Args:
        hidden_ND: hidden states after the final norm, any floating dtype.
        weight_VD: the output head, as the optimiser owns it (under FSDP, its gathered form).
        labels_N: ALREADY shifted (see `shift_labels`): `labels_N[i]` is what row i predicts, or -100.
        teacher: targets; None gives plain cross-entropy.
        kl_coef: the paper's lambda.
        kl_direction: `forward` is KL(teacher || student), `reverse` is KL(student || teacher).
        num_ce, num_kl: denominators: the counts over all accumulation steps and ranks; default local counts.
        bias_V: bias of the head.
        logit_softcap: cap of Gemma's tanh.
        logit_scale: multiplies the logits before the softcap (Cohere; the reciprocal for Granite).
        vocab_size: so many rows of the head are tokens; the rest is padding and never projected.
        chunk_size: rows projected at a time; default from the vocabulary size.
        kernel: who does the work on whole rows of logits: `torch` on any device; `triton` (loss_triton.py) on
            CUDA, never timed yet, with less memory traffic. fp64 is `torch` either way.

    Raises:
        ConfigError: an argument is out of range, the shapes do not fit, or the kernel cannot run here.
        FormatError: the teacher's rows or token ids do not fit the batch.
    """
    vocab_size = weight_VD.shape[0] if vocab_size is None else vocab_size
    _check_arguments(
        hidden_ND, weight_VD, labels_N, bias_V, kl_coef, kl_direction, logit_softcap, vocab_size, chunk_size
    )
    device_type = hidden_ND.device.type
    if torch.is_autocast_enabled(device_type):
        compute = torch.get_autocast_dtype(device_type)
    elif hidden_ND.dtype == weight_VD.dtype:
        compute = hidden_ND.dtype
    else:
        raise ConfigError(
            f"hidden states and head must have one dtype outside autocast, got {hidden_ND.dtype} and "
            f"{weight_VD.dtype}; cast one of them"
        )
    passes_type = passes_of(kernel, compute, hidden_ND.device)
    arithmetic = arithmetic_dtype(compute)
    beta = 1.0 if teacher is None else 1.0 / teacher.temperature
    if teacher is not None and kl_direction == "reverse":
        teacher = teacher.without_draws()
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        head = Head(
            weight_VD.detach()[:vocab_size].to(compute),
            None if bias_V is None else bias_V.detach()[:vocab_size].to(arithmetic),
            logit_scale,
            logit_softcap,
        )
        moments = teacher is not None and teacher.features is not None and kl_direction == "forward"
        if chunk_size is None:
            num_buffers = passes_type.num_buffers(head, Work(beta, moments))
            chunk_size = default_chunk_size(vocab_size, num_buffers, device_type)
        plan = plan_rows(labels_N, teacher, vocab_size=vocab_size, chunk_size=chunk_size, dtype=arithmetic)
        local_ce = plan.num_labelled
        local_kl = local_ce.new_tensor(0 if teacher is None else len(teacher))
        per_ce = _reciprocal(local_ce if num_ce is None else num_ce, arithmetic, hidden_ND.device)
        per_kl = _reciprocal(local_kl if num_kl is None else num_kl, arithmetic, hidden_ND.device)
        unit = torch.ones_like(per_ce)
        if compute == torch.float16:  # No room for gradients divided by thousands of tokens: until backward,
            largest = torch.maximum(per_ce, per_kl)  # the row of the larger weight counts as one.
            unit = torch.where(largest > 0, 1.0 / largest, unit)
        weights = RowWeights(per_ce * unit, per_kl * unit * kl_coef)
        tables = None
        if moments and teacher is not None and teacher.features is not None:
            tables = FeatureTables.of(teacher.features, compute, arithmetic)
    settings = {
        "head": head,
        "plan": plan,
        "weights": weights,
        "beta": beta,
        "reverse": kl_direction == "reverse",
        "num_weight_rows": weight_VD.shape[0],
        "tables": tables,
        "passes_type": passes_type,
    }
    loss, sum_ce, sum_kl, sum_q = FusedLabelAnnealing.apply(
        hidden_ND, weight_VD, bias_V, settings, unit, torch.is_grad_enabled(), (per_ce, per_kl, kl_coef)
    )
    mean_K = 1.0 / max(len(teacher), 1) if teacher is not None else 0.0
    sum_p = (1.0 - plan.targets.tail_K).sum() if plan.targets is not None else torch.zeros_like(sum_q)
    return LabelAnnealingOutput(
        loss=loss,
        ce=sum_ce * per_ce,
        kl=sum_kl * per_kl,
        head_mass=sum_p * mean_K,
        student_head_mass=sum_q * mean_K,
        num_ce=local_ce,
        num_kl=local_kl,
    )


def _reciprocal(count: torch.Tensor | float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """1 / count; 0 for a count of zero, whose sum is zero too."""
    count_tensor = torch.as_tensor(count, dtype=dtype, device=device)
    return torch.where(count_tensor > 0, 1.0 / count_tensor, torch.zeros_like(count_tensor))


def _check_arguments(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    kl_coef: float,
    kl_direction: str,
    logit_softcap: float | None,
    vocab_size: int,
    chunk_size: int | None,
) -> None:
    got = f"got hidden {list(hidden_ND.shape)}, weight {list(weight_VD.shape)}, labels {list(labels_N.shape)}"
    rules = (
        (hidden_ND.dim() == 2 and weight_VD.dim() == 2, f"hidden and weight must be matrices, {got}"),
        (hidden_ND.shape[-1] == weight_VD.shape[-1], f"hidden and weight must share their last size, {got}"),
        (labels_N.shape == hidden_ND.shape[:1], f"there must be one shifted label per hidden row, {got}"),
        (
            bias_V is None or bias_V.shape == weight_VD.shape[:1],
            f"bias must have one value per row of the head, {got}",
        ),
        (kl_direction in KL_DIRECTIONS, f"kl_direction must be one of {KL_DIRECTIONS}, got {kl_direction!r}"),
        (kl_coef >= 0, f"kl_coef must not be negative, got {kl_coef}"),
        (logit_softcap is None or logit_softcap > 0, f"softcap must be positive, got {logit_softcap}"),
        (
            0 < vocab_size <= weight_VD.shape[0],
            f"vocab_size must be at most the head's {weight_VD.shape[0]} rows, got {vocab_size}",
        ),
        (chunk_size is None or chunk_size > 0, f"chunk_size must be positive, got {chunk_size}"),
    )
    for holds, message in rules:
        if not holds:
            raise ConfigError(message)
