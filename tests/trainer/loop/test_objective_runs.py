"""Objectives in whole training steps: no split of a step changes the gradient, and each equals its definition."""

import json
import math

import numpy as np
import pytest
import torch
from caches import write_cache
from distributed_worker import Record, relative_difference, run, run_all
from processes import run_ranks
from runs import copy_model, noise, settings

from formats.cache import TeacherCache
from trainer.config import LoraSettings
from trainer.data.sampler import EpochBatches, Source
from trainer.loop.kl_budget import KlBudget, unreached
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
    """LLaMA-Factory's loss in plain PyTorch with the reference model's distributions, rows one by one; ours from a
    cache, with adapters, padded and packed. The reference model once in memory, in float64, where the cache was
    captured from float32; and once as the cache has it, which leaves nothing but rounding."""
    from transformers import AutoModelForCausalLM

    spec = {
        "model": str(tiny_llama_dir), "cache": str(llama_cache), "out": str(tmp_path / "run"), "kl_coef": 0.1,
        "objective": {"ce_weight": "dft"}, "lora": {"r": 4}, "learning_rate": 0.5, "steps": 2, "packing": packing,
        "batch": 24, "accumulation": 1,
    }  # fmt: skip
    found = run(spec)  # all 24 rows in each step; after the first the adapters are no longer zero
    load, cache = AutoModelForCausalLM.from_pretrained, TeacherCache(llama_cache)
    reference = load(tiny_llama_dir, dtype=torch.float64)

    def in_memory(ids, at, row):
        with torch.no_grad():
            return torch.softmax(reference(input_ids=ids).logits[0, at - 1], -1)

    def as_cached(ids, at, row):
        logprobs = torch.zeros(len(at), cache.manifest.vocab_size, dtype=torch.float64)
        position = torch.repeat_interleave(torch.arange(len(at)), torch.as_tensor(row.teacher.counts))
        logprobs[position, torch.as_tensor(row.teacher.token_ids).long()] = torch.as_tensor(
            row.teacher.logprobs
        ).double()
        return torch.softmax(logprobs, -1)

    # The second step starts from adapters in float32, whose update was rounded.
    for probabilities, tolerances in ((in_memory, (1e-4, 1e-4)), (as_cached, (1e-9, 1e-6))):
        torch.manual_seed(0)
        model = attach_adapters(load(tiny_llama_dir, dtype=torch.float64), LoraSettings(r=4))
        record = Record()
        for _ in range(2):
            dft = kl = 0.0
            for row in cache:
                ids = torch.as_tensor(row.input_ids.astype(np.int64))[None]
                at = torch.as_tensor(np.flatnonzero(row.loss_mask))
                logits = model(input_ids=ids).logits[0, at - 1]
                ce = torch.nn.functional.cross_entropy(logits, ids[0, at], reduction="none")
                dft = dft + ((-ce).exp().detach() * ce).sum()
                p = probabilities(ids, at, row)
                kl = kl + torch.nn.functional.kl_div(logits.log_softmax(-1), p, reduction="none").sum()
            num = sum(int(row.loss_mask.sum()) for row in cache)
            model.zero_grad()
            ((dft + 0.1 * kl) / num).backward()
            record.on_pre_optimizer_step(None, None, None, model=model)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.5 * parameter.grad
        for step, tolerance in enumerate(tolerances):
            mine, theirs = ({"gradients": [grads[step]]} for grads in (record.gradients, found["gradients"]))
            assert relative_difference(mine, theirs) < tolerance
        assert (dft + 0.1 * kl).item() / num == pytest.approx(
            found["log"][1]["loss"], rel=1e-3
        )  # logged digits
    assert found["log"][1]["kl"] > 1e-6


# --- the budget ----------------------------------------------------------------------------------------------


class Standing:
    """What a `KlBudget` asks of a trainer on one process."""

    class args:
        metric_for_best_model = None
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
    """On a text that goes to more than ten times as many nats without one."""
    adam = {"optim": "adamw_torch", "learning_rate": 3e-4, "max_grad_norm": 1.0}
    spec = base | {"batch": 24, "steps": 110, "dtype": "float32", "arguments": adam}
    free = [entry["kl"] for entry in run(spec | {"kl_coef": 0.0, "steps": 40})["log"] if "kl" in entry]
    log = run(spec | {"kl_budget": 0.05, "kl_coef": 1.0})["log"]
    kl = [entry["kl"] for entry in log if "kl" in entry]
    assert np.mean(kl[-20:]) == pytest.approx(0.05, rel=0.1)
    assert free[-1] > 10 * 0.05


def test_an_interrupted_run_goes_on_with_its_coefficient(tiny_llama_dir, pruned_cache, tmp_path):
    """After three steps: one that goes up or down by a factor a step may be back where it began after two."""
    overrides = [
        "kl_budget=0.001",
        "training.save_strategy=steps",
        "training.save_steps=3",
        "keep_checkpoints=true",
    ]
    overrides += ["training.lr_scheduler_type=constant", "verify_saved=false"]

    def of(name: str, steps: int):
        config = settings(
            pruned_cache, tiny_llama_dir, tmp_path / name, *overrides, f"training.max_steps={steps}"
        )
        return [(entry["kl_coef"], entry["ce"]) for entry in train(config).log_history if "kl_coef" in entry]

    whole = of("whole", 4)
    state = json.loads((tmp_path / "whole" / "checkpoint-3" / "trainer_state.json").read_text())
    stored = state["stateful_callbacks"]["KlBudget"]["attributes"]["coef"]
    assert stored == whole[2][0] and len(whole) == 4
    budget = KlBudget(Standing(), 1.0, 0.001)

    class Resumed:
        global_step, stateful_callbacks = 3, state["stateful_callbacks"]

    budget.on_train_begin(None, Resumed, None)
    assert budget.coef.item() == stored != 1.0


