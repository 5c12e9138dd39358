"""Objectives in whole training steps: no split of a step changes the gradient, and each equals its definition."""

import json
import math

import numpy as np
import pytest
import torch
from caches import write_cache
from distributed_worker import Record, relative_difference, run, run_all
from processes import run_ranks
from runs import settings

from formats.cache import TeacherCache
from trainer.config import LoraSettings
from trainer.data.sampler import EpochBatches, Source
from trainer.loop.kl_budget import KlBudget
from trainer.result.lora import attach_adapters
from trainer.run import train

OBJECTIVES = {
    "masked": {
        "kl_target": "masked-weighted",
        "ce_weight": "psft",
        "kl_gate": "unsure",
        "label_smoothing": 0.1,
    },
    "prompt": {"kl_on": "prompt", "ce_weight": "flow", "kl_gate": "entropy:3"},
    "target": {"kl_on": "target", "ce_weight": "stm:0.01", "kl_target": "masked"},
    "student": {"ce_weight": "eaft", "kl_on": "all"},
    "tau": {"ce_weight": "talr", "kl_target": "masked"},
    "initial": {"ce_weight": "eaft0"},
}


@pytest.fixture(scope="module")
def base(tiny_llama_dir, tmp_path_factory) -> dict:
    """A pruned cache of all positions: labels are in tails, and masks are uneven."""
    out = tmp_path_factory.mktemp("objective")
    cache = write_cache(out / "cache", tiny_llama_dir, num_rows=24, positions="all", min_prob=5e-3)
    return {
        "model": str(tiny_llama_dir),
        "cache": str(cache),
        "out": str(out / "run"),
        "batch": 16,
        "accumulation": 1,
        "steps": 2,
        "learning_rate": 0.3,
    }


def assert_same(one: dict, other: dict, tolerance: float = 1e-9) -> None:
    assert relative_difference(one, other) < tolerance
    for left, right in zip(one["log"], other["log"], strict=True):
        for key in {"ce", "kl", "loss", "kl_coef"} & left.keys():
            assert right[key] == pytest.approx(left[key], rel=1e-5, abs=1e-7), key


@pytest.mark.parametrize("name", OBJECTIVES)
def test_accumulation_and_packing_give_the_same_gradient(base, name):
    whole = run(base | {"objective": OBJECTIVES[name]})
    assert_same(whole, run(base | {"objective": OBJECTIVES[name], "batch": 4, "accumulation": 4}))
    plain = run(base | {"steps": 1})
    assert relative_difference({"gradients": whole["gradients"][:1]}, plain) > 1e-2  # it is another objective
    if name == "masked":
        packed = base | {"objective": OBJECTIVES[name], "packing": True}
        assert_same(run(packed | {"batch": 8}), run(packed | {"batch": 2, "accumulation": 4}))


@pytest.mark.slow
def test_two_processes_give_the_same_gradient(base, tmp_path):
    specs = [base | {"objective": OBJECTIVES[name], "batch": 4, "accumulation": 2} for name in OBJECTIVES]
    specs.append(base | {"kl_budget": 1e-3, "batch": 4, "accumulation": 2})
    for number, spec in enumerate(specs):
        spec["result"] = str(tmp_path / f"{number}.pt")
    run_ranks(tmp_path, 2, run_all, specs)
    for spec in specs:
        one = run(spec | {"batch": 16, "accumulation": 1})
        assert_same(one, torch.load(spec["result"]))


def first_rows(base: dict) -> list[int]:
    count = len(TeacherCache(base["cache"]))
    order = EpochBatches([Source(units=[[i] for i in range(count)])], 16, seed=3)
    return [unit[0] for unit in next(iter(order))]


