"""The loss stays one pass: no objective reads the host more often, and only two touch whole rows of logits more."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from loss_cases import make_case
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.loss.label_annealing_loss import label_annealing_loss
from trainer.loss.token_weights import LabelTerms
from trainer.objective import Objective

VOCABULARY = 500
READS = ("_local_scalar_dense", "nonzero")
"""Operations by which the host waits for the device."""


class Recorder(TorchDispatchMode):
    """Counts operations that touch a whole chunk of logits, tensors of that size that are made, and reads."""

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.size = num_rows * VOCABULARY
        self.passes: Counter[str] = Counter()
        self.made = self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if any(isinstance(part, torch.Tensor) and part.numel() == self.size for part in (*args, result)):
            views = (
                "view",
                "slice",
                "detach",
                "_unsafe_view",
                "alias",
                "index",
                "index_add_",
                "index_fill_",
                "t",
            )
            if name not in (*views, "index_copy_", "empty"):
                self.passes[name] += 1
            ins = {part.data_ptr() for part in args if isinstance(part, torch.Tensor)}
            if isinstance(result, torch.Tensor) and result.numel() == self.size:
                self.made += result.data_ptr() not in ins
        self.reads += name in READS
        return result


def record(temperature: float, objective: Objective, *, masked=False, weights=False) -> Recorder:
    case = make_case(num_rows=40, vocab_size=VOCABULARY, draw_rate=4.0, drift=0.3, temperature=temperature)
    case = replace(case, labels=case.labels.clamp_min(0))
    teacher = case.teacher
    flags = torch.zeros(len(teacher.token_ids), dtype=torch.bool)
    flags[teacher.offsets[:-1]] = True
    teacher = replace(
        teacher,
        masked=flags if masked else None,
        weights=torch.ones(len(teacher), dtype=torch.float64) if weights else None,
    )
    ones = torch.ones(40, dtype=torch.float64)
    leaves = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    with Recorder(40) as recorder:
        label_annealing_loss(
            *leaves,
            case.labels,
            teacher,
            objective=objective,
            label_terms=LabelTerms(ones, -ones),
            chunk_size=40,
        ).loss.backward()
    return recorder


@pytest.mark.parametrize("temperature", (1.0, 2.0))
def test_nothing_of_the_size_of_logits_is_added(temperature):
    plain = record(temperature, Objective())
    assert plain.passes["exp_"] == (1 if temperature == 1 else 2) and plain.reads > 0
    same = [
        record(temperature, Objective(kl_gate="unsure"), weights=True),
        record(temperature, Objective(kl_target="masked"), masked=True),
        record(temperature, Objective(kl_target="masked-weighted"), masked=True, weights=True),
        *(
            record(temperature, Objective(ce_weight=name))
            for name in ("flow:1", "psft", "eaft0", "dft", "talr:1")
        ),
    ]
    for other in same:
        assert other.passes == plain.passes
        assert (other.made, other.reads) == (plain.made, plain.reads)
    eaft, smoothed = (
        record(temperature, Objective(**setting))
        for setting in ({"ce_weight": "eaft"}, {"label_smoothing": 0.1})
    )
    assert eaft.passes - plain.passes == Counter({"topk": 1})
    assert smoothed.passes - plain.passes == Counter({"mean": 1, "sub_": 1})
    for other in (eaft, smoothed):
        assert (other.made, other.reads) == (plain.made, plain.reads)