def test_a_budget_that_a_run_could_not_reach_is_said(tiny_llama_dir, pruned_cache, tmp_path, capsys):
    assert unreached(None, {"kl": 9.0}) is None and unreached(0.05, {"kl": 0.0999, "kl_coef": 4.0}) is None
    asked = ["kl_budget=1e-7", "training.max_steps=3", "training.learning_rate=1e-3", "verify_saved=false"]
    report = train(settings(pruned_cache, tiny_llama_dir, tmp_path / "run", *asked))
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "was not reached" in text]
    assert line.startswith(
        f"kl_budget 1e-07 was not reached: KL was {report.last['kl']:.3g} nats in the last steps"
    )
    assert f"kl_coef still rising, at {report.last['kl_coef']:.3g}; " in line


def test_every_run_records_how_far_it_went_on_its_new_text(tiny_llama_dir, pruned_cache, tmp_path):
    """Also without a KL term and at another temperature: against both models, every token, in plain PyTorch."""
    from transformers import AutoModelForCausalLM

    from trainer.data.dataset import CachedDataset
    from trainer.data.sampler import sample_rows

    out = tmp_path / "direct"
    report = train(
        settings(pruned_cache, tiny_llama_dir, out, "kl_coef=0", "temperature=2", "verify_saved=false")
    )
    recorded = json.loads((out / "anneal.json").read_text())["new_text"]
    assert recorded == report.new_text
    load = AutoModelForCausalLM.from_pretrained
    initial, tuned = (load(path, dtype=torch.float32).eval() for path in (tiny_llama_dir, out))
    kl, ce, num = 0.0, 0.0, 0
    dataset = CachedDataset(pruned_cache)
    for row in sample_rows(dataset, 4, 0):
        item = dataset.cache[int(row)]
        ids = torch.as_tensor(item.input_ids.astype(np.int64))[None]
        at = torch.as_tensor(np.flatnonzero(item.loss_mask))
        with torch.no_grad():
            log_p, log_q = (
                model(input_ids=ids).logits[0, at - 1].double().log_softmax(-1) for model in (initial, tuned)
            )
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        ce -= float(log_q.gather(1, ids[0, at][:, None]).sum())
        num += len(at)
    assert (recorded["num_rows"], recorded["num_positions"]) == (4, num)
    assert recorded["ce"] == pytest.approx(ce / num, rel=1e-4)
    assert recorded["kl"] == pytest.approx(kl / num, rel=0.05)  # the tail's draws estimate its shape
    assert f"{recorded['kl']:.5f} nats" in (out / "README.md").read_text()


@pytest.mark.parametrize("split", ({"batch": 36}, {"batch": 4, "accumulation": 9}))
def test_cross_entropy_here_and_kl_there_is_its_definition(tiny_llama_dir, llama_cache, tmp_path, split):
    """Self-generated replay: CE(target) + c KL(initial || model) on other rows, each a mean over its own tokens,
    against plain float64 computation of both; the model is some way off its teacher, or there would be no KL."""
    from transformers import AutoModelForCausalLM

    moved = copy_model(tiny_llama_dir, tmp_path / "moved", noise(5))
    retained = write_cache(tmp_path / "self", tiny_llama_dir, num_rows=12, seed=9, positions="loss")
    spec = {
        "model": str(moved), "cache": str(llama_cache), "out": str(tmp_path / "run"), "kl_coef": 3.0, "steps": 1,
        "loss": "ce", "mixed": [(str(retained), "kl", 0.5)], "accumulation": 1, **split,
    }  # fmt: skip
    found = run(spec)
    model = AutoModelForCausalLM.from_pretrained(moved, dtype=torch.float64)
    terms = {"ce": [0.0, 0], "kl": [0.0, 0]}
    for row in TeacherCache(llama_cache).rows():
        logq = torch.log_softmax(model(input_ids=torch.as_tensor(row.input_ids[None]).long()).logits[0], -1)
        at = np.flatnonzero(row.loss_mask)
        terms["ce"][0] = terms["ce"][0] - logq[at - 1, row.input_ids[at]].sum()
        terms["ce"][1] += len(at)
    for row in TeacherCache(retained).rows():
        logq = torch.log_softmax(model(input_ids=torch.as_tensor(row.input_ids[None]).long()).logits[0], -1)
        position = torch.repeat_interleave(
            torch.arange(len(row.positions)), torch.as_tensor(row.teacher.counts)
        )
        logprobs = torch.zeros(len(row.positions), logq.shape[1], dtype=torch.float64)
        kept = torch.as_tensor(row.teacher.logprobs).double()
        logprobs[position, torch.as_tensor(row.teacher.token_ids).long()] = kept
        p = torch.softmax(logprobs, -1)
        terms["kl"][0] = terms["kl"][0] + (p * (p.log() - logq[row.positions])).sum()
        terms["kl"][1] += len(row.positions)
    ce, kl = (total / count for total, count in terms.values())
    (ce + 3.0 * kl).backward()
    ce, kl = ce.item(), kl.item()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert relative_difference({"gradients": [expected]}, found) < 1e-9
    assert found["log"][0]["ce"] == pytest.approx(ce, rel=1e-6)
    assert found["log"][0]["kl"] == pytest.approx(kl, rel=1e-6) and kl > 1e-3
    if split == {"batch": 36}:
        everywhere = run(spec | {"loss": "both"})
        assert relative_difference(found, everywhere) > 1e-3, "KL on the target as well is another objective"
