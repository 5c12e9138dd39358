"""Label annealing as one function: cross-entropy on the labels plus KL to the cached teacher.

    loss = sum_ce / num_ce + kl_coef * sum_kl / num_kl

Loss and gradients come out of a single walk over the rows that count (trainer/loss/chunks.py); the tensor
[rows, vocabulary] is never built. The gradients exist only while a chunk's logits do, so they are computed in
the forward pass, for an upstream gradient of one, kept (one tensor per input that requires one), and scaled
and handed over in the backward pass. Handing over instead of copying saves a second gradient of the output
head, the largest tensor there is, at the price that one loss can be backpropagated once.

There is no T^2 factor, as there is none in the paper (Yang et al., "Memory Retaining Finetuning via
Distillation", 2024). docs/method.md says what is minimised, docs/derivations.md has the mathematics.

N: rows (batch * sequence), D: hidden size, V: rows of the output head, padding included, M: rows that count,
P: positions with teacher targets.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from formats.errors import ConfigError
from trainer.config import KL_DIRECTIONS
from trainer.data.teacher_batch import TeacherBatch
from trainer.loss.chunks import (
    LossSetup,
    NeededGradients,
    default_chunk_size,
    logits_type,
    plan_rows,
    walk_chunks,
)
from trainer.loss.kl import RowWeights
from trainer.loss.logits import Projection, arithmetic_dtype
from trainer.loss.token_measures import TokenMeasures
from trainer.loss.token_weights import CrossEntropy, LabelTerms
from trainer.objective import Objective


@dataclass(frozen=True, eq=False)
class LabelAnnealingOutput:
    """The loss and what to log beside it; 0-d tensors on the device, all but `loss` detached."""

    loss: torch.Tensor
    """ce + kl_coef * kl, differentiable."""
    ce: torch.Tensor
    """Sum of the cross-entropies, each by its weight, over `num_ce` as passed, or over the local count."""
    kl: torch.Tensor
    """Sum of the KLs, each by its weight, over `num_kl` as passed, or over the local count."""
    kept_mass: torch.Tensor
    """Mean teacher mass of the kept tokens at the loss temperature, over the local positions; 0 without."""
    student_kept_mass: torch.Tensor
    """Mean student mass of the same tokens."""
    num_ce: torch.Tensor
    """Rows with a label in this call, whatever denominator was passed."""
    num_kl: torch.Tensor
    """Rows with teacher targets in this call."""
    tokens: torch.Tensor | None = None
    """[NUM_SUMS], the sums of `TokenMeasures`; None unless asked for."""


@torch.compiler.disable
def label_annealing_loss(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    teacher: TeacherBatch | None = None,
    *,
    kl_coef: float | torch.Tensor = 1.0,
    kl_direction: Literal["forward", "reverse"] = "forward",
    num_ce: torch.Tensor | float | None = None,
    num_kl: torch.Tensor | float | None = None,
    bias_V: torch.Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    kernel: Literal["auto", "torch", "triton"] = "auto",
    measure_tokens: bool = False,
    objective: Objective | None = None,
    label_terms: LabelTerms | None = None,
) -> LabelAnnealingOutput:
    """Cross-entropy plus KL to the cached teacher. For a teacher that keeps the whole vocabulary this equals

        z = logit_scale * (hidden @ weight.T + bias)[:, :vocab_size]
        z = logit_softcap * tanh(z / logit_softcap)                                   # if there is a softcap
        ce = F.cross_entropy(z, labels, reduction="sum") / num_ce
        p, q = teacher_logits / T, z[teacher.rows] / T
        kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum") / num_kl
        loss = ce + kl_coef * kl

    and where it keeps fewer, all other tokens form one bucket in `kl`. In `forward`, tail draws in `teacher`
    add what the bucket leaves out, in expectation (kl.py): `kl` and every gradient are then unbiased
    estimates of the above. `reverse` leaves the shape of the tail to the student. Gradients reach
    `hidden_ND`, `weight_VD` and `bias_V`, each only if it requires one; they are computed here, in the
    forward pass, and `backward` multiplies them with the upstream gradient and hands them over, so it works
    once. Under `torch.no_grad()` only values are computed. Under `torch.compile` the call is a graph break,
    run eagerly.

    Args:
        hidden_ND: hidden states after the final norm, any floating dtype.
        weight_VD: the output head, as the optimiser owns it (under FSDP, its gathered form).
        labels_N: ALREADY shifted, as `split_batch` does it: `labels_N[i]` is what row i predicts, or -100.
        teacher: targets; None gives plain cross-entropy.
        kl_coef: the paper's lambda; a 0-d tensor is not read on the host.
        kl_direction: `forward` is KL(teacher || student), `reverse` is KL(student || teacher).
        num_ce, num_kl: denominators: the counts over all accumulation steps and ranks; default local counts.
        bias_V: bias of the output head.
        logit_softcap: cap of Gemma's tanh.
        logit_scale: multiplies the logits before the softcap (Cohere; the reciprocal for Granite).
        vocab_size: so many rows of the output head are tokens; the rest is padding and never projected.
        chunk_size: rows projected at a time; by default from vocabulary size and device.
        kernel: who does the work on whole rows of logits: `torch` on any device; `triton` on CUDA, with less
            memory traffic; `auto` is `triton` where it runs and `objective` lets it. fp64 is `torch` either way.
        measure_tokens: also fill `tokens`, for evaluation: one more pass over the logits.
        objective: what single tokens count (token_weights.py), in `ce` and `kl` as well; of the settings of the KL,
            which shape the batch, only `masked-weighted` is read here.
        label_terms: what the batch says of the labels, rows as in `labels_N`.

    Raises:
        ConfigError: an argument is out of range, the shapes do not fit, or the kernel cannot run here.
        FormatError: the teacher's rows or token ids do not fit the batch.
    """
    vocab_size = weight_VD.shape[0] if vocab_size is None else vocab_size
    _check_arguments(
        hidden_ND, weight_VD, labels_N, bias_V, kl_coef, kl_direction, logit_softcap, vocab_size, chunk_size
    )
    device = hidden_ND.device
    if torch.is_autocast_enabled(device.type):
        compute = torch.get_autocast_dtype(device.type)
    elif hidden_ND.dtype == weight_VD.dtype:
        compute = hidden_ND.dtype
    else:
        raise ConfigError(
            f"hidden states and output head must have one dtype outside autocast, got {hidden_ND.dtype} and "
            f"{weight_VD.dtype}; cast one of them"
        )
    objective = objective or Objective()
    cross_entropy = CrossEntropy.of(objective, label_terms or LabelTerms(), kernel)
    kind = logits_type(kernel, compute, device, cross_entropy.extras)
    arithmetic = arithmetic_dtype(compute)
    beta = 1.0 if teacher is None else 1.0 / teacher.temperature
    if teacher is not None and kl_direction == "reverse":
        teacher = teacher.without_draws()
    num_positions = 0 if teacher is None else len(teacher)
    grad_enabled = torch.is_grad_enabled()
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        projection = Projection(
            weight_VD.detach()[:vocab_size].to(compute),
            None if bias_V is None else bias_V.detach()[:vocab_size].to(arithmetic),
            logit_scale,
            logit_softcap,
        )
        if chunk_size is None:
            trained = weight_VD.requires_grad and grad_enabled
            chunk_size = default_chunk_size(projection, beta if num_positions else 1.0, kind, trained=trained)
        plan = plan_rows(
            labels_N,
            teacher,
            vocab_size=vocab_size,
            chunk_size=chunk_size,
            dtype=arithmetic,
            weigh_masked=objective.kl_target == "masked-weighted",
        )
        local_ce = plan.num_labelled
        local_kl = torch.full_like(local_ce, num_positions)
        per_ce = _reciprocal(local_ce if num_ce is None else num_ce, arithmetic, device)
        per_kl = _reciprocal(local_kl if num_kl is None else num_kl, arithmetic, device)
        unit = torch.ones_like(per_ce)
        if compute == torch.float16:  # No room for gradients divided by thousands of tokens: until backward,
            largest = torch.maximum(per_ce, per_kl)  # the row of the larger weight counts as one.
            unit = torch.where(largest > 0, 1.0 / largest, unit)
        tokens = TokenMeasures(labels_N, teacher, arithmetic) if measure_tokens else None
    setup = LossSetup(
        projection=projection,
        plan=plan,
        weights=RowWeights(per_ce, per_kl * kl_coef),
        unit=unit,
        beta=beta if plan.targets is not None else 1.0,
        reverse=kl_direction == "reverse",
        num_weight_rows=weight_VD.shape[0],
        logits_type=kind,
        tokens=tokens,
        cross_entropy=cross_entropy,
    )
    loss, sum_ce, sum_kl, sum_q = _GradientsInForward.apply(hidden_ND, weight_VD, bias_V, setup, grad_enabled)
    sum_p = torch.zeros_like(sum_q) if plan.targets is None else (1.0 - plan.targets.tail_P).sum()
    return LabelAnnealingOutput(
        loss=loss,
        ce=sum_ce * per_ce,
        kl=sum_kl * per_kl,
        kept_mass=sum_p / max(num_positions, 1),
        student_kept_mass=sum_q / max(num_positions, 1),
        num_ce=local_ce,
        num_kl=local_kl,
        tokens=None if tokens is None else tokens.sums,
    )


class _GradientsInForward(torch.autograd.Function):
    """Computes the gradients in `forward`, while each chunk's logits exist, and scales them in `backward`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        setup: LossSetup,
        grad_enabled: bool,
    ) -> tuple[torch.Tensor, ...]:
        needed = NeededGradients(*(needs and grad_enabled for needs in ctx.needs_input_grad[:3]))
        with torch.autocast(hidden_ND.device.type, enabled=False):
            sums = walk_chunks(hidden_ND, setup, needed)
            loss = sums.ce * setup.weights.ce + sums.kl * setup.weights.kl
        ctx.rows_M, ctx.unit = setup.plan.rows_M, setup.unit
        ctx.num_rows, ctx.hidden_dtype = hidden_ND.shape[0], hidden_ND.dtype
        ctx.weight_dtype = weight_VD.dtype
        ctx.gradients = (sums.grad_hidden_MD, sums.grad_weight_VD, sums.grad_bias_V)
        outputs = (sums.ce, sums.kl, sums.student_kept_mass)
        ctx.mark_non_differentiable(*outputs)
        ctx.set_materialize_grads(False)
        return loss, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        upstream = grad_outputs[0]
        if upstream is None:
            return (None,) * 5
        if ctx.gradients is None:
            raise RuntimeError(
                "label_annealing_loss can be backpropagated once, because its gradients are handed over, not "
                "copied; got a second backward pass: compute the loss again instead of using retain_graph"
            )
        grad_hidden_MD, grad_weight, grad_bias = ctx.gradients
        ctx.gradients = None
        factor = upstream / ctx.unit
        # Most losses are roots of the graph: reading a CPU scalar to save a pass over the weight costs nothing.
        if not (factor.device.type == "cpu" and factor.item() == 1.0):
            for gradient in (grad_hidden_MD, grad_weight, grad_bias):
                if gradient is not None:
                    gradient.mul_(factor)
        grad_hidden = None
        if grad_hidden_MD is not None:
            if ctx.rows_M.numel() == ctx.num_rows:
                grad_hidden = grad_hidden_MD.to(ctx.hidden_dtype)
            else:
                shape = (ctx.num_rows, grad_hidden_MD.shape[1])
                grad_hidden = grad_hidden_MD.new_zeros(shape, dtype=ctx.hidden_dtype)
                grad_hidden.index_copy_(0, ctx.rows_M, grad_hidden_MD.to(ctx.hidden_dtype))
        if grad_weight is not None:
            grad_weight = grad_weight.to(ctx.weight_dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(ctx.weight_dtype)
        return grad_hidden, grad_weight, grad_bias, None, None


def _reciprocal(count: torch.Tensor | float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """1 / count; 0 for a count of zero, whose sum is zero too."""
    if isinstance(count, torch.Tensor):
        count_tensor = count.to(device, dtype)
    else:  # filled on the device: a copy from the host would wait
        count_tensor = torch.full((), float(count), dtype=dtype, device=device)
    return torch.where(count_tensor > 0, 1.0 / count_tensor, torch.zeros_like(count_tensor))


def _check_arguments(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    kl_coef: float | torch.Tensor,
    kl_direction: str,
    logit_softcap: float | None,
    vocab_size: int,
    chunk_size: int | None,
) -> None:
    got = f"got hidden {list(hidden_ND.shape)}, weight {list(weight_VD.shape)}, labels {list(labels_N.shape)}"
    coef = None if isinstance(kl_coef, torch.Tensor) else kl_coef
    rules = (
        (hidden_ND.dim() == 2 and weight_VD.dim() == 2, f"hidden and weight must be matrices, {got}"),
        (hidden_ND.shape[-1] == weight_VD.shape[-1], f"hidden and weight must share their last size, {got}"),
        (labels_N.shape == hidden_ND.shape[:1], f"there must be one shifted label per hidden row, {got}"),
        (
            bias_V is None or bias_V.shape == weight_VD.shape[:1],
            f"bias must have one value per row of the output head, {got}",
        ),
        (kl_direction in KL_DIRECTIONS, f"kl_direction must be one of {KL_DIRECTIONS}, got {kl_direction!r}"),
        # A coefficient on the device stays there: to print it would read it.
        (coef is None or coef >= 0, f"kl_coef must not be negative, got {coef}"),
        (logit_softcap is None or logit_softcap > 0, f"softcap must be positive, got {logit_softcap}"),
        (
            0 < vocab_size <= weight_VD.shape[0],
            f"vocab_size must be at most the output head's {weight_VD.shape[0]} rows, got {vocab_size}",
        ),
        (chunk_size is None or chunk_size > 0, f"chunk_size must be positive, got {chunk_size}"),
    )
    for holds, message in rules:
        if not holds:
            raise ConfigError(message)
