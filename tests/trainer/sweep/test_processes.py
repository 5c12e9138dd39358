"""Runs in processes of their own: killed and continued sweeps, several at a time, and a local Ray."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from caches import write_cache
from runs import QUICK, same_weights, settings
from warm_process import Command, anneal

from formats.errors import ConfigError
from trainer import train
from trainer.sweep.config import sweep_from_options
from trainer.sweep.on_ray import RayPool, Slots
from trainer.sweep.pools import Job, LocalPool, Process
from trainer.sweep.sweep import run_sweep

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def text(tiny_llama_dir, tmp_path_factory) -> str:
    return str(write_cache(tmp_path_factory.mktemp("texts") / "held-out", tiny_llama_dir, num_rows=3, seed=1))


def command(cache, model, out, text) -> list[str]:
    words = ["sweep", cache, "--model", model, "--out", out, "--source", f"s={text}", "--target", f"t={text}"]
    words += ["--grid", "kl_coef=1", "--merge", "wise-ft:0.5"]
    for override in (*QUICK, "training.max_steps=4", "training.save_strategy=steps", "training.save_steps=1"):
        words += ["--set", override]
    return [str(word) for word in words]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_sweep_ends_with_the_same_file(number, llama_cache, tiny_llama_dir, text, tmp_path):
    """The kill comes while the second run is under way; what that run had saved is used."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    done = anneal(*command(llama_cache, tiny_llama_dir, whole, text))
    assert done.returncode == 0, done.stderr
    process = Command(*command(llama_cache, tiny_llama_dir, out, text))
    second = out / "runs" / "kl_coef=1"
    while not list(second.glob("checkpoint-*/trainer_state.json")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    stopped = process.communicate()
    assert stopped.returncode == (143 if number == signal.SIGTERM else -9)
    if number == signal.SIGTERM:
        line = "stopped by SIGTERM with 1 of 2 runs finished; the same command continues"
        assert line in stopped.stderr
    assert not (out / "sweep.json").exists()
    done = anneal(*command(llama_cache, tiny_llama_dir, out, text))
    assert done.returncode == 0, done.stderr
    found, expected = ((place / "sweep.json").read_bytes() for place in (out, whole))
    assert found.replace(str(out).encode(), str(whole).encode()) == expected


@pytest.mark.slow
def test_parallel_runs_are_those_of_train(llama_cache, tiny_llama_dir, text, tmp_path):
    asked = sweep_from_options(
        str(llama_cache), model=str(tiny_llama_dir), out=str(tmp_path / "out"), overrides=QUICK, grid=["kl_coef=1"],
        source={"s": text}, target={"t": text},
    )  # fmt: skip
    assert LocalPool(2).environment(1)["OMP_NUM_THREADS"] == str(max(1, (os.cpu_count() or 1) // 2))
    assert LocalPool(1).environment(0) == {}
    report = run_sweep(asked, pool=LocalPool(2))
    assert not report.failed
    train(settings(llama_cache, tiny_llama_dir, tmp_path / "typed", "kl_coef=1"))
    assert same_weights(tmp_path / "out" / "runs" / "kl_coef=1", tmp_path / "typed")


@pytest.mark.slow
def test_runs_on_ray_are_those_of_train(llama_cache, tiny_llama_dir, text, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    asked = sweep_from_options(
        str(llama_cache), model=str(tiny_llama_dir), out=str(tmp_path / "out"), overrides=QUICK, grid=["kl_coef=1"],
        also=["training.learning_rate=1e30"], source={"s": text}, target={"t": text},
    )  # fmt: skip
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    try:
        with RayPool() as pool:
            report = run_sweep(asked, pool=pool)
    finally:
        ray.shutdown()
    assert list(report.failed) == ["direct,lr=1e30"] and "finite" in report.failed["direct,lr=1e30"]
    train(settings(llama_cache, tiny_llama_dir, tmp_path / "typed", "kl_coef=1"))
    assert same_weights(tmp_path / "out" / "runs" / "kl_coef=1", tmp_path / "typed")


@pytest.mark.slow
def test_a_process_that_dies_is_a_failure_with_its_log(tmp_path):
    process = Process(
        Job(name="a", settings={"out": str(tmp_path / "x")}, log=tmp_path / "logs" / "a.log"), {}
    )
    process.send(signal.SIGKILL)
    found = process.wait()
    assert found["kind"] == "Process" and "SIGKILL" in found["error"] and "a.log" in found["error"]


@pytest.mark.parametrize(
    ("visible", "count", "parallel", "dealt"),
    [
        (None, 0, 1, [None]),
        ("", 0, 2, [None, None]),
        (None, 1, 1, ["0"]),
        (None, 4, 1, ["0"]),  # a run that sees four cards is refused
        (None, 2, 3, ["0", "1", "0"]),
        ("3,1", 2, 2, ["3", "1"]),
        ("GPU-a,GPU-b", 2, 1, ["GPU-a"]),
        ("0,1,-1,2", 2, 3, ["0", "1", "0"]),  # CUDA stops at the first that is none
        ("MIG-a,MIG-b", 1, 3, ["MIG-a", "MIG-b", "MIG-a"]),  # a process sees and counts the first alone
    ],
)
def test_every_run_has_one_gpu(visible, count, parallel, dealt, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    pool = LocalPool(parallel)
    assert [pool.environment(slot).get("CUDA_VISIBLE_DEVICES") for slot in range(parallel)] == dealt


@pytest.mark.parametrize(
    ("machines", "parallel", "share"),
    [
        ([{"CPU": 8.0}], None, (8, 1, 0)),
        ([{"CPU": 8.0}], 2, (2, 4, 0)),
        ([{"CPU": 4.0}, {"CPU": 4.0}], 1, (1, 4, 0)),  # no machine has eight
        ([{"CPU": 5.0}, {"CPU": 1.0}], 2, (2, 2, 0)),
        ([{"CPU": 8.0, "GPU": 4.0}], None, (4, 1, 1)),
        ([{"CPU": 8.0, "GPU": 4.0}], 3, (3, 1, 1)),
        ([{"CPU": 2.0, "GPU": 4.0}, {"CPU": 8.0}], None, (2, 1, 1)),  # a GPU's run takes a CPU beside it
    ],
)
def test_the_share_of_a_cluster(machines, parallel, share):
    found = Slots.of_cluster(machines, parallel)
    assert (found.parallel, found.num_cpus, found.num_gpus) == share


@pytest.mark.parametrize("machines", [[{"CPU": 8.0, "GPU": 2.0}], [{"CPU": 1.0, "GPU": 2.0}, {"CPU": 7.0}]])
def test_a_cluster_that_is_too_small(machines):
    with pytest.raises(ConfigError, match="for each of 3 runs at a time, got 2 GPUs and 8 CPUs"):
        Slots.of_cluster(machines, 3)
