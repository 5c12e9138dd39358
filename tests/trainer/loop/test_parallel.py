"""The gradient of an optimizer step must not depend on how its rows are split over micro-batches and
processes.

Reference: one process, one micro-batch. Every other split trains on the same 16 rows per step, whose masks
are uneven, so a mean of means, a local count or a second division by the accumulation steps shows at once.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import resume_worker
import torch
from caches import write_cache
from distributed_worker import relative_difference, run, run_all
from processes import run_ranks

from formats.errors import ConfigError


@pytest.fixture(scope="module")
def base(tiny_llama_dir, llama_cache, llama_eval_cache, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("parallel")
    return {
        "model": str(tiny_llama_dir),
        "cache": str(llama_cache),
        "eval_cache": str(llama_eval_cache),
        "out": str(out),
        "batch": 16,
        "accumulation": 1,
        "steps": 2,  # 24 rows: the second step has only 8 of them
    }


@pytest.fixture(scope="module")
def reference(base) -> dict:
    return run(base)


def launch(specs: list[dict], directory: Path) -> list[dict]:
    """Run the specs on two processes over gloo."""
    for number, spec in enumerate(specs):
        spec["result"] = str(directory / f"result-{number}.pt")
    run_ranks(directory, 2, run_all, specs)
    return [torch.load(spec["result"]) for spec in specs]


def logged(result: dict, key: str) -> list[float]:
    return [entry[key] for entry in result["log"] if key in entry]


def assert_same(reference: dict, other: dict, tolerance: float = 1e-9) -> None:
    assert relative_difference(reference, other) < tolerance
    for key in ("ce", "kl", "loss"):
        np.testing.assert_allclose(logged(other, key), logged(reference, key), rtol=1e-5, atol=1e-7)
    for key in ("eval_ce", "eval_kl", "eval_num_tokens"):
        assert other["metrics"][key] == pytest.approx(reference["metrics"][key], rel=1e-5)


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_gives_the_same_gradient(base, reference, accumulation):
    other = run(base | {"batch": 16 // accumulation, "accumulation": accumulation})
    assert_same(reference, other)


def test_the_gradient_is_that_of_the_definition(base, reference, tiny_llama_dir, llama_cache):
    """Against a dense two-model computation over the rows of the first step, in plain PyTorch."""
    from transformers import AutoModelForCausalLM

    from formats.cache import TeacherCache
    from trainer.data.sampler import EpochBatches, Source

    cache = TeacherCache(llama_cache)
    order = EpochBatches([Source(units=[[i] for i in range(len(cache))])], 16, seed=3)
    rows = [unit[0] for unit in next(iter(order))]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float64)
    total = {"ce": 0.0, "kl": 0.0, "num": 0}
    for row in rows:
        item = cache[row]
        ids = torch.as_tensor(item.input_ids.astype(np.int64))[None]
        logits = model(input_ids=ids).logits[0]
        teacher = logits.detach().log_softmax(-1)  # the same weights are the teacher
        at = torch.as_tensor(np.flatnonzero(item.loss_mask))
        student = logits[at - 1].log_softmax(-1)
        total["ce"] -= student.gather(1, ids[0, at][:, None]).sum()
        total["kl"] += (teacher[at - 1].exp() * (teacher[at - 1] - student)).sum()
        total["num"] += len(at)
    ((total["ce"] + 0.7 * total["kl"]) / total["num"]).backward()
    dense = {"gradients": [{n: p.grad for n, p in model.named_parameters()}]}
    first = {"gradients": reference["gradients"][:1]}
    assert relative_difference(first, dense) < 1e-6  # the cache holds float32 logprobs


def test_two_processes_give_the_same_gradient(base, reference, tmp_path):
    """DDP over gloo, with accumulation 1, 2, 4 and 8; packing, adapters and length grouping beside."""
    specs = [base | {"batch": 8 // a, "accumulation": a} for a in (1, 2, 4, 8)]
    packed = base | {"packing": True, "batch": 8}
    adapted = base | {"lora": {"r": 4}, "learning_rate": 0.5}
    grouped = base | {"group_by_length": True}
    specs += [packed | {"batch": 2, "accumulation": 2}, adapted | {"batch": 4, "accumulation": 2}]
    specs += [grouped | {"batch": 8}]
    results = launch(specs, tmp_path)
    for result in results[:4]:
        assert_same(reference, result)
    for spec, result in zip((packed, adapted, grouped), results[4:], strict=True):
        assert_same(run(spec), result)


@pytest.mark.slow
def test_fsdp2_on_two_processes_equals_one_process(base, reference, tiny_gemma2_dir, tmp_path):
    """Sharded weights, gathered head, tied (Gemma 2) and untied: the same gradients, weights, evaluation."""
    gemma = {"model": str(tiny_gemma2_dir), "cache": str(tmp_path / "c"), "eval_cache": str(tmp_path / "c")}
    write_cache(tmp_path / "c", tiny_gemma2_dir, num_rows=24)
    sharded = {"batch": 4, "accumulation": 2, "arguments": {"fsdp": True}}
    untied, tied = launch([base | sharded, base | gemma | sharded], tmp_path)
    assert untied["sharded"] and tied["sharded"] and not reference["sharded"]
    # Gemma's norms compute in float32 whatever the weights are, so its rounding is that of float32.
    for expected, found, tolerance in ((reference, untied, 1e-9), (run(base | gemma), tied, 1e-6)):
        assert_same(expected, found, tolerance)
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_fsdp2_under_bf16_rounds_neither_loss_nor_sums(base, tmp_path):
    """As on GPUs, where bf16 is the default: the loss that is logged is the sum of its parts, and the gradient of one
    process is as far from that of fp32."""
    spec = base | {"dtype": "float32"}
    halves = {"arguments": {"bf16": True, "fsdp": True}}
    (found,) = launch([spec | halves | {"batch": 2, "accumulation": 4}], tmp_path)
    assert found["sharded"]
    parts = [ce + 0.7 * kl for ce, kl in zip(logged(found, "ce"), logged(found, "kl"), strict=True)]
    np.testing.assert_allclose(logged(found, "loss"), parts, rtol=1e-6)
    assert relative_difference(run(spec), found) < 0.05


@pytest.mark.parametrize("version", [1, 2])
def test_what_fsdp_adds_up_in(version):
    from accelerate import FullyShardedDataParallelPlugin

    from trainer.loop.guarded_trainer import sum_in_full_precision

    plugin = FullyShardedDataParallelPlugin(fsdp_version=version)
    plugin.set_mixed_precision("bf16")
    state = SimpleNamespace(plugin_kwargs={})
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), gradient_state=state)
    sum_in_full_precision(accelerator)
    policy = plugin.mixed_precision_policy
    assert policy.param_dtype == torch.bfloat16
    if version == 2:
        assert (policy.reduce_dtype, policy.output_dtype) == (torch.float32, None)
        assert state.plugin_kwargs == {"sync_each_batch": True}


def test_fsdp_that_would_be_left_out_is_refused():
    """accelerate shards on GPUs alone."""
    from trainer.loop.guarded_trainer import require_sharding

    for asked, enabled in ((True, True), (False, False), (None, False)):
        require_sharding(asked, enabled=enabled)
    with pytest.raises(ConfigError, match=r"training\.fsdp needs a GPU for each process"):
        require_sharding(True, enabled=False)


@pytest.mark.parametrize("fsdp", [False, True])
def test_train_on_two_processes_writes_the_model_of_one(fsdp, tiny_llama_dir, pruned_cache, tmp_path):
    """The whole of `anneal train` under DDP and FSDP2: stopped half-way, continued, published by rank 0."""
    from safetensors.torch import load_file

    def arguments(out: Path, accumulation: int, *more: str) -> tuple:
        return (
            str(tiny_llama_dir),
            str(pruned_cache),
            str(out),
            [
                "training.per_device_train_batch_size=4",
                f"training.gradient_accumulation_steps={accumulation}",
                f"eval_caches.again={pruned_cache}",
                *more,
            ],
        )

    resume_worker.run(*arguments(tmp_path / "one", 2))
    more = ("training.fsdp=true",) if fsdp else ()
    ranks = run_ranks(
        tmp_path / "logs", 2, resume_worker.run_and_stop, 4, *arguments(tmp_path / "two", 1, *more)
    )
    assert "stopped by SIGTERM after step 4" in ranks[0].text("stdout")
    assert not (tmp_path / "two" / "config.json").exists()
    ranks = run_ranks(tmp_path / "logs", 2, resume_worker.run, *arguments(tmp_path / "two", 1, *more))
    assert "continuing from checkpoint-4" in ranks[0].text("stderr") and not ranks[1].text("stderr").count(
        "step "
    )
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)
    records = [json.loads((tmp_path / name / "anneal.json").read_text()) for name in ("one", "two")]
    for key in ("ce", "kl", "entropy", "confidence", "num_tokens"):
        first, second = (record["evaluation"]["again"][key] for record in records)
        assert second == pytest.approx(first, rel=1e-3)


@pytest.mark.slow
def test_compiling_the_model_changes_nothing(base):
    """Under torch.compile the loss is a graph break inside the compiled model: the same gradients."""
    spec = base | {"dtype": "float32", "steps": 1}
    arguments = {"torch_compile": True, "torch_compile_backend": "eager"}
    plain, compiled = run(spec), run(spec | {"arguments": arguments})
    found = {name.removeprefix("_orig_mod."): g for name, g in compiled["gradients"][0].items()}
    assert relative_difference(plain, {"gradients": [found]}) < 1e-7


def test_gradients_differ_when_a_row_is_missing(base, reference):
    """The comparison itself can fail: 15 of the 16 rows give another gradient by far."""
    other = run(base | {"batch": 15, "steps": 2})
    assert relative_difference(reference, other) > 1e-3


def test_single_precision_agrees_to_rounding(base):
    """In fp32 the largest difference of any entry is below 1e-6 of the largest gradient."""
    whole = run(base | {"dtype": "float32", "steps": 1})["gradients"][0]
    split = run(base | {"dtype": "float32", "steps": 1, "batch": 2, "accumulation": 8})["gradients"][0]
    scale = max(float(g.abs().max()) for g in whole.values())
    assert max(float((whole[k] - split[k]).abs().max()) for k in whole) < 1e-6 * scale
