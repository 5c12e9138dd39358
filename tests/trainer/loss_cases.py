"""Random but reproducible inputs for the loss tests, and one call for both sides of a comparison."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from dense_reference import dense_logits, dense_loss, teacher_from_logits
from loss_on_device import label_annealing_loss

from trainer.data.teacher_batch import TeacherBatch


@dataclass
class Case:
    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    teacher: TeacherBatch | None
    bias: torch.Tensor | None = None
    options: dict = field(default_factory=dict)


def make_case(
    num_rows=13,
    hidden_size=8,
    vocab_size=37,
    *,
    padding=0,
    temperature=1.0,
    max_kept=12,
    with_bias=False,
    sharpness=2.0,
    seed=0,
    drift=None,
    draw_rate=0.0,
    **options,
) -> Case:
    """Rows with a label only, with teacher targets only, with both, and with neither.

    With `drift` the teacher is the student, moved by so much; else they have nothing to do with each other.
    With `draw_rate`, tokens are drawn at random, each as often as a Poisson number of mean rate * p^(3/4).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = normal(num_rows, hidden_size)
    weight = normal(vocab_size + padding, hidden_size) * sharpness / hidden_size**0.5
    labels = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    labels[torch.rand(num_rows, generator=generator) < 0.3] = -100
    has_teacher = torch.rand(num_rows, generator=generator) < 0.7
    has_teacher[0] = True
    rows = has_teacher.nonzero().squeeze(1)
    counts = torch.randint(1, min(max_kept, vocab_size) + 1, (len(rows),), generator=generator).tolist()
    teacher_logits = normal(len(rows), vocab_size) * sharpness
    bias = normal(vocab_size + padding) if with_bias else None
    if drift is not None:
        student_logits = dense_logits(hidden, weight, bias=bias, vocab_size=vocab_size, **options)[rows]
        teacher_logits = student_logits + drift * normal(len(rows), vocab_size)
    draws = None
    if draw_rate:
        expected = draw_rate * torch.softmax(teacher_logits, -1) ** 0.75
        draws = torch.poisson(expected, generator=generator).long(), expected
    teacher = teacher_from_logits(teacher_logits, rows, counts, temperature, draws=draws)
    if padding:
        options["vocab_size"] = vocab_size
    return Case(hidden, weight, labels, teacher, bias, options)


def cast(case: Case, dtype: torch.dtype) -> Case:
    """The same numbers, rounded to `dtype`, so that both sides of a comparison see identical inputs."""
    teacher = case.teacher
    if teacher is not None:
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        floats = {
            name: part.to(kept)
            for name, part in vars(teacher).items()
            if isinstance(part, torch.Tensor) and part.is_floating_point()
        }
        teacher = replace(teacher, **floats)
    bias = None if case.bias is None else case.bias.to(dtype)
    return Case(case.hidden.to(dtype), case.weight.to(dtype), case.labels, teacher, bias, case.options)


def fused_gradients(case: Case, **arguments):
    """(output, {name: gradient}) of the product's loss."""
    leaves = {"hidden": case.hidden.clone().requires_grad_(), "weight": case.weight.clone().requires_grad_()}
    if case.bias is not None:
        leaves["bias"] = case.bias.clone().requires_grad_()
    options = dict(case.options)
    renamed = {"scale": "logit_scale", "softcap": "logit_softcap", "vocab_size": "vocab_size"}
    output = label_annealing_loss(
        leaves["hidden"],
        leaves["weight"],
        case.labels,
        case.teacher,
        bias_V=leaves.get("bias"),
        **{renamed[name]: value for name, value in options.items()},
        **arguments,
    )
    output.loss.backward()
    return output, {name: leaf.grad for name, leaf in leaves.items()}


def dense_gradients(case: Case, *, kl_direction="forward", chunk_size=None, **arguments):
    """(result, {name: gradient}) of the reference, in float64."""
    leaves = {name: getattr(case, name).double().clone().requires_grad_() for name in ("hidden", "weight")}
    if case.bias is not None:
        leaves["bias"] = case.bias.double().clone().requires_grad_()
    result = dense_loss(
        leaves["hidden"],
        leaves["weight"],
        case.labels,
        case.teacher,
        bias=leaves.get("bias"),
        reverse=kl_direction == "reverse",
        **case.options,
        **arguments,
    )
    result.loss.backward()
    return result, {name: leaf.grad for name, leaf in leaves.items()}
