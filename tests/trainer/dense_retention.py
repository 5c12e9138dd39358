"""The retention methods written out densely: plain PyTorch loops with autograd, none of the trainer's code.

Cross-entropy comes from full logits, penalties are part of the loss that autograd differentiates, the Fisher
information is a loop over rows, and averages are copies. Order of rows and of labels are given from outside.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def distinct_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Name -> parameter, each memory once, found by address."""
    found, seen = {}, set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.data_ptr() not in seen:
            seen.add(parameter.data_ptr())
            found[name] = parameter
    return found


def row_nll(model: torch.nn.Module, item, labels: np.ndarray | None = None) -> tuple[torch.Tensor, int]:
    """Sum of -log p over the tokens of a cached row that carry loss, and their number."""
    ids = torch.as_tensor(item.input_ids.astype(np.int64))[None]
    logits = model(input_ids=ids).logits[0]
    at = np.flatnonzero(item.loss_mask)
    at = torch.as_tensor(at[at > 0])
    targets = ids[0] if labels is None else torch.as_tensor(labels.astype(np.int64))
    return -logits[at - 1].log_softmax(-1).gather(1, targets[at][:, None]).sum(), len(at)


def dense_fisher(
    model: torch.nn.Module, items: Sequence, labels: Sequence[np.ndarray | None]
) -> dict[str, torch.Tensor]:
    """1 / N * sum over rows of the squared gradient of the row's summed log-likelihood."""
    parameters = distinct_parameters(model)
    fisher = {name: torch.zeros_like(p) for name, p in parameters.items()}
    total = 0
    for item, row_labels in zip(items, labels, strict=True):
        loss, num = row_nll(model, item, row_labels)
        total += num
        model.zero_grad()
        loss.backward()
        for name, parameter in parameters.items():
            fisher[name] += parameter.grad**2
    model.zero_grad()
    return {name: value / total for name, value in fisher.items()}


def dense_training(
    model_dir: str,
    steps: Sequence[Sequence],
    *,
    learning_rate: float,
    penalty: Callable[[dict, dict], torch.Tensor] | None = None,
    after_step: Callable[[int, dict, dict], None] | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict:
    """Plain SGD on cross-entropy plus a penalty of (theta, theta0), by autograd.

    Args:
        model_dir: the initial model.
        steps: for each optimizer step its cached rows.
        learning_rate: constant.
        penalty: part of the loss.
        after_step: called with step number (from 1), theta and theta0.

    Returns:
        gradients of every step, penalties, and the final weights.
    """
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    theta = distinct_parameters(model)
    theta0 = {name: p.detach().clone() for name, p in theta.items()}
    gradients, penalties = [], []
    for number, items in enumerate(steps, 1):
        total, count = torch.zeros((), dtype=dtype), 0
        for item in items:
            loss, num = row_nll(model, item)
            total, count = total + loss, count + num
        value = torch.zeros((), dtype=dtype) if penalty is None else penalty(theta, theta0)
        model.zero_grad()
        (total / count + value).backward()
        gradients.append({name: p.grad.clone() for name, p in theta.items()})
        penalties.append(float(value.detach()))
        with torch.no_grad():
            for parameter in theta.values():
                parameter -= learning_rate * parameter.grad
        if after_step is not None:
            after_step(number, theta, theta0)
    weights = {name: p.detach().clone() for name, p in theta.items()}
    return {"gradients": gradients, "penalties": penalties, "weights": weights}
