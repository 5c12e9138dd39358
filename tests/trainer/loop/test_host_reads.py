"""How often a training step makes the host read from the device: counted on a CPU, where nothing waits.

Every read of a number goes through `aten::_local_scalar_dense`, or `tolist`; other operations wait because the size of
their result is a value. Whose reads they are is taken from the stack: this package may ask once per micro-batch, in
`plan_rows`; what transformers asks (whether a mask is all ones) is its own.
"""

import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from runs import trainer_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import trainer as package

PACKAGE = Path(package.__file__).parent
SIZED_BY_VALUES = ("aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique2")


def reader() -> str | None:
    """`module.py:function` of this package that is being run, innermost; None for nobody's."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE)}:{frame.name}"
        if "transformers" in path.parts or "accelerate" in path.parts:
            return None
    return None


class Reads(TorchDispatchMode):
    """Counts reads by who makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def note(self) -> None:
        if (who := reader()) is not None:
            self.found[who] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name, kwargs or {}
        by_value = name == "aten::repeat_interleave" and kwargs.get("output_size") is None
        if name == "aten::index":
            by_value = any(index is not None and index.dtype == torch.bool for index in args[1])
        if name == "aten::_local_scalar_dense" or name in SIZED_BY_VALUES or by_value:
            self.note()
        return func(*args, **kwargs)


class Window(TrainerCallback):
    """The reads of all steps between the first and the last one."""

    def __init__(self, reads: Reads) -> None:
        self.reads, self.within = reads, Counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.reads.found.clear()
        elif state.global_step == state.max_steps - 1:
            self.within = Counter(self.reads.found)


STEPS = ("training.max_steps=4", "training.logging_steps=100", "training.logging_first_step=false")
ON_A_CPU = "loss/label_annealing_loss.py:backward"
"""Reads its factor where that costs nothing: on a CPU alone."""
ON_THE_HOST = "data/collator.py:count_targets"
"""Counts a batch before it is moved to the device."""


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("temperature=2.0", "kl_direction=reverse"),
        ("packing=true", "pack_length=64"),
        ("kl_budget=0.05",),
        ("kl_target=masked-weighted", "ce_weight=dft"),
        ("lora.r=2",),
        ("l2.coef=0.01",),
    ],
    ids=str,
)
def test_a_micro_batch_is_one_question(overrides, monkeypatch, tmp_path, tiny_llama_dir, llama_cache):
    run = trainer_of(llama_cache, tiny_llama_dir, tmp_path / "run", *STEPS, *overrides)
    reads = Reads()
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (reads.note(), tolist(self))[1])
    window = Window(reads)
    run.add_callback(window)
    with reads:
        run.train()
    within = window.within
    assert within.pop("loss/chunks.py:plan_rows") == 2  # of two steps
    assert within.pop(ON_A_CPU, 0) <= 2 and within.pop(ON_THE_HOST) == 2
    assert not within
