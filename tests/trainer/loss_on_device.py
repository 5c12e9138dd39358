"""The product's loss for the tests: itself, or on the device that ANNEAL_TEST_DEVICE names.

Then inputs are moved there, outputs and gradients come back, and the tests stay what they are: the same inputs, the
same references in float64 on the CPU, the same tolerances.
"""

import os
from dataclasses import fields, replace
from typing import Any

import torch

from trainer.data.teacher_batch import TeacherBatch
from trainer.loss import label_annealing_loss as module
from trainer.loss.label_annealing_loss import LabelAnnealingOutput
from trainer.loss.token_weights import LabelTerms

DEVICE = torch.device(os.environ.get("ANNEAL_TEST_DEVICE", "cpu"))


def moved(value: Any, device: torch.device) -> Any:
    """`value` on `device`; tensors stay in the graph of those that they were."""
    if isinstance(value, torch.Tensor | TeacherBatch):
        return value.to(device)
    if isinstance(value, LabelTerms | LabelAnnealingOutput):
        return replace(
            value, **{each.name: moved(getattr(value, each.name), device) for each in fields(value)}
        )
    return value


@torch.compiler.disable
def _on_device(*args: Any, **kwargs: Any) -> LabelAnnealingOutput:
    # The Triton kernels have cases of their own (loss/loss_triton_cases.py).
    there = {"kernel": "torch"} | {name: moved(value, DEVICE) for name, value in kwargs.items()}
    output = module.label_annealing_loss(*(moved(value, DEVICE) for value in args), **there)
    return moved(output, torch.device("cpu"))


# `cpu:0` takes the way of other devices, on the CPU.
label_annealing_loss = module.label_annealing_loss if torch.device("cpu") == DEVICE else _on_device
