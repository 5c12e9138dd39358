"""A checkpoint is complete or absent, and continuing from it gives the very losses of a run that was never
stopped.

Runs are real: a subprocess trains a tiny model in fp32 on the CPU, is killed or told to stop, and starts
again.
"""

import json
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import resume_worker
from runs import begin, finish, same_weights

from trainer import checkpoint

STEPS = 9  # 3 epochs of 24 rows in batches of 8


def make_checkpoint(run_dir: Path, step: int, *, complete: bool = True) -> Path:
    staging = checkpoint.staging_directory(run_dir, step)
    (staging / "deep").mkdir(parents=True)
    (staging / "weights.bin").write_bytes(b"w" * 100)
    (staging / "deep" / "state.json").write_text("{}")
    final = checkpoint.final_directory(run_dir, step)
    if complete:
        checkpoint.commit_checkpoint(staging, final, step)
    return final


def test_only_marked_checkpoints_with_all_their_bytes_count(tmp_path):
    first, second = make_checkpoint(tmp_path, 4), make_checkpoint(tmp_path, 12)
    assert checkpoint.newest_checkpoint(tmp_path) == second
    (second / "weights.bin").write_bytes(b"w" * 99)
    assert checkpoint.newest_checkpoint(tmp_path) == first
    (first / checkpoint.MARKER).write_text("{ not json")
    assert checkpoint.newest_checkpoint(tmp_path) is None


def test_steps_are_compared_as_numbers(tmp_path):
    for step in (9, 10, 100):
        make_checkpoint(tmp_path, step)
    assert [step for step, _ in checkpoint.complete_checkpoints(tmp_path)] == [9, 10, 100]


def test_sweeping_removes_leftovers_and_nothing_else(tmp_path):
    complete = make_checkpoint(tmp_path, 3)
    make_checkpoint(tmp_path, 6, complete=False)
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "notes").mkdir()
    assert checkpoint.sweep(tmp_path) == [".checkpoint-6.staging", "checkpoint-5"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-3", "notes"]
    assert checkpoint.is_complete(complete)


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    made = [make_checkpoint(tmp_path, step) for step in (1, 2, 3, 4)]
    checkpoint.rotate(tmp_path, 2, keep=made[0])
    assert [step for step, _ in checkpoint.complete_checkpoints(tmp_path)] == [1, 4]
    checkpoint.rotate(tmp_path, None)
    checkpoint.rotate(tmp_path, 1)
    assert [step for step, _ in checkpoint.complete_checkpoints(tmp_path)] == [4]


# --- real runs
# -----------------------------------------------------------------------------------------------


def numbers(entries: list[dict]) -> list[tuple]:
    """What must be equal to the last bit."""
    return [(e["step"], e["ce"], e["kl"], e["loss"], e["grad_norm"], e["learning_rate"]) for e in entries]


@pytest.fixture(scope="module")
def uninterrupted(tiny_llama_dir, pruned_cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    entries, _ = finish(tiny_llama_dir, pruned_cache, out)
    assert [e["step"] for e in entries] == list(range(1, STEPS + 1))
    return out, entries


@pytest.mark.parametrize("where", ["step", "weights", "optimizer", "marker", "rename", "publish"])
def test_a_killed_run_continues_bit_for_bit(tiny_llama_dir, pruned_cache, uninterrupted, tmp_path, where):
    """SIGKILL at a random step, and at every stage of saving a checkpoint and of publishing the result."""
    out, (whole, expected) = tmp_path / "run", uninterrupted
    moment = int(np.random.default_rng(len(where)).integers(2, STEPS)) if where == "step" else 6
    first = begin(tiny_llama_dir, pruned_cache, out, KILL_AT=f"{where}:{moment}")
    assert first.wait() == -signal.SIGKILL, first.text("stderr")[-2000:]
    assert not (out / "config.json").exists()
    entries, done = finish(tiny_llama_dir, pruned_cache, out)
    complete = {"step": (moment - 1) // 2 * 2 if where == "step" else 4, "publish": STEPS}.get(where, 4)
    if complete:
        assert f"continuing from checkpoint-{complete}" in done.text("stderr")
    assert numbers(entries) == numbers(expected)
    assert same_weights(out, whole)
    assert not list(out.glob(".*")) and not list(out.glob("checkpoint-*"))


def test_a_run_killed_behind_its_last_step_takes_no_more(tiny_llama_dir, pruned_cache, tmp_path):
    """Four steps of an epoch and a third: transformers took a fifth when the result alone was missing."""
    given = ("training.max_steps=4",)
    expected, _ = finish(tiny_llama_dir, pruned_cache, tmp_path / "whole", *given)
    first = begin(tiny_llama_dir, pruned_cache, tmp_path / "run", *given, KILL_AT="publish:4")
    assert first.wait() == -signal.SIGKILL, first.text("stderr")[-2000:]
    entries, done = finish(tiny_llama_dir, pruned_cache, tmp_path / "run", *given)
    assert "continuing from checkpoint-4" in done.text("stderr")
    assert numbers(entries) == numbers(expected) and len(entries) == 4
    assert same_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("share", [0.5, 1.5])
def test_a_checkpoint_without_room_is_said_in_a_line(tiny_llama_dir, pruned_cache, tmp_path, share):
    """The weights do not fit, or the optimiser's state: errors of safetensors and of torch, and what was written stays.
    The last checkpoint is good, and the run continues from it.
    """
    words = (str(tiny_llama_dir), str(pruned_cache), str(tmp_path / "run"), ["training.max_steps=3"])
    room = int(share * (tiny_llama_dir / "model.safetensors").stat().st_size)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError, match=r"checkpoint-2\.staging") as error:
            resume_worker.run(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "free" in error.value.strerror and "\n" not in error.value.strerror
    assert not (tmp_path / "run").exists()
    resume_worker.run(*words)
    assert (tmp_path / "run" / "config.json").exists()


def test_sigterm_saves_stops_and_continues(tiny_llama_dir, pruned_cache, uninterrupted, tmp_path):
    out, (whole, expected) = tmp_path / "run", uninterrupted
    go = tmp_path / "go"
    started = begin(tiny_llama_dir, pruned_cache, out, HOLD=str(go))
    while not go.with_suffix(".held").exists():
        assert started.process.is_alive(), started.text("stderr")[-2000:]
        time.sleep(0.02)
    os.kill(started.process.pid, signal.SIGTERM)
    go.touch()
    assert started.wait() == 0, started.text("stderr")[-2000:]
    report = json.loads(started.text("stdout").splitlines()[-1])
    assert report["interrupted_by"] == "SIGTERM" and report["num_steps"] == 3
    assert not (out / "config.json").exists()
    saved = checkpoint.newest_checkpoint(out)
    assert saved is not None and saved.name == f"checkpoint-{report['num_steps']}"
    entries, done = finish(tiny_llama_dir, pruned_cache, out)
    assert f"continuing from {saved.name}" in done.text("stderr") and "step 0" not in done.text("stderr")
    assert numbers(entries) == numbers(expected)
    assert same_weights(out, whole)


def test_checkpoints_and_results_hold_no_pickled_arguments(tiny_llama_dir, pruned_cache, tmp_path):
    import torch

    finish(tiny_llama_dir, pruned_cache, tmp_path / "run", "keep_checkpoints=true", "training.max_steps=2")
    names = [path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*")]
    assert "checkpoint-2/complete.json" in names and "checkpoint-2/optimizer.pt" in names
    assert not [name for name in names if "training_args" in name]
    for path in (tmp_path / "run" / "checkpoint-2").glob("*.pt"):
        torch.load(path, weights_only=True)  # tensors and numbers only