@pytest.mark.parametrize("packing", (False, True))
def test_asft_with_adapters_is_the_two_model_definition(tiny_llama_dir, llama_cache, tmp_path, packing):
    """LLaMA-Factory's loss in plain PyTorch with the reference model in memory, rows one by one; ours from a cache,
    with adapters whose step it is, padded and packed."""
    from transformers import AutoModelForCausalLM

    spec = {
        "model": str(tiny_llama_dir), "cache": str(llama_cache), "out": str(tmp_path / "run"), "kl_coef": 0.1,
        "objective": {"ce_weight": "dft"}, "lora": {"r": 4}, "learning_rate": 0.5, "steps": 2, "packing": packing,
        "batch": 24, "accumulation": 1,
    }  # fmt: skip
    found = run(spec)  # all 24 rows in each step; after the first the adapters are no longer zero
    torch.manual_seed(0)
    load = AutoModelForCausalLM.from_pretrained
    model = attach_adapters(load(tiny_llama_dir, dtype=torch.float64), LoraSettings(r=4))
    reference = load(tiny_llama_dir, dtype=torch.float64)
    cache, record = TeacherCache(llama_cache), Record()
    for _ in range(2):
        dft = kl = 0.0
        for row in cache:
            ids = torch.as_tensor(row.input_ids.astype(np.int64))[None]
            at = torch.as_tensor(np.flatnonzero(row.loss_mask))
            logits = model(input_ids=ids).logits[0, at - 1]
            with torch.no_grad():
                p = torch.softmax(reference(input_ids=ids).logits[0, at - 1], -1)
            ce = torch.nn.functional.cross_entropy(logits, ids[0, at], reduction="none")
            dft = dft + ((-ce).exp().detach() * ce).sum()
            kl = kl + torch.nn.functional.kl_div(logits.log_softmax(-1), p, reduction="none").sum()
        num = sum(int(row.loss_mask.sum()) for row in cache)
        model.zero_grad()
        ((dft + 0.1 * kl) / num).backward()
        record.on_pre_optimizer_step(None, None, None, model=model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
    assert (
        relative_difference({"gradients": record.gradients}, found) < 1e-5
    )  # the cache holds float32 logprobs
    assert found["log"][1]["kl"] > 1e-6


# --- the budget ----------------------------------------------------------------------------------------------


class Standing:
    """What a `KlBudget` asks of a trainer on one process."""

    class args:
        device, world_size = torch.device("cpu"), 1


class Output:
    def __init__(self, kl: float, num_kl: int = 5):
        self.kl, self.num_kl = torch.tensor(kl), torch.tensor(num_kl)


def test_dual_ascent_by_hand():
    budget = KlBudget(Standing(), 2.0, 0.02)
    budget.add(Output(0.01))
    budget.add(Output(0.02))  # two micro-batches of one step: their KLs add up to 0.03
    budget.on_step_end(Standing.args, None, None)
    assert budget.coef.item() == pytest.approx(2.0 * math.exp(0.1 * 0.5))
    budget.add(Output(9.0))
    budget.on_step_end(Standing.args, None, None)
    assert budget.coef.item() == pytest.approx(2.0 * math.exp(0.15))  # held to one RATE
    budget.add(Output(0.0, 0))
    budget.on_step_end(Standing.args, None, None)
    assert budget.coef.item() == pytest.approx(2.0 * math.exp(0.15))  # a step without KL says nothing


def test_a_budget_does_not_depend_on_the_split(base):
    spec = base | {"kl_budget": 1e-3, "steps": 3}
    one, other = run(spec), run(spec | {"batch": 4, "accumulation": 4})
    assert_same(one, other)
    coefs = [entry["kl_coef"] for entry in one["log"] if "kl_coef" in entry]
    assert len(coefs) == 3 and len(set(coefs)) == 3


def test_the_kl_settles_at_the_budget(base):
    """With two budgets, from the same start, on a text that would go to more than ten times either."""
    for budget in (0.02, 0.1):
        log = run(
            base | {"kl_budget": budget, "kl_coef": 1.0, "steps": 160, "dtype": "float32", "batch": 24}
        )["log"]
        kl = [entry["kl"] for entry in log if "kl" in entry]
        assert np.mean(kl[-50:]) == pytest.approx(budget, rel=0.15)


def test_an_interrupted_run_goes_on_with_its_coefficient(tiny_llama_dir, pruned_cache, tmp_path):
    """Four steps at once, and two and two: the same coefficients and losses; the setting reaches the log."""
    overrides = [
        "kl_budget=0.001",
        "training.save_strategy=steps",
        "training.save_steps=2",
        "keep_checkpoints=true",
    ]
    overrides += ["training.lr_scheduler_type=constant", "verify_saved=false"]

    def of(name: str, steps: int):
        config = settings(
            pruned_cache, tiny_llama_dir, tmp_path / name, *overrides, f"training.max_steps={steps}"
        )
        return [(entry["kl_coef"], entry["ce"]) for entry in train(config).log_history if "kl_coef" in entry]

    whole = of("whole", 4)
    state = json.loads((tmp_path / "whole" / "checkpoint-2" / "trainer_state.json").read_text())
    stored = state["stateful_callbacks"]["KlBudget"]["attributes"]["coef"]
    assert stored == whole[1][0] and len(whole) == 4
    budget = KlBudget(Standing(), 1.0, 0.001)

    class Resumed:
        global_step, stateful_callbacks = 2, state["stateful_callbacks"]

    budget.on_train_begin(None, Resumed, None)
    assert budget.coef.item() == stored != 1.0
