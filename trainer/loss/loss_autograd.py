"""The bridge from the chunk loop to autograd.

The gradients exist only while a chunk's logits do, so they are computed in the forward pass, for an upstream
gradient of one, kept (one tensor per input that requires one), and scaled and handed over in the backward
pass. Handing over instead of copying saves a second gradient of the head, the largest tensor there is, at the
price that one loss can be backpropagated once.

N: rows, M: rows that count, D: hidden size, V: rows of the head.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from trainer.loss.chunks import Wanted, fused_loss
from trainer.loss.targets import RowPlan


class FusedLabelAnnealing(torch.autograd.Function):
    """Computes the gradients in `forward`, while each chunk's logits exist, and scales them in `backward`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        settings: dict[str, Any],
        unit: torch.Tensor,
        grad_enabled: bool,
        scales: tuple[torch.Tensor, torch.Tensor, float],
    ) -> tuple[torch.Tensor, ...]:
        needs = [needed and grad_enabled for needed in ctx.needs_input_grad[:3]]
        with torch.autocast(hidden_ND.device.type, enabled=False):
            result = fused_loss(hidden_ND, wanted=Wanted(*needs), **settings)
            per_ce, per_kl, kl_coef = scales
            loss = result.sum_ce * per_ce + kl_coef * (result.sum_kl * per_kl)
        plan: RowPlan = settings["plan"]
        ctx.rows_M, ctx.unit = plan.rows_M, unit
        ctx.num_rows, ctx.hidden_dtype = hidden_ND.shape[0], hidden_ND.dtype
        ctx.weight_dtype = weight_VD.dtype
        ctx.gradients = (result.grad_hidden_MD, result.grad_weight_VD, result.grad_bias_V)
        outputs = (result.sum_ce, result.sum_kl, result.sum_student_head_mass)
        ctx.mark_non_differentiable(*outputs)
        ctx.set_materialize_grads(False)
        return loss, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        upstream = grad_outputs[0]
        if upstream is None:
            return (None,) * 7
        if ctx.gradients is None:
            raise RuntimeError(
                "label_annealing_loss can be backpropagated once, because its gradients are handed over, not "
                "copied; got a second backward pass: compute the loss again instead of using retain_graph"
            )
        grad_hidden_MD, grad_weight, grad_bias = ctx.gradients
        ctx.gradients = None
        factor = upstream / ctx.unit
        # Most losses are roots of the graph: reading a CPU scalar to save a pass over the head costs nothing.
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
        return grad_hidden, grad_weight, grad_bias, None, None, None, None
